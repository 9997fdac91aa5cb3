# SPDX-License-Identifier: Apache-2.0
"""Reads files from a `.nemo` that NeMo wrote: a tar, plain or compressed. Unpacks nothing to disk, and unpickles nothing.

`NemoFiles` notices a file that was cut off anywhere. It reads the headers alone, so a plain tar of 100 GB takes
milliseconds. `checkpoint.tar` reads this package's own adapters, more strictly.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["NemoFiles", "read_members"]

_AGAIN = "copy it again"
_MAGIC = {"gz": b"\x1f\x8b", "bz2": b"BZh", "xz": b"\xfd7zXZ"}
_BLOCK = 512  # bytes; two blocks of zeros end a tar


def read_members(path: Path, names: Collection[str], max_bytes: int) -> dict[str, bytes]:
    """Returns the contents of the named regular files. Leaves out names that the tar does not have.

    It stops reading after the last of them, because a base's tar is as large as its model.

    Args:
        names: without a leading "./".
        max_bytes: the largest size that one of them may claim, so that a small tar cannot fill the memory.

    Raises:
        tarfile.TarError: not a tar, or damaged, or a file claims more than `max_bytes`.
        OSError: the file cannot be read.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if name not in names or not info.isreg():
                    continue
                if info.size > max_bytes:
                    raise tarfile.ReadError(f"its {name} claims {info.size} bytes")
                found[name] = tar.extractfile(info).read()  # type: ignore[union-attr]
                if len(found) == len(names):
                    break
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise tarfile.ReadError(str(error)) from error
    return found


class NemoFiles:
    """The files of a `.nemo`, packed or unpacked, without their contents. A packed one is whole.

    A plain tar is walked from header to header. A compressed one has to be decompressed to its end.

    Raises:
        tarfile.TarError: not a tar, or it ends early: in a header, in a file's content, or before its end marker.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offsets = path, {}
        if path.is_dir():
            inside = [entry for entry in path.rglob("*") if entry.is_file()]
            self.sizes = {entry.relative_to(path).as_posix(): entry.stat().st_size for entry in inside}
            self.can_seek = True
            return
        found = path.stat()
        members = _members(str(path), found.st_size, found.st_mtime_ns)
        self._offsets = {name: offset for name, (offset, _) in members.items()}
        self.sizes = {name: size for name, (_, size) in members.items()}
        """Name, without a leading "./", to size in bytes."""
        self.can_seek = _mode(str(path)) == "r:"
        """Whether a part of a file can be read without reading all before it."""

    def read(self, name: str, start: int, count: int) -> bytes:
        """Reads a part of a file. A negative start counts from the end. Only if `can_seek`."""
        size = self.sizes[name]
        first = max(0, size + start) if start < 0 else start
        path = self._path / name if self._path.is_dir() else self._path
        with path.open("rb") as file:
            file.seek(self._offsets.get(name, 0) + first)
            return file.read(max(0, min(count, size - first)))


@lru_cache(maxsize=16)
def _members(path: str, size: int, modified_ns: int) -> Mapping[str, tuple[int, int]]:
    """The first byte and the size of each regular file in a tar. Cached, because a command asks several times.

    Args:
        size, modified_ns: the tar's, so that a changed tar is read again.
    """
    found: dict[str, tuple[int, int]] = {}
    last: tarfile.TarInfo | None = None
    try:
        with tarfile.open(path, _mode(path)) as tar:
            for last in tar:
                if last.isreg():
                    found[last.name.removeprefix("./")] = (last.offset_data, last.size)
            _check_end(tar, size)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise tarfile.ReadError(f"cut off or damaged: {error}; {_AGAIN}") from error
    except tarfile.ReadError as error:
        if last is None:
            raise tarfile.ReadError(f"not a whole tar: {error}; {_AGAIN}") from error
        if str(error) in ("truncated header", "empty header"):
            after = last.name.removeprefix("./")
            raise tarfile.ReadError(f"cut off: in the header after {after}, at byte {size:,}; {_AGAIN}") from error
        if "end of data" not in str(error):
            raise
        left = max(0, size - last.offset_data)
        what = f"{last.name.removeprefix('./')} has {last.size:,} bytes, but the file ends after {left:,} of them"
        raise tarfile.ReadError(f"cut off: {what}; {_AGAIN}") from error
    return found


def _mode(path: str) -> Any:
    """tarfile's mode for the file. Left to itself, tarfile tries all, and reports each failure."""
    with open(path, "rb") as file:
        head = file.read(6)
    return next((f"r:{name}" for name, magic in _MAGIC.items() if head.startswith(magic)), "r:")


def _check_end(tar: Any, size: int) -> None:
    """Checks what follows the last file. tarfile itself takes a tar that ends at, or in, a header for a whole one."""
    file, end = tar.fileobj, tar.offset
    file.seek(end)
    rest = file.read(2 * _BLOCK)
    if rest.strip(b"\0") and len(rest) >= _BLOCK:
        raise tarfile.ReadError(f"damaged: no header of a tar at byte {end:,}; {_AGAIN}")
    if len(rest) < 2 * _BLOCK or rest.strip(b"\0"):
        raise tarfile.ReadError(
            f"cut off: it ends at byte {end + len(rest):,}, before the end marker of a tar; {_AGAIN}"
        )
    if isinstance(file, gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile):
        while file.read(1 << 20):  # the stream's own end has a checksum
            pass
    elif size % _BLOCK:
        raise tarfile.ReadError(f"cut off: it has {size:,} bytes, not a multiple of {_BLOCK}; {_AGAIN}")
