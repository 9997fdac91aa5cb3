# SPDX-License-Identifier: Apache-2.0
"""Reads and writes tars of a few regular files; reading is strict.

It refuses links, folders, devices, sparse files, long names, compression and members with other names before it reads
their content. It unpacks nothing to disk. It reads 512 bytes per member, whatever sizes the headers claim.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO

__all__ = [
    "Member",
    "TarError",
    "end_tar",
    "find_members",
    "has_member",
    "member_header",
    "pad_member",
    "tar_bytes",
    "write_tar",
]


BLOCK, _RECORD = 512, 10240
_MAX_HEADERS = 16
_MAX_PAX_BYTES = 64 * 1024
# Records of an extended header that do not change where the content is.
_HARMLESS_PAX = re.compile(r"^(mtime|atime|ctime|comment|uid|gid|uname|gname|SCHILY\.(dev|ino|nlink))$")


class TarError(ValueError):
    """The file is not a tar of the expected members. The message says why."""


@dataclass(frozen=True)
class Member:
    """Where a member's content is in the tar."""

    offset: int
    size: int


def find_members(file: IO[bytes], names: Collection[str]) -> dict[str, Member]:
    """Finds the members of the tar. It may hold each of `names` (with or without a leading "./") once, and nothing else.

    Raises:
        TarError: a damaged header, an unexpected member, or a member that is longer than the file.
    """
    end = file.seek(0, 2)
    members: dict[str, Member] = {}
    for info, content in _headers(file):
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            _check_pax(file.read(min(info.size, _MAX_PAX_BYTES + 1)))
        else:
            name = info.name.removeprefix("./")
            if name not in names or info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or name in members:
                raise TarError(f"unexpected member {info.name[:200]!r}; not a tied-LoRA adapter")
            members[name] = Member(content, info.size)
        if content + info.size > end:
            raise TarError(f"truncated: {info.name[:200]!r} claims {info.size} bytes, the file has {end - content}")
    if not members:
        raise TarError(f"not a whole .nemo file: {'no members' if end else 'empty'}")
    return members


def has_member(file: IO[bytes], name: str) -> bool:
    """Returns whether one of the first members has this name; False if the file is not a tar."""
    try:
        return any(info.name.removeprefix("./") == name for info, _ in _headers(file))
    except TarError:
        return False


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member's content, without time and owner: the same content gives the same file."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(format=tarfile.USTAR_FORMAT if size < 8 << 30 else tarfile.GNU_FORMAT)


def pad_member(size: int) -> bytes:
    """The zeros after a member's content."""
    return b"\0" * (-size % BLOCK)


def end_tar(position: int) -> bytes:
    """The zeros that end a tar of `position` bytes."""
    return b"\0" * (2 * BLOCK + -(position + 2 * BLOCK) % _RECORD)


def tar_bytes(sizes: Iterable[int]) -> int:
    """The size of a tar that holds members of these sizes."""
    position = sum(BLOCK + size + len(pad_member(size)) for size in sizes)
    return position + len(end_tar(position))


def write_tar(file: IO[bytes], members: Mapping[str, bytes]) -> None:
    """Writes an uncompressed tar, like NeMo's."""
    for name, content in members.items():
        file.write(member_header(name, len(content)) + content + pad_member(len(content)))
    file.write(end_tar(file.tell()))


def _headers(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yields (header, start of the content) of every member. The file's position is then the start of the content."""
    position = 0
    for _ in range(_MAX_HEADERS):
        file.seek(position)
        block = file.read(BLOCK)
        if not block.strip(b"\0"):
            return
        info = _parse(block, position)
        yield info, position + BLOCK
        position += BLOCK + info.size + len(pad_member(info.size))
    raise TarError(f"more than {_MAX_HEADERS} members; not a tied-LoRA adapter")


def _parse(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if block.startswith(b"\x1f\x8b"):
            raise TarError("not a whole .nemo file: it is compressed with gzip; unpack it with gunzip") from None
        raise TarError(f"not a whole .nemo file: bad tar header at byte {position}: {error}") from None
    if info.size < 0:
        raise TarError(f"not a whole .nemo file: {info.name[:200]!r} claims {info.size} bytes")
    return info


def _check_pax(content: bytes) -> None:
    """Refuses extended headers that would rename, resize or redirect the next member."""
    if len(content) > _MAX_PAX_BYTES:
        raise TarError(f"an extended tar header of more than {_MAX_PAX_BYTES} bytes")
    for key in _pax_keys(content):
        if not _HARMLESS_PAX.match(key):
            raise TarError(f"unexpected extended tar header {key[:100]!r}; not a tied-LoRA adapter")


def _pax_keys(content: bytes) -> list[str]:
    keys, position = [], 0
    while position < len(content) and content[position : position + 1] != b"\0":
        length = re.match(rb"(\d{1,6}) ([^=]{1,200})=", content[position : position + 300])
        if length is None or int(length[1]) < len(length[0]) or position + int(length[1]) > len(content):
            raise TarError("not a whole .nemo file: a damaged extended tar header")
        keys.append(length[2].decode("utf-8", "replace"))
        position += int(length[1])
    return keys
