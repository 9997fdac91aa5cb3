# SPDX-License-Identifier: Apache-2.0
"""Merges adapters into a base `.nemo` in one pass over the file, with a few tens of megabytes beyond the adapters.

Copies the base, then reads each piece of each weight, adds it to the fingerprint, and writes it back if it is adapted.
The copy gets its name when all checks are done.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from nemo_tied_lora.adapter.weight_checksums import WeightChecksums
from nemo_tied_lora.checkpoint.base_identity import check_weights
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.conversion.merging.adapter_updates import Updates
from nemo_tied_lora.conversion.merging.base_formats import find_pieces
from nemo_tied_lora.conversion.merging.shards import CrcField, Piece, members_of
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import file_beside, put_in_place
from nemo_tied_lora.progress import Progress

__all__ = ["MergeReport", "merge_into"]

_SLAB = 16 << 20  # bytes of a weight in memory at a time
_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge."""

    changed: tuple[str, ...]
    """Names of the weights that were updated."""
    elements: int
    """How many elements have changed."""
    largest_change: float
    """The largest change of an element, before the cast to `dtype`."""
    dtype: str
    """Of the base's linears."""
    fingerprint: dict[str, Any]
    """Of the base."""


@contextmanager
def merge_into(
    output: Path,
    base: Path,
    model: Mapping[str, Any],
    adapters: Sequence[tuple[str, AdapterFile, float]],
    *,
    allow_other_base: bool = False,
) -> Iterator[tuple[Path, MergeReport]]:
    """Writes the merged model beside `output`, yields its path, and renames it if the `with` body raises no error.

    Args:
        base: a `.nemo`: a tar, a gzipped tar, or an unpacked folder.
        model: its model_config.yaml.
        adapters: (name for messages, file, weight).
        allow_other_base: see `base_identity.check_weights`.

    Raises:
        ConfigError: the base's format is unknown, an adapter does not fit it or was trained on other weights, or a
            merged weight is not finite. An older `output` is unchanged.
        OSError: the file cannot be written. An older `output` is unchanged.
    """
    updates = Updates(adapters)
    with file_beside(output, ".nemo") as (file, temporary):
        try:
            _copy(base, file)
            members = members_of(file)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ConfigError([f"base={base}: not a whole .nemo file: {error}"]) from error
        pieces = find_pieces(file, members, model)
        report = _rewrite(file, pieces, updates, _vocab_rows(adapters))
        updates.check_complete()
        for name, adapter, _ in adapters:
            _check_base(name, adapter, report.fingerprint, allow_other_base)
        file.flush()
        yield temporary, report
        put_in_place(file, temporary, output)


def _copy(base: Path, file: IO[bytes]) -> None:
    """Writes the base as an uncompressed tar."""
    if base.is_dir():
        with tarfile.open(fileobj=file, mode="w") as tar:
            for path in Progress(sorted(base.rglob("*")), desc="packing the base", unit="file"):
                tar.add(path, arcname=f"./{path.relative_to(base)}", recursive=False)
        return
    with open(base, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        source: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        with Progress(total=base.stat().st_size, desc="copying the base", unit="B", unit_scale=True) as bar:
            while block := source.read(_SLAB):
                file.write(block)
                bar.update(raw.tell() - bar.n)


def _rewrite(file: IO[bytes], pieces: Sequence[Piece], updates: Updates, vocab_rows: int | None) -> MergeReport:
    """Updates all weights in one pass."""
    sums, elements = WeightChecksums(), 0
    changed: dict[str, None] = {}
    dtypes: dict[str, None] = {}
    stale: dict[CrcField, None] = {}
    total = sum(piece.num_bytes for piece in pieces)
    with Progress(total=total, desc="merging", unit="B", unit_scale=True) as bar:
        for piece in pieces:
            adapted = updates.adapts(piece.key)
            for position, part, offset in _slabs(file, piece):
                seen = part
                if vocab_rows is not None and piece.key in _PADDED:
                    seen = part[: max(0, vocab_rows - offset[0])]
                sums.add(piece.key, seen, offset)
                bar.update(part.nbytes)
                if not adapted:
                    continue
                merged = updates.add(piece.key, part, offset)
                if not torch.equal(merged, part):
                    file.seek(position)
                    content: Any = merged.contiguous().reshape(-1).view(torch.uint8).numpy()
                    file.write(memoryview(content))
                    elements += merged.numel()
                    if piece.crc is not None:
                        stale[piece.crc] = None
            if adapted:
                changed[piece.key], dtypes[str(piece.dtype)] = None, None
    for field in stale:
        _renew(file, field)
    if len(dtypes) > 1:
        raise ConfigError([f"base: its linears are of different dtypes: {', '.join(dtypes)}"])
    dtype = next(iter(dtypes), "nothing")
    return MergeReport(tuple(changed), elements, updates.largest, dtype, sums.as_dict(vocab_rows))


def _slabs(file: IO[bytes], piece: Piece) -> Iterator[tuple[int, torch.Tensor, tuple[int, ...]]]:
    """(position, tensor, offset) of parts of whole rows, of about `_SLAB` bytes at most."""
    rows_dim = max(0, len(piece.shape) - 2)
    lead, rows = piece.shape[:rows_dim], piece.shape[rows_dim]
    row_bytes = piece.num_bytes // max(1, rows)
    height = rows if any(size != 1 for size in lead) else max(1, _SLAB // max(1, row_bytes))
    for first in range(0, rows, height):
        count = min(height, rows - first)
        position = piece.position + first * row_bytes
        file.seek(position)
        content = bytearray(file.read(count * row_bytes))
        if len(content) != count * row_bytes:
            raise ConfigError([f"base: truncated in {piece.key}"])
        tensor = torch.frombuffer(content, dtype=piece.dtype).reshape(*lead, count, *piece.shape[rows_dim + 1 :])
        offset = (*piece.offset[:rows_dim], piece.offset[rows_dim] + first, *piece.offset[rows_dim + 1 :])
        yield position, tensor, offset


def _renew(file: IO[bytes], field: CrcField) -> None:
    """Updates the archive's checksum of a changed record."""
    crc, left = 0, field.size
    file.seek(field.start)
    while left:
        block = file.read(min(_SLAB, left))
        crc, left = zlib.crc32(block, crc), left - len(block)
    for place in field.places:
        file.seek(place)
        file.write(crc.to_bytes(4, "little"))


def _vocab_rows(adapters: Sequence[tuple[str, AdapterFile, float]]) -> int | None:
    """The number of rows without padding in the fingerprint of the first adapter that records it; else None."""
    for _, file, _ in adapters:
        recorded = ((file.yaml.get("base") or {}).get("fingerprint") or {}).get("vocab_rows")
        if isinstance(recorded, int):
            return recorded
    return None


def _check_base(name: str, file: AdapterFile, found: Mapping[str, Any], allow_other_base: bool) -> None:
    """Compares the fingerprints of the weights that were read: all, or only the linears of a legacy checkpoint."""
    recorded = (file.yaml.get("base") or {}).get("fingerprint")
    if not recorded:
        return
    known, own = recorded.get("weights") or {}, found["weights"]
    common = {key: value for key, value in known.items() if key in own}
    if any(own[key] != value for key, value in common.items()):
        differing = {key: own[key] for key in common}
        check_weights(
            {"fingerprint": {"value": recorded.get("value"), "weights": common}},
            {"fingerprint": {"value": found["value"], "weights": differing}},
            name,
            allow_other_base=allow_other_base,
        )
