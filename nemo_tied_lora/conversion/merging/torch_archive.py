# SPDX-License-Identifier: Apache-2.0
"""Locates the bytes of tensors in a file of `torch.save`: a zip with one uncompressed record per tensor storage."""

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
    """The place of a record's content in the file that holds the archive, and its checksum."""

    position: int
    size: int
    crc: CrcField


class StoredState:
    """The state dict in the archive `file[start : start + size]`, without the content of its tensors.

    Under `FakeTensorMode` torch loads everything except contents. Since 2.7 it records the offset of each storage:
    https://docs.pytorch.org/tutorials/unstable/gpu_direct_storage.html.

    Args:
        what: the archive's name for messages.

    Raises:
        ConfigError: `torch.save` did not write the archive, or it is not a state dict of tensors and plain values.
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
        """Name to a tensor with dtype, shape, strides and storage offset, but without content."""

    def record(self, name: str) -> Record:
        """The record that holds a tensor's whole storage.

        Raises:
            ConfigError: no record holds the whole storage, or this torch does not report its offset.
        """
        storage = self.tensors[name].untyped_storage()
        offset = getattr(storage, "_checkpoint_offset", None)
        if offset is None:
            raise ConfigError(
                [f"{self._what}: torch {torch.__version__} cannot report where {name} is; use torch 2.7 or later"]
            )
        record = self._records.get(self._start + offset)
        if record is None or record.size < storage.nbytes():
            raise ConfigError([f"{self._what}: {name} is not stored as plain bytes; save the base again"])
        return record


def records_of(file: IO[bytes], start: int, size: int) -> dict[str, Record]:
    """Name (without the archive's top folder) to record, for the archive `file[start : start + size]`.

    Raises:
        ConfigError: it is not a zip archive, or a record is compressed or damaged.
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
    """Where a record's checksum is: in the central directory, and in the local header or after the content."""
    if not struct.unpack("<H", local[6:8])[0] & 8:
        return central + 16, header + 14
    signed = _read(file, end, 4) == _DESCRIPTOR
    return central + 16, end + (4 if signed else 0)


def _read(file: IO[bytes], position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)
