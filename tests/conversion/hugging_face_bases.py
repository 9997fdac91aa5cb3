# SPDX-License-Identifier: Apache-2.0
"""Random models of transformers with the shapes of `tests.harness.random_adapters`' bases, and their logits."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from tests.harness.random_adapters import GPT2, delta

__all__ = ["hugging_face_model", "logits", "with_deltas"]

VOCAB = 40


def hugging_face_model(base: dict[str, Any]) -> Any:
    """A random model of `transformers` with the base's shapes."""
    torch.manual_seed(5)
    sizes = {"vocab_size": VOCAB, "attn_implementation": "eager"}
    if base is GPT2:
        config: Any = transformers.GPT2Config(n_embd=24, n_inner=40, n_head=4, n_layer=3, n_positions=16, **sizes)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=4,
        **sizes,
    )
    return transformers.LlamaForCausalLM(config).eval()


def with_deltas(base: dict[str, Any], file: AdapterFile) -> Any:
    """The model with every delta added to its weights. Splits heads by hand, without the row table under test."""
    model, heads = hugging_face_model(base), base["num_attention_heads"]
    groups, size = base.get("num_query_groups", heads), base.get("kv_channels", 24 // heads)
    for target, shape in file.shapes.items():
        for layer in shape.layers:
            rows = delta(file, layer, target).float()
            if target == "linear_qkv":
                blocks = [block.split([heads // groups * size, size, size]) for block in rows.chunk(groups)]
                q, k, v = (torch.cat([block[i] for block in blocks]) for i in range(3))
                rows_of = {"q_proj": q, "k_proj": k, "v_proj": v, "c_attn": torch.cat([q, k, v])}
            elif target == "linear_fc1":
                rows_of = {"gate_proj": rows[:40], "up_proj": rows[40:], "c_fc": rows}
            else:
                rows_of = {"linear_proj": {"o_proj": rows}, "linear_fc2": {"down_proj": rows}}[target]
            block = model.transformer.h[layer] if base is GPT2 else model.model.layers[layer]
            names = {"linear_proj": "attn.c_proj", "linear_fc2": "mlp.c_proj"} if base is GPT2 else {}
            if target in names:
                block.get_submodule(names[target]).weight.data += rows.T
                continue
            for name, module in block.named_modules():
                part = rows_of.get(name.rpartition(".")[2])
                if part is not None:
                    module.weight.data += part.T if base is GPT2 else part
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12) % VOCAB).logits
