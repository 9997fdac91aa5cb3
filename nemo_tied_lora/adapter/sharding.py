# SPDX-License-Identifier: Apache-2.0
"""Which rank holds which part of A, B, u and v under tensor parallelism.

With T = tensor parallel size, a target's factors lie on each rank as

=============  ==================  ==================  =======  =========
kind           A                   B                   u        v
=============  ==================  ==================  =======  =========
column         (r, in)             (out/T, r)          (r)      (out/T)
row            (r, in/T)           (out, r)            (r)      (out)
=============  ==================  ==================  =======  =========

Column-parallel linears are linear_qkv and linear_fc1, row-parallel ones linear_proj and linear_fc2. A gated
linear_fc1 holds a half of gate and a half of up on each rank (`blocks` = 2): whole tensors are ordered
[gate; up], shards are [gate of this rank; up of this rank], by the base weight's own rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_tied_lora.adapter.shapes import TargetSpec, sharded_dim

__all__ = ["shard", "unshard"]


def shard(full: torch.Tensor, factor: str, spec: TargetSpec, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This rank's part of a whole tensor (a copy, contiguous)."""
    dim = sharded_dim(factor, spec.kind)
    if dim is None or tp_size == 1:
        return full.clone()
    blocks = full.chunk(_blocks(factor, spec), dim)
    return torch.cat([block.chunk(tp_size, dim)[tp_rank] for block in blocks], dim).contiguous()


def unshard(shards: Sequence[torch.Tensor], factor: str, spec: TargetSpec) -> torch.Tensor:
    """The whole tensor from every tensor-parallel rank's part, in rank order. The inverse of `shard`."""
    dim = sharded_dim(factor, spec.kind)
    if dim is None or len(shards) == 1:
        return shards[0].clone()
    num_blocks = _blocks(factor, spec)
    pieces = [part.chunk(num_blocks, dim) for part in shards]
    return torch.cat([pieces[rank][block] for block in range(num_blocks) for rank in range(len(shards))], dim)


def _blocks(factor: str, spec: TargetSpec) -> int:
    return spec.blocks if factor in ("B", "v") else 1
