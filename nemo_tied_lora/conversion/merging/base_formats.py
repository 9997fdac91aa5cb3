# SPDX-License-Identifier: Apache-2.0
"""Finds the weights in a base `.nemo`, in every format that NeMo has written, as a list of pieces.

=====================================  ===========================================================================
in the .nemo                           written by
=====================================  ===========================================================================
model_weights/.metadata, *.distcp      dist_checkpointing, torch_dist: NeMo 2.x, any layout
model_weights/NAME/.zarray, 0.0.0 ...  dist_checkpointing, zarr: NeMo 1.2x, any layout
model_weights.ckpt                     torch.save, one rank
mp_rank_00/..., tp_rank_00_pp_..._000  torch.save, one file per rank
=====================================  ===========================================================================

Distributed checkpoints hold whole tensors in Megatron's order: the weights of all layers stacked, a gated linear_fc1 as
[gate; up]. A rank's file holds its shards: [gate of this rank; up of this rank], with layers numbered within the stage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch

from nemo_tied_lora.conversion.merging.dcp_metadata import read_dcp_metadata
from nemo_tied_lora.conversion.merging.shards import Members, Piece
from nemo_tied_lora.conversion.merging.torch_archive import Record, StoredState, records_of
from nemo_tied_lora.errors import ConfigError

__all__ = ["find_pieces"]

_FOLDER = "model_weights/"
_RANK = re.compile(r"^(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/model_weights\.ckpt$")
_LINEAR = re.compile(r"^decoder\.layers\.(\d+)\.(self_attention\.linear_(?:qkv|proj)|mlp\.linear_fc[12])\.weight$")
_ROWS_SPLIT = ("linear_qkv", "linear_fc1")
_ZARR_DTYPES = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64, "bfloat16": torch.bfloat16}


def find_pieces(file: IO[bytes], members: Members, model: Mapping[str, Any]) -> list[Piece]:
    """Every floating-point weight of a distributed checkpoint, or the adaptable linears of a legacy one.

    Args:
        file: the `.nemo`, an uncompressed tar.
        members: the members of the tar.
        model: the base's model_config.yaml.

    Raises:
        ConfigError: the format is unknown, or a tensor's bytes are not stored unchanged.
    """
    ranks = {name: match for name in members if (match := _RANK.match(name))}
    if f"{_FOLDER}.metadata" in members:
        pieces = list(_torch_dist(file, members))
    elif any(name.startswith(_FOLDER) and name.endswith("/.zarray") for name in members):
        pieces = list(_zarr(file, members))
    elif ranks or "model_weights.ckpt" in members:
        pieces = list(_legacy(file, members, ranks, model))
    else:
        known = ", ".join(sorted(members)[:5])
        raise ConfigError([f"base: no weights in a known format (it holds {known}, ...)"])
    if not pieces:
        raise ConfigError(["base: it holds no weights"])
    return sorted(pieces, key=lambda piece: piece.position)


def _torch_dist(file: IO[bytes], members: Members) -> Iterator[Piece]:
    position, size = members[f"{_FOLDER}.metadata"]
    file.seek(position)
    metadata = read_dcp_metadata(file.read(size))
    for index, stored in metadata.storage_data.items():
        tensor = metadata.state_dict_metadata[index.fqn]
        chunks = getattr(tensor, "chunks", None)
        if chunks is None or not tensor.properties.dtype.is_floating_point:
            continue
        if getattr(stored, "transform_descriptors", None):
            raise ConfigError([f"base: {index.fqn} is stored compressed; save the base again without compression"])
        start, _ = _member(members, _FOLDER + stored.relative_path)
        sizes = next(tuple(chunk.sizes) for chunk in chunks if tuple(chunk.offsets) == tuple(index.offset))
        record = records_of(file, start + stored.offset, stored.length).get("data/0")
        piece = Piece(
            key=_short(index.fqn),
            dtype=tensor.properties.dtype,
            offset=tuple(index.offset),
            shape=sizes,
            position=record.position if record else 0,
            crc=record.crc if record else None,
        )
        if record is None or record.size != piece.num_bytes:
            raise ConfigError([f"base: {index.fqn} is not stored as plain bytes; save the base again"])
        yield piece


def _zarr(file: IO[bytes], members: Members) -> Iterator[Piece]:
    for name, (position, size) in members.items():
        if not name.startswith(_FOLDER) or not name.endswith("/.zarray"):
            continue
        folder = name.removesuffix(".zarray")
        key = _short(folder.removeprefix(_FOLDER).rstrip("/"))
        file.seek(position)
        array = json.loads(file.read(min(size, 1 << 16)))
        dtype, chunk = _ZARR_DTYPES.get(array["dtype"]), tuple(array["chunks"])
        if dtype is None:
            continue
        if array.get("compressor") or array.get("filters") or array.get("order") != "C":
            raise ConfigError([f"base: {key} is a compressed zarr array; save the base again with NeMo 2.x"])
        if any(whole % part for whole, part in zip(array["shape"], chunk, strict=True)):
            raise ConfigError([f"base: {key} is a zarr array with padded chunks; save the base again with NeMo 2.x"])
        separator = array.get("dimension_separator") or "."
        for part, (start, length) in members.items():
            if not part.startswith(folder) or part == name or "/" in part.removeprefix(folder).replace(separator, "."):
                continue
            place = tuple(int(number) for number in part.removeprefix(folder).split(separator))
            offset = tuple(number * width for number, width in zip(place, chunk, strict=True))
            piece = Piece(key, dtype, offset, chunk, start)
            if length != piece.num_bytes:
                raise ConfigError([f"base: {part} has {length} bytes, not {piece.num_bytes}"])
            yield piece


def _legacy(
    file: IO[bytes], members: Members, ranks: Mapping[str, re.Match[str]], model: Mapping[str, Any]
) -> Iterator[Piece]:
    """The linears in the ranks' files. Other weights have other names there than in a distributed checkpoint."""
    places = {name: (int(m[1] or m[2]), int(m[3] or 0)) for name, m in ranks.items()} or {"model_weights.ckpt": (0, 0)}
    tp_size, pp_size = (max(place[i] for place in places.values()) + 1 for i in (0, 1))
    if len(places) != tp_size * pp_size or model["num_layers"] % pp_size:
        raise ConfigError([f"base: {len(places)} ranks' files do not make up tensor {tp_size} x pipeline {pp_size}"])
    if model.get("virtual_pipeline_model_parallel_size"):
        raise ConfigError(["base: an interleaved pipeline's legacy checkpoint; save it again as a distributed one"])
    gated = str(model.get("activation", "")).endswith("glu")
    stage_layers = model["num_layers"] // pp_size
    for name, (tp_rank, pp_rank) in sorted(places.items()):
        start, size = _member(members, name)
        state = StoredState(file, start, size, f"base: {name}")
        for full_name, tensor in state.tensors.items():
            found = _LINEAR.match(_short(full_name))
            if found is None:
                continue
            layer = int(found[1]) + pp_rank * stage_layers
            key = f"decoder.layers.{layer}.{found[2]}.weight"
            blocks = 2 if gated and key.endswith("linear_fc1.weight") else 1
            yield from _legacy_pieces(key, tensor, state.record(full_name), tp_rank, tp_size, blocks)


def _legacy_pieces(
    key: str, tensor: torch.Tensor, record: Record, tp_rank: int, tp_size: int, blocks: int
) -> Iterator[Piece]:
    """A rank's shard of one linear (rows, columns), one piece per block."""
    if tensor.ndim != 2 or not tensor.is_contiguous():
        raise ConfigError([f"base: {key} is not stored row by row"])
    rows, columns = tensor.shape
    by_rows = any(target in key for target in _ROWS_SPLIT)
    height = rows // blocks
    for block in range(blocks):
        offset = ((block * tp_size + tp_rank) * height, 0) if by_rows else (0, tp_rank * columns)
        first = int(tensor.storage_offset()) + block * height * columns
        position = record.position + first * tensor.dtype.itemsize
        yield Piece(key, tensor.dtype, offset, (height, columns), position, record.crc)


def _member(members: Members, name: str) -> tuple[int, int]:
    if name not in members:
        raise ConfigError([f"base: {name} is missing"])
    return members[name]


def _short(key: str) -> str:
    return re.sub(r"^(module\.|model\.)*", "", key)
