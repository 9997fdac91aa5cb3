# SPDX-License-Identifier: Apache-2.0
"""Makes adapter files with random tensors without a model, and computes a layer's delta by the literal formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nemo_tied_lora import TiedLoraConfig
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.full_state import factors_of_layer
from nemo_tied_lora.adapter.rank_budget.masks import u_names
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.conversion.hf_families import BaseSizes
from tests.harness.tiny_gpt import full_tensor

__all__ = ["GPT2", "LLAMA", "delta", "pruned", "random_adapter"]

LLAMA: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 8,
    "activation": "fast-swiglu",
    "normalization": "rmsnorm",
    "position_embedding_type": "rope",
}
"""NeMo's keys for a Llama with query groups, and with heads wider than hidden / heads."""

GPT2: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "activation": "gelu",
    "normalization": "layernorm",
    "position_embedding_type": "learned_absolute",
}


def random_adapter(base: dict[str, Any], **fields: Any) -> AdapterFile:
    """An adapter in the form that `read_adapter` returns, in float32."""
    config, sizes = TiedLoraConfig.from_mapping({"rank": 3, **fields}), BaseSizes.from_model_config(base, "base")
    layers = tuple(range(sizes.num_layers)) if config.layers is None else tuple(config.layers)
    shapes = {target: dataclasses.replace(sizes.linears[target], layers=layers) for target in config.targets}
    state = {n: full_tensor(f"random {n}", s).float() for n, s in expected_shapes(config, shapes).items()}
    return AdapterFile(config, shapes, state, {"base": base})


def pruned(file: AdapterFile) -> AdapterFile:
    """The adapter with a rank budget's masks: linears of every rank from 0 to the whole one."""
    generator = torch.Generator().manual_seed(6)
    masks, state = {}, dict(file.state)
    for index, name in enumerate(u_names(file.shapes)):
        mask = torch.rand(file.config.rank, generator=generator) < (0.0, 0.5, 1.0)[index % 3]
        masks[name], state[name] = mask, state[name] * mask
    return dataclasses.replace(file, state=state, masks=masks)


def delta(file: AdapterFile, layer: int, target: str) -> torch.Tensor:
    """scale diag(v) B diag(u) A of one layer (out, in), float64, in Megatron's row order.

    The scale is peft's: alpha / r, or alpha / sqrt(r) by its `use_rslora`; 1 without alpha.
    """
    factors = {f: t.double() for f, t in factors_of_layer(file.config, file.state, layer, target).items()}
    u = factors.get("u", torch.ones(file.config.rank, dtype=torch.float64))
    v = factors.get("v", torch.ones(len(factors["B"]), dtype=torch.float64))
    alpha, rank = file.config.alpha, file.config.rank
    scale = 1.0 if alpha is None else alpha / (rank**0.5 if file.config.alpha_rule == "sqrt" else rank)
    return scale * torch.diag(v) @ factors["B"] @ torch.diag(u) @ factors["A"]
