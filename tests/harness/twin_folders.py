# SPDX-License-Identifier: Apache-2.0
"""A tiny megatron-core GPT in the style of Llama, and its weights in the form of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import VOCAB, build_gpt

__all__ = ["TWIN", "WORDS", "write_twin"]

TWIN: dict[str, Any] = {"num_layers": 4, "hidden": 24, "heads": 4, "groups": 2, "ffn": 40, "llama": True}
"""The arguments of `build_gpt`."""
WORDS = ["<end>", *(f"w{number}" for number in range(VOCAB - 1))]
"""The tokenizer knows these words, each with its own token."""


def write_twin(folder: Path) -> Any:
    """Writes weights, config.json and a tokenizer of whole words. Returns the GPT, in float64 as the weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    single_process()
    gpt = build_gpt(**TWIN)
    save_file(_hugging_face_names(gpt.state_dict()), folder / "model.safetensors")
    config = {"num_hidden_layers": 4, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}))
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": WORDS[0]}))
    return gpt


def _hugging_face_names(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    named = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
        "lm_head.weight": state["output_layer.weight"],
    }
    for number in range(TWIN["num_layers"]):
        old, new = f"decoder.layers.{number}.", f"model.layers.{number}."
        named[f"{new}input_layernorm.weight"] = state[f"{old}input_layernorm.weight"]
        named[f"{new}post_attention_layernorm.weight"] = state[f"{old}pre_mlp_layernorm.weight"]
        grouped = state[f"{old}self_attention.linear_qkv.weight"].view(
            2, 4, 6, 24
        )  # 2 groups of 2 queries, key, value
        for name, part in (("q", grouped[:, :2]), ("k", grouped[:, 2:3]), ("v", grouped[:, 3:])):
            named[f"{new}self_attn.{name}_proj.weight"] = part.reshape(-1, 24).contiguous()
        named[f"{new}self_attn.o_proj.weight"] = state[f"{old}self_attention.linear_proj.weight"]
        gate, up = state[f"{old}mlp.linear_fc1.weight"].chunk(2)
        named[f"{new}mlp.gate_proj.weight"], named[f"{new}mlp.up_proj.weight"] = gate.contiguous(), up.contiguous()
        named[f"{new}mlp.down_proj.weight"] = state[f"{old}mlp.linear_fc2.weight"]
    return named
