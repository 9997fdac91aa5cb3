# SPDX-License-Identifier: Apache-2.0
"""Types that locate the raw bytes of each weight in a base `.nemo`, saved on any layout.

A `.nemo` is a tar that holds tensors as uncompressed, contiguous bytes. A merged weight has the same dtype and shape, so
it replaces these bytes, and the rest of the file is unchanged.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

import torch

__all__ = ["CrcField", "Members", "Piece", "View", "members_of"]


@dataclass(frozen=True)
class CrcField:
    """A stored checksum over `size` bytes from `start`, and the positions where the file holds it."""

    start: int
    size: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A part of one weight, row-major, without gaps."""

    key: str
    """The weight's name in a distributed checkpoint, without "model."."""
    dtype: torch.dtype
    offset: tuple[int, ...]
    """The position of its first element in the whole weight."""
    shape: tuple[int, ...]
    """As many dims as `offset`; dims that count layers may be 1."""
    position: int
    """Its first byte in the file."""
    crc: CrcField | None = None
    """The checksum that covers it, if there is one."""

    @property
    def num_bytes(self) -> int:
        """The number of bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class View(io.RawIOBase):
    """A part of a file, as a readable file."""

    def __init__(self, file: IO[bytes], start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._start + self._at)
        content = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


Members = Mapping[str, tuple[int, int]]
"""Member name, without a leading "./", to (its first byte in the tar, its size)."""


def members_of(file: IO[bytes]) -> Members:
    """The regular files in an uncompressed tar.

    Raises:
        tarfile.TarError: the file is not an uncompressed tar.
    """
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return {info.name.removeprefix("./"): (info.offset_data, info.size) for info in tar if info.isreg()}
