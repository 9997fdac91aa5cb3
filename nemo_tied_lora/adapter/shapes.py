# SPDX-License-Identifier: Apache-2.0
"""A linear's whole shape, and which dims of its factors tensor parallelism splits. Torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LinearGroup", "TargetShape", "TargetSpec", "factor_shape", "local_shape", "sharded_dim"]


@dataclass(frozen=True)
class TargetShape:
    """One kind of linear of a model, whole (not one rank's shard).

    in_features, out_features: columns and rows of its weight. num_layers: how many selected layers have it.
    num_experts: how many such linears each of these layers has, 1 but for a mixture's experts.
    """

    in_features: int
    out_features: int
    num_layers: int
    num_experts: int = 1


@dataclass(frozen=True)
class TargetSpec:
    """One kind of linear, whole: what every rank of every stage must agree on.

    kind: "column" or "row". in_features, out_features: of the whole weight. blocks: 2 for a gated linear_fc1,
    else 1. layers: the global numbers (from 0) of the selected layers that have this target, over all stages.
    num_experts: linears of this kind in each of these layers, 1 but for a mixture's experts.
    """

    kind: str
    in_features: int
    out_features: int
    blocks: int
    layers: tuple[int, ...]
    num_experts: int = 1


def factor_shape(factor: str, spec: TargetSpec, rank: int) -> tuple[int, ...]:
    """The whole tensor's shape: A (r, in), B (out, r), u (r,), v (out,)."""
    return {
        "A": (rank, spec.in_features),
        "B": (spec.out_features, rank),
        "u": (rank,),
        "v": (spec.out_features,),
    }[factor]


def sharded_dim(factor: str, kind: str) -> int | None:
    """The tensor dim that tensor parallelism splits, None where every rank holds the whole tensor."""
    return {("B", "column"): 0, ("v", "column"): 0, ("A", "row"): 1}.get((factor, kind))


def local_shape(factor: str, spec: TargetSpec, rank: int, tp_size: int) -> tuple[int, ...]:
    """One rank's shape, as in the module's table."""
    shape = list(factor_shape(factor, spec, rank))
    dim = sharded_dim(factor, spec.kind)
    if dim is not None:
        shape[dim] //= tp_size
    return tuple(shape)


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one shape that may share A and B (see `experts`), whole, over all layers of a model."""

    in_features: int
    out_features: int
    layers: tuple[int, ...]
    num_experts: int = 1
