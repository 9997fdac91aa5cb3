# SPDX-License-Identifier: Apache-2.0
"""The shape of a linear, the shapes of its factors, and how tensor parallelism splits them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LinearShape", "attention_linears", "mlp_linears"]

_SHARDED_DIM = {("column", "B"): 0, ("column", "v"): 0, ("row", "A"): 1}


@dataclass(frozen=True)
class LinearShape:
    """One group of linears of a model (see `experts`), whole: not one rank's shard, and over all pipeline stages.

    With T = tensor parallel size, each rank holds of the group's factors

    =======  ===========  ===========  ====  ========
    kind     A            B            u     v
    =======  ===========  ===========  ====  ========
    column   (r, in)      (out/T, r)   (r)   (out/T)
    row      (r, in/T)    (out, r)     (r)   (out)
    =======  ===========  ===========  ====  ========

    linear_qkv and linear_fc1 are column-parallel, linear_proj and linear_fc2 row-parallel.
    """

    kind: str
    """ "column" or "row"."""
    in_features: int
    """Columns of the weight."""
    out_features: int
    """Rows of the weight."""
    num_blocks: int
    """2 for a gated linear_fc1, whose rows are [gate; up]; else 1."""
    layers: tuple[int, ...]
    """The layers, numbered globally from 0, that have such linears; for an adapter, the selected ones."""
    num_experts: int = 1
    """How many such linears each of these layers has: more than 1 only for routed experts."""

    @property
    def sides(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.in_features, self.out_features

    @property
    def num_linears(self) -> int:
        """Over all layers and experts."""
        return len(self.layers) * self.num_experts

    def factor_shape(self, factor: str, rank: int) -> tuple[int, ...]:
        """The whole tensor's shape: A (r, in), B (out, r), u (r,), v (out,)."""
        return {
            "A": (rank, self.in_features),
            "B": (self.out_features, rank),
            "u": (rank,),
            "v": (self.out_features,),
        }[factor]

    def sharded_dim(self, factor: str) -> int | None:
        """The tensor dim that tensor parallelism splits; None if every rank holds the whole tensor."""
        return _SHARDED_DIM.get((self.kind, factor))

    def local_factor_shape(self, factor: str, rank: int, tp_size: int) -> tuple[int, ...]:
        """The shape of one rank's part, as in the table above."""
        dim = self.sharded_dim(factor)
        return tuple(n // tp_size if i == dim else n for i, n in enumerate(self.factor_shape(factor, rank)))

    def blocks_of(self, factor: str) -> int:
        """How many blocks the sharded dim has; each rank holds an equal part of each block."""
        return self.num_blocks if factor in ("B", "v") else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the keys that files use."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "blocks": self.num_blocks,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> LinearShape:
        """The inverse of `to_dict`. Checks no values.

        Raises:
            KeyError, TypeError: a key is missing or unknown.
        """
        values = dict(stored)
        return cls(num_blocks=values.pop("blocks"), layers=tuple(values.pop("layers")), **values)


def attention_linears(
    hidden_size: int, query_width: int, key_width: int, layers: Sequence[int]
) -> dict[str, LinearShape]:
    """The attention's linears. query_width, key_width: all heads of Q together, and all of K (or V)."""
    return {
        "linear_qkv": LinearShape("column", hidden_size, query_width + 2 * key_width, 1, tuple(layers)),
        "linear_proj": LinearShape("row", query_width, hidden_size, 1, tuple(layers)),
    }


def mlp_linears(
    hidden_size: int, ffn_hidden_size: int, gated: bool, layers: Sequence[int], num_experts: int = 1
) -> dict[str, LinearShape]:
    """An MLP's linears. ffn_hidden_size: the width inside, after the gate."""
    num_blocks = 2 if gated else 1
    rows = num_blocks * ffn_hidden_size
    return {
        "linear_fc1": LinearShape("column", hidden_size, rows, num_blocks, tuple(layers), num_experts),
        "linear_fc2": LinearShape("row", ffn_hidden_size, hidden_size, 1, tuple(layers), num_experts),
    }
