# SPDX-License-Identifier: Apache-2.0
"""Where `torch.save` put the bytes: a zip whose records are stored as they are."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from typing import IO, Any

from nemo_tied_lora.conversion.merging.shards import CrcField, View
from nemo_tied_lora.errors import ConfigError

__all__ = ["Record", "records_of"]

_LOCAL, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"


@dataclass(frozen=True)
class Record:
    """A record's content in the file that holds the archive, and its checksum."""

    position: int
    size: int
    crc: CrcField


def records_of(file: IO[bytes], start: int, size: int) -> dict[str, Record]:
    """Name (without the archive's own folder) to record, of the archive in `file[start : start + size]`.

    Raises:
        ConfigError: a record is compressed, or the archive is none.
    """
    view: Any = View(file, start, size)
    try:
        with zipfile.ZipFile(view) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except zipfile.BadZipFile as error:
        raise ConfigError([f"base: a tensor that was not written by torch.save: {error}"]) from error
    records = {}
    at = start + directory
    for info in infos:
        central = _read(file, at, 46)
        if central[:4] != _CENTRAL or info.compress_type != zipfile.ZIP_STORED:
            raise ConfigError([f"base: record {info.filename!r} of a tensor's archive is compressed or damaged"])
        header = start + info.header_offset
        local = _read(file, header, 30)
        if local[:4] != _LOCAL:
            raise ConfigError([f"base: record {info.filename!r} of a tensor's archive is damaged"])
        content = header + 30 + sum(struct.unpack("<HH", local[26:30]))
        places = _crc_places(file, at, header, local, content + info.file_size)
        records[info.filename.partition("/")[2]] = Record(
            content, info.file_size, CrcField(content, info.file_size, places)
        )
        at += 46 + sum(struct.unpack("<HHH", central[28:34]))
    return records


def _crc_places(file: IO[bytes], central: int, header: int, local: bytes, end: int) -> tuple[int, ...]:
    """In the central directory, and in the local header or behind the content."""
    if not struct.unpack("<H", local[6:8])[0] & 8:
        return central + 16, header + 14
    signed = _read(file, end, 4) == _DESCRIPTOR
    return central + 16, end + (4 if signed else 0)


def _read(file: IO[bytes], position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)
