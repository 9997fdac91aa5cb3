# SPDX-License-Identifier: Apache-2.0
"""Reads a Hugging Face model's config.json. Accepts only keys and values with which Megatron has the same model.

Imports no torch. transformers ignores a key that it does not know, so a comparison with transformers cannot find that the
model needs it. A key that is not listed here is refused, unless it is switched off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError, Problems, is_whole_number

__all__ = ["key_problems", "known_keys", "read_hf_config", "rope_kind"]

_UNSUPPORTED = "NeMo's Megatron GPT does not support it; this model cannot be imported"
_QUANTIZED = "the weights are quantized; load the model with transformers, call model.dequantize(), then model.save_pretrained()"
_Allowed = Callable[[Any], bool]


def rope_kind(scaling: Mapping[str, Any] | None) -> str:
    """The kind of a scaled rotary embedding."""
    return str((scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default")


def _off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, tuple, dict)) and not value)


def _on(value: Any) -> bool:
    return value in (None, True)


def _words(text: str) -> list[str]:
    return text.split()


_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope_scaling(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    kind = rope_kind(value)
    return kind in _ROPE_NEEDS and all(isinstance(value.get(k), (int, float)) for k in _ROPE_NEEDS[kind])


def _layer_types(value: Any) -> bool:
    return _off(value) or set(value) <= {"full_attention", "sliding_attention"}


_HARMLESS = _words(
    """
    model_type transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash tokenizer_class prefix
    use_cache return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss
    problem_type chunk_size_feed_forward is_decoder tie_encoder_decoder finetuning_task id2label label2id num_labels
    task_specific_params gradient_checkpointing attn_implementation _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled use_flash_attention_2
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id mask_token_id max_length
    min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_version
    _num_labels n_special predict_special_tokens output_past xla_device use_flash_attention use_flash_attn
    unsloth_fixed transformers.js_config is_llama_config max_sequence_length model_max_length initializer_range
    gguf_file keys_to_ignore_at_inference local_files_only revision token trust_remote_code use_auth_token
    """
)
"""Metadata, generation and training: no effect on the logits."""

_COMMON: Mapping[str, tuple[_Allowed, str]] = {
    "quantization_config": (_off, _QUANTIZED),
    "compression_config": (_off, _QUANTIZED),
    "auto_map": (
        _off,
        "the folder's own code is never run; if transformers' own class computes the same, remove auto_map",
    ),
    "is_encoder_decoder": (_off, _UNSUPPORTED),
    "add_cross_attention": (_off, _UNSUPPORTED),
    "cross_attention_hidden_size": (_off, _UNSUPPORTED),
    "pruned_heads": (_off, _UNSUPPORTED),
    "is_causal": (_on, _UNSUPPORTED),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "must be true or false"),
}
_LLAMA_COUNTS = _words(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings
    """
)
_LLAMA_OTHERS = _words(
    """
    rms_norm_eps rope_theta sliding_window use_sliding_window max_window_layers pretraining_tp attention_dropout
    """
)
_LLAMA: Mapping[str, tuple[_Allowed, str]] = {
    "hidden_act": (lambda value: value == "silu", _UNSUPPORTED),
    "attention_bias": (_off, _UNSUPPORTED),
    "mlp_bias": (_off, _UNSUPPORTED),
    "rope_scaling": (_rope_scaling, _UNSUPPORTED),
    "partial_rotary_factor": (lambda value: value in (None, 1, 1.0), _UNSUPPORTED),
    "rope_interleaved": (_off, _UNSUPPORTED),
    "use_mrope": (_off, _UNSUPPORTED),
    "layer_types": (_layer_types, _UNSUPPORTED),
}
_GPT2_COUNTS = _words(
    """
    vocab_size n_positions n_embd n_layer n_head n_inner
    """
)
_GPT2_OTHERS = _words(
    """
    n_ctx layer_norm_epsilon resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation
    summary_first_dropout summary_proj_to_labels reorder_and_upcast_attn
    """
)
_GPT2: Mapping[str, tuple[_Allowed, str]] = {
    "activation_function": (lambda value: value in ("gelu", "gelu_new", "gelu_pytorch_tanh"), _UNSUPPORTED),
    "scale_attn_weights": (_on, _UNSUPPORTED),
    "scale_attn_by_inverse_layer_idx": (_off, _UNSUPPORTED),
}
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "gpt2": "GPT2"}


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a model that can be imported, in the form of transformers before release 5.

    Raises:
        ConfigError: it is missing or damaged, or a key has a value that Megatron's layers cannot have, or an unknown
            meaning. Lists every such key.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}; name a Hugging Face model's folder"]) from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise ConfigError([f"{path}: model_type={model_type!r} is not supported; it must be one of {known}"])
    problems = Problems()
    if (folder / "adapter_config.json").is_file():
        fix = "import it with from=lora, or merge it first; remove adapter_config.json to import the base alone"
        problems.append(
            f"path={folder}: holds a LoRA's adapter_config.json, which transformers would add to the model: {fix}"
        )
    config = _with_old_rope_keys(config, problems)
    problems += key_problems(config)
    problems.raise_if_any()
    config.pop("quantization_config", None)  # it is switched off, and transformers cannot copy null
    return config


def _with_old_rope_keys(config: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """transformers 5 writes rope_parameters, which release 4 ignores, for rope_theta and rope_scaling."""
    config = dict(config)
    new = config.pop("rope_parameters", None)
    if new is None:
        return config
    if not isinstance(new, Mapping) or any(isinstance(value, Mapping) for value in new.values()):
        problems.append(f"config.json: rope_parameters={new!r}: {_UNSUPPORTED}")
        return config
    scaling = {key: value for key, value in new.items() if key not in ("rope_theta", "partial_rotary_factor")}
    old = {"rope_scaling": None if rope_kind(scaling) == "default" else scaling}
    old |= {key: new[key] for key in ("rope_theta", "partial_rotary_factor") if key in new}
    for key, value in old.items():
        if config.setdefault(key, value) not in (None, value):
            problems.append(
                f"config.json: {key}={config[key]!r}, but rope_parameters gives {value!r}; make them agree"
            )
    return {**config, **old}


def known_keys(model_type: str) -> dict[str, tuple[_Allowed, str]]:
    """Key of config.json -> whether a value can be imported, and what to say if not.

    Args:
        model_type: llama, mistral, qwen2 or gpt2.
    """
    is_gpt2, name = model_type == "gpt2", _CLASSES[model_type]
    counts, others, checked = (
        (_GPT2_COUNTS, _GPT2_OTHERS, _GPT2) if is_gpt2 else (_LLAMA_COUNTS, _LLAMA_OTHERS, _LLAMA)
    )
    anything: tuple[_Allowed, str] = (lambda value: True, "")
    count: tuple[_Allowed, str] = (
        lambda value: value is None or is_whole_number(value),
        "must be a whole number of at least 1",
    )
    head = f"{name}LMHeadModel" if is_gpt2 else f"{name}ForCausalLM"
    own = {head.lower(), f"{name}Model".lower()}
    architectures: tuple[_Allowed, str] = (
        lambda value: _off(value) or {str(one).lower() for one in value} <= own,
        f"only a language model can be imported; if the folder holds one, write ['{head}']",
    )
    return {
        **dict.fromkeys([*_HARMLESS, *others], anything),
        **dict.fromkeys(counts, count),
        **_COMMON,
        **checked,
        "architectures": architectures,
    }


def key_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key of config.json whose value Megatron's layers cannot have, or whose meaning is not known."""
    known = known_keys(config["model_type"])
    for key, value in config.items():
        if key.startswith("_"):  # transformers' own notes, such as _name_or_path: no layer's class reads one
            continue
        allowed, fix = known.get(
            key, (_off, f"this release does not know this key; remove it if the model is the same without {key}")
        )
        if not allowed(value):
            text = repr(value)
            yield f"config.json: {key}={text if len(text) <= 80 else text[:77] + '...'}: {fix}"
    sliding = "sliding_attention" in (config.get("layer_types") or ())
    unused = config["model_type"] == "qwen2" and not config.get("use_sliding_window")
    if sliding and (unused or not config.get("sliding_window")):
        yield "config.json: layer_types names sliding_attention, but no sliding window is switched on; correct one of them"
