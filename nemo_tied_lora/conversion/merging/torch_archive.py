# SPDX-License-Identifier: Apache-2.0
"""Where `torch.save` put the bytes: a zip whose records are stored as they are, one for each tensor's storage."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_tied_lora.checkpoint.tensors_only import load_tensors
from nemo_tied_lora.conversion.merging.shards import CrcField, View
from nemo_tied_lora.errors import ConfigError

__all__ = ["Record", "StoredState", "records_of"]

_LOCAL, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"


@dataclass(frozen=True)
class Record:
    """A record's content in the file that holds the archive, and its checksum."""

    position: int
    size: int
    crc: CrcField


class StoredState:
    """The state dict in the archive in `file[start : start + size]`, of which no tensor's content is read.

    torch loads under `FakeTensorMode` everything but contents, and since 2.7 notes on each storage where it lies:
    https://docs.pytorch.org/tutorials/unstable/gpu_direct_storage.html.

    Args:
        what: what the user calls the archive, for messages.

    Raises:
        ConfigError: no archive of torch.save's, no state dict, or one that holds more than tensors and plain values.
    """

    def __init__(self, file: IO[bytes], start: int, size: int, what: str) -> None:
        self._start, self._what = start, what
        self._records = {record.position: record for record in records_of(file, start, size).values()}
        view: Any = View(file, start, size)
        with FakeTensorMode():
            state = load_tensors(view, what)
        if not isinstance(state, Mapping):
            raise ConfigError([f"{what}: holds no state dict"])
        self.tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
        """Name to a tensor with its dtype, shape, strides and place in the storage; without content."""

    def record(self, name: str) -> Record:
        """The record that holds a tensor's storage, whole.

        Raises:
            ConfigError: the storage does not lie in the archive as it is, or this torch does not say where.
        """
        storage = self.tensors[name].untyped_storage()
        offset = getattr(storage, "_checkpoint_offset", None)
        if offset is None:
            raise ConfigError(
                [f"{self._what}: torch {torch.__version__} does not say where {name} lies; use torch 2.7 or later"]
            )
        record = self._records.get(self._start + offset)
        if record is None or record.size < storage.nbytes():
            raise ConfigError([f"{self._what}: {name} does not lie in the checkpoint as it is"])
        return record


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
