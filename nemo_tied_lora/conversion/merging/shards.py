# SPDX-License-Identifier: Apache-2.0
"""Where each weight's raw bytes lie in a base `.nemo`, whatever layout it was saved on.

A `.nemo` is a tar; its weights are tensors that lie in it uncompressed and contiguous. A merged weight has the bytes'
own dtype and shape, so it fits into the same place, and nothing else of the file has to be understood.
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
    """A stored checksum that covers `size` bytes from `start`, and the places where it is written."""

    start: int
    size: int
    places: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A part of one weight, row-major, without gaps.

    key: the weight's name in a distributed checkpoint, without "model.". offset: of its first element in the whole
    weight; shape: as many dims, the first ones 1 where they count layers. position: its first byte in the file.
    crc: the checksum that covers it, if there is one.
    """

    key: str
    dtype: torch.dtype
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    position: int
    crc: CrcField | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class View(io.RawIOBase):
    """A part of a file as a file of its own."""

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
"""Name without a leading "./" to (first byte in the tar, size)."""


def members_of(file: IO[bytes]) -> Members:
    """The plain files of an uncompressed tar.

    Raises:
        tarfile.TarError: it is none.
    """
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return {info.name.removeprefix("./"): (info.offset_data, info.size) for info in tar if info.isreg()}
