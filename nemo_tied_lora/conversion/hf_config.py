# SPDX-License-Identifier: Apache-2.0
"""Translates a Hugging Face model's config.json to NeMo's model keys, and refuses what Megatron cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_tied_lora.conversion.hf_config_file import key_problems, rope_kind
from nemo_tied_lora.conversion.hf_families import family_of_model_type
from nemo_tied_lora.errors import Problems

__all__ = ["NemoKeys", "nemo_keys"]


@dataclass
class NemoKeys:
    """NeMo's model keys, and notes for the user about limits that config.json does not have."""

    model: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def nemo_keys(config: Mapping[str, Any], *, vocab_multiple: int = 128) -> NemoKeys:
    """Translates a config that has all defaults filled in (`transformers.AutoConfig(...).to_dict()`).

    Args:
        vocab_multiple: the embedding is padded to a multiple of this number of rows, so that every tensor-parallel size
            that divides it can split the rows.

    Raises:
        ConfigError: the `model_type` is unknown, Megatron's layers lack a feature, or a key's meaning is not known. Lists
            every such key.
    """
    family = family_of_model_type(config.get("model_type"), "config.json")
    Problems(key_problems(config)).raise_if_any()
    notes: list[str] = []
    sizes = _gpt2(config) if config["model_type"] == "gpt2" else _llama(config, notes)
    rows = config["vocab_size"]
    padded = -(-rows // vocab_multiple) * vocab_multiple
    if padded != rows:
        notes.append(f"vocabulary: {rows} rows, padded to {padded}; the added rows are the mean of the others")
    model = {
        **family.nemo,
        **sizes,
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", True)),
        "override_vocab_size": padded,
        "make_vocab_size_divisible_by": vocab_multiple,
    }
    return NemoKeys(model, notes)


def _llama(config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    heads, length = config["num_attention_heads"], config["max_position_embeddings"]
    window = config.get("sliding_window")
    if config.get("model_type") == "qwen2" and not config.get("use_sliding_window"):
        window = None
    if window is not None and window < length:
        notes.append(
            f"sliding window: sequences are limited to {window} tokens (of {length} positions), because only there it "
            "equals full attention"
        )
        length = window
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "layernorm_epsilon": config["rms_norm_eps"],
        "rotary_base": config.get("rope_theta") or 10000.0,
        "qkv_bias": config["model_type"] == "qwen2",
        "encoder_seq_length": length,
        "max_position_embeddings": length,
        **_rope_scaling(config.get("rope_scaling")),
    }


def _rope_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """NeMo's keys of a scaled rotary embedding. `key_problems` has refused the kinds that NeMo lacks."""
    kind = rope_kind(scaling)
    if scaling is None or kind == "default":
        return {}
    if kind == "linear":
        return {"seq_len_interpolation_factor": scaling["factor"]}
    return {
        "scale_positional_embedding": True,
        "scale_factor": scaling["factor"],
        "low_freq_factor": scaling["low_freq_factor"],
        "high_freq_factor": scaling["high_freq_factor"],
        "old_context_len": scaling["original_max_position_embeddings"],
    }


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"],
        "num_attention_heads": config["n_head"],
        "num_query_groups": config["n_head"],
        "kv_channels": config["n_embd"] // config["n_head"],
        "layernorm_epsilon": config["layer_norm_epsilon"],
        # GPT-2's gelu is the tanh approximation, which NeMo calls openai_gelu.
        "openai_gelu": config["activation_function"] != "gelu",
        "encoder_seq_length": config["n_positions"],
        "max_position_embeddings": config["n_positions"],
    }
