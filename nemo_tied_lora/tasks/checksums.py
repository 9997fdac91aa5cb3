# SPDX-License-Identifier: Apache-2.0
"""Tells files of models apart by their bytes."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

__all__ = ["file_checksum"]

_WHOLE_BYTES = 2 << 30
"""A larger file is sampled: hashing takes about a second for each GiB."""
_SAMPLES, _SAMPLE_BYTES = 1024, 256 << 10


def file_checksum(path: Path) -> str:
    """The first 16 digits of a SHA-256 of a file, or of all files in a folder with their names.

    Of a file of more than 2 GiB, its size and 1024 pieces of 256 KiB at equal distances count.

    Raises:
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        found = path.stat()
        return _checksum(str(path), found.st_size, found.st_mtime_ns)[:16]
    whole = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()} {file_checksum(file)}\n".encode())
    return whole.hexdigest()[:16]


@lru_cache(maxsize=64)
def _checksum(path: str, size: int, modified_ns: int) -> str:
    """Cached, because a command asks several times.

    Args:
        size, modified_ns: the file's, so that a changed file is read again.
    """
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _WHOLE_BYTES:
            while piece := file.read(1 << 20):
                checksum.update(piece)
        else:
            checksum.update(str(size).encode())
            for number in range(_SAMPLES):
                file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                checksum.update(file.read(_SAMPLE_BYTES))
    return checksum.hexdigest()
