# SPDX-License-Identifier: Apache-2.0
"""Forked processes: an adapter's file is the old or the new one, whatever happens to the writer."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile, read_adapter
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.files import replace_file
from tests.harness.adapter_files import tiny_adapter

KILLS = 60


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own belong to one user."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def in_a_fork(work: Callable[[], object]) -> tuple[int, str]:
    """Returns (exit code, error) of a child process, which may limit itself or change its user."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        message, code = "", 0
        try:
            work()
        except BaseException as error:
            message, code = f"{type(error).__name__}: {error}", 1
        os.write(write, message.encode())
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), message


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(folder: Path) -> None:
    """Sends SIGKILL at random moments while a child keeps replacing one adapter by another."""
    path, draw = folder / "adapter.nemo", random.Random(3)
    adapters = [read_adapter(tiny_adapter(path, hidden=256, rank=32, seed=seed)) for seed in (1, 2)]
    start = time.perf_counter()
    for adapter in adapters:
        write_again(path, adapter)
    pair = time.perf_counter() - start
    seen = set()
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:
            while True:
                for adapter in adapters if kill % 2 else reversed(adapters):
                    write_again(path, adapter)
        time.sleep(draw.uniform(0.0, 2 * pair))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(read_adapter(path).config.seed)
    assert seen == {1, 2}
    unfinished = [name for name in os.listdir(folder) if name != path.name]
    assert unfinished, "no kill met a write: the test would pass without the renaming"
    assert all(name.startswith(".adapter.nemo.") for name in unfinished)


def write_again(path: Path, adapter: AdapterFile) -> None:
    write_adapter(path, adapter.config, adapter.shapes, adapter.state, {})


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(folder: Path) -> None:
    path = folder / "adapter.nemo"
    child = os.fork()
    if child == 0:
        replace_file(path, lambda file: signal.pause() if file.write(b"half") else None)
    long_ago = time.time() - 3600
    while not (found := list(folder.iterdir())):
        time.sleep(0.01)
    time.sleep(0.1)  # it holds the lock now
    os.utime(found[0], (long_ago, long_ago))
    tiny_adapter(path)
    assert found[0].exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.utime(found[0], (long_ago, long_ago))
    tiny_adapter(path)
    assert os.listdir(folder) == [path.name]


def test_a_full_disk_is_a_clear_error_and_the_old_file_is_intact(folder: Path) -> None:
    path = tiny_adapter(folder / "adapter.nemo", seed=1)
    before = path.read_bytes()

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # the kernel refuses more bytes, as on a full disk
        tiny_adapter(path, seed=2)

    code, message = in_a_fork(write)
    assert code == 1
    assert message.startswith("OSError: ")
    assert "the adapter could not be written; an older file is unchanged" in message
    assert str(path) in message
    assert path.read_bytes() == before
    assert os.listdir(folder) == [path.name]


def test_a_device_is_not_replaced_by_a_file(folder: Path) -> None:
    """For example /dev/null, if root only wants to see the check."""
    device = folder / "adapter.nemo"
    os.mkfifo(device)
    with pytest.raises(OSError, match="not a regular file; refusing to replace it"):
        tiny_adapter(device)
    assert stat.S_ISFIFO(device.lstat().st_mode)
    assert os.listdir(folder) == [device.name]


def test_a_folder_that_may_not_be_written_to_is_a_clear_error_and_the_old_file_is_intact(folder: Path) -> None:
    path = tiny_adapter(folder / "adapter.nemo", seed=1)
    before = path.read_bytes()
    folder.chmod(0o555)

    def write() -> None:
        if os.getuid() == 0:  # root may write anywhere
            os.setuid(65534)
        tiny_adapter(path, seed=2)

    code, message = in_a_fork(write)
    assert code == 1
    assert message.startswith("PermissionError: ")
    assert "Permission denied; the adapter could not be written; an older file is unchanged" in message
    assert str(path) in message
    assert path.read_bytes() == before
    assert os.listdir(folder) == [path.name]
