# SPDX-License-Identifier: Apache-2.0
"""Cuts whole factors into tensor-parallel shards and puts shards together; `shapes` says which rank holds what.

The shards of a gated linear_fc1 are ordered as the base's weight: the whole tensor is [gate; up], a shard is
[gate of this rank; up of this rank].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_tied_lora.adapter.shapes import LinearShape

__all__ = ["shard", "unshard"]


def shard(full: torch.Tensor, factor: str, shape: LinearShape, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This rank's part of a whole tensor (a copy, contiguous)."""
    dim = shape.sharded_dim(factor)
    if dim is None or tp_size == 1:
        return full.clone()
    blocks = full.chunk(shape.blocks_of(factor), dim)
    return torch.cat([block.chunk(tp_size, dim)[tp_rank] for block in blocks], dim).contiguous()


def unshard(shards: Sequence[torch.Tensor], factor: str, shape: LinearShape) -> torch.Tensor:
    """The whole tensor from every tensor-parallel rank's part, in rank order. The inverse of `shard`."""
    dim = shape.sharded_dim(factor)
    if dim is None or len(shards) == 1:
        return shards[0].clone()
    pieces = [part.chunk(shape.blocks_of(factor), dim) for part in shards]
    return torch.cat([part for block in zip(*pieces, strict=True) for part in block], dim)
