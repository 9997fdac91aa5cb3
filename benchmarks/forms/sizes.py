# SPDX-License-Identifier: Apache-2.0
"""The sizes of a Llama. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .form import Linear

__all__ = ["Sizes"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    eps: float
    theta: float

    @classmethod
    def of(cls, folder: Path) -> Sizes:
        """Reads config.json."""
        found = json.loads((folder / "config.json").read_text())
        heads = found["num_attention_heads"]
        return cls(
            layers=found["num_hidden_layers"],
            hidden=found["hidden_size"],
            ffn=found["intermediate_size"],
            heads=heads,
            groups=found.get("num_key_value_heads") or heads,
            head_dim=found.get("head_dim") or found["hidden_size"] // heads,
            eps=float(f"{found['rms_norm_eps']:.6g}"),  # a file from GGUF holds a float32
            theta=found.get("rope_theta", 10000.0),
        )

    @property
    def linears(self) -> dict[str, Linear]:
        """Megatron's four linears of a layer."""
        query, key = self.heads * self.head_dim, self.groups * self.head_dim
        return {
            "linear_qkv": Linear(self.hidden, query + 2 * key),
            "linear_proj": Linear(query, self.hidden),
            "linear_fc1": Linear(self.hidden, 2 * self.ffn),
            "linear_fc2": Linear(self.ffn, self.hidden),
        }
