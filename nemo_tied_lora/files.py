# SPDX-License-Identifier: Apache-2.0
"""Files are written beside the target and renamed: a reader meets the old file or the new one, never half of one."""

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

__all__ = ["file_beside", "put_in_place", "replace_file", "replace_folder", "write_atomically", "write_json"]


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Replaces `path` by what `write` puts into the file it is given, made durable first; folders are made.

    Raises:
        OSError: it cannot be written, or is a device or the like, which a rename would put an end to; whatever goes
            wrong, the old file is intact, and nothing is left beside it (but by a kill, until the next call).
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "is no plain file, and would be replaced by one", str(path))
    with file_beside(path) as (file, temporary):
        write(file)
        put_in_place(file, temporary, path)
    return path


def put_in_place(file: IO[bytes], temporary: Path, path: Path) -> None:
    """Makes what was written durable, and gives the file its name, with the permissions of any new file."""
    file.flush()
    os.fsync(file.fileno())
    temporary.chmod(0o666 & ~_umask())
    os.replace(temporary, path)


@contextmanager
def file_beside(path: Path, suffix: str = "") -> Iterator[tuple[IO[bytes], Path]]:
    """An open file beside `path` and its name, removed at the end unless it was renamed; folders are made.

    It is locked as long as its writer lives. What a killed writer left is known by the lock's absence, and removed;
    where the file system has no locks, it stays.
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


def replace_folder(path: Path, write: Callable[[Path], object]) -> Path:
    """Replaces the folder `path` by the one that `write` fills, which stands beside it until it is whole.

    Raises:
        OSError: it cannot be written; whatever goes wrong, the old folder is intact, and nothing is left beside it.
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
    """Replaces `path` by `content`; see `replace_file`."""
    return replace_file(path, lambda file: file.write(content))


def write_json(path: Path, values: Mapping[str, Any]) -> Path:
    """`values` as indented JSON."""
    return write_atomically(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _remove_left_behind(path: Path, suffix: str) -> None:
    """Unfinished files for `path` that no process holds."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????{suffix}"):
        with contextlib.suppress(OSError), left.open("r+b") as file:  # NFS locks only what may be written
            if time.time() - left.stat().st_mtime > _TIME_TO_LOCK:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


# Seconds: another process may just have made its file.
_TIME_TO_LOCK = 10.0


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
