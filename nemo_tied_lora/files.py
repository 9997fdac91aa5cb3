# SPDX-License-Identifier: Apache-2.0
"""Writes files atomically: into a temporary file beside the target, then a rename. A reader sees the old file or the new one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = [
    "file_beside",
    "folder_beside",
    "folder_problem",
    "put_in_place",
    "replace_file",
    "replace_folder",
    "room_problem",
    "size_text",
    "write_atomically",
    "write_json",
]


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Replaces `path` with what `write` puts into the file that it receives. Makes missing folders.

    Raises:
        OSError: `path` cannot be written, or is not a regular file, such as a device. The old file is unchanged, and
            no temporary file remains. After a kill one may remain; the next call removes it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file; refusing to replace it", str(path))
    with file_beside(path) as (file, temporary):
        write(file)
        put_in_place(file, temporary, path)
    return path


def put_in_place(file: IO[bytes], temporary: Path, path: Path) -> None:
    """Syncs the file to disk, gives it the default permissions of a new file, and renames it to `path`."""
    file.flush()
    os.fsync(file.fileno())
    temporary.chmod(0o666 & ~_umask())
    os.replace(temporary, path)


@contextmanager
def file_beside(path: Path, suffix: str = "") -> Iterator[tuple[IO[bytes], Path]]:
    """Yields an open temporary file beside `path`, and its path. Removes it at the end, unless it was renamed.

    The file is locked while its writer lives. So a file without a lock was left by a killed writer, and is removed. On a
    file system without locks such files remain.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path, suffix)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "r+b") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yields a new temporary folder beside `path`, and removes it at the end.

    It is locked as in `file_beside`: a folder for `path` that a killed process has left is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        if left.is_dir() and time.time() - left.stat().st_mtime > _TIME_TO_LOCK:
            with contextlib.suppress(OSError), _locked(left):
                shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(made))
        with contextlib.suppress(OSError):  # a file system without locks
            stack.enter_context(_locked(folder))
        yield folder


def folder_problem(path: Path) -> str | None:
    """Why no file can be made in the folder `path`, which need not exist yet. None: it can."""
    there = next(one for one in (path.absolute(), *path.absolute().parents) if os.path.lexists(one))
    which = "" if there == path.absolute() else f"{there} "
    if not there.is_dir():
        return f"{which}is a file; name a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{which}cannot be written; name another folder"
    return None


def room_problem(path: Path, needed: int) -> str | None:
    """What is missing on the disk of `path`, which need not exist yet, if fewer than `needed` bytes are free there."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    amounts = f"{size_text(needed)} are needed, {size_text(free)} are free"
    return f"no room on the disk of {folder}: {amounts}, {size_text(needed - free)} are missing; free them, or name another disk"


def size_text(number: int) -> str:
    """Bytes in MB, or GB from 10 GB on."""
    return f"{number / 1e9:.1f} GB" if number >= 1e10 else f"{-(-number // 1_000_000):,} MB"


def replace_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Replaces the folder `path` with a new one that `write` fills. The new folder gets its name when it is complete.

    Raises:
        OSError: the folder cannot be written. The old folder is unchanged, and no temporary folder remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        write(new)
        for file in new.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def write_atomically(path: Path, content: bytes) -> Path:
    """Replaces `path` with `content`; see `replace_file`."""
    return replace_file(path, lambda file: file.write(content))


def write_json(path: Path, values: Mapping[str, Any]) -> Path:
    """Writes `values` as indented JSON; see `replace_file`."""
    return write_atomically(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _remove_left_behind(path: Path, suffix: str) -> None:
    """Removes unfinished files for `path` that no process has locked."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????{suffix}"):
        with contextlib.suppress(OSError), left.open("r+b") as file:  # NFS locks only a file that is open for writing
            if time.time() - left.stat().st_mtime > _TIME_TO_LOCK:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder. Raises OSError if another process holds it, or the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


# Seconds. A younger file may belong to a process that has not locked it yet.
_TIME_TO_LOCK = 10.0


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
