# SPDX-License-Identifier: Apache-2.0
"""A small GPT for planning, whose sizes all differ: heads of 6, grouped queries, a gated MLP."""

from __future__ import annotations

from typing import Any

from nemo_tied_lora.planning.architecture import Architecture

__all__ = ["SMALL", "small"]

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 20,
    "ffn_hidden_size": 44,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 6,
    "activation": "fast-swiglu",
    "encoder_seq_length": 16,
    "override_vocab_size": 100,
}


def small(**changes: Any) -> Architecture:
    """The architecture of `SMALL`, with some keys changed."""
    return Architecture.from_model_config({**SMALL, **changes})
