# SPDX-License-Identifier: Apache-2.0
"""Describes the base model of an adapter, and checks that another model is that base.

The description holds the architecture, the tokenizer's identity, and a fingerprint of the weights (`weight_checksums`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_tied_lora.adapter.layer_numbers import LayerNumbers
from nemo_tied_lora.adapter.weight_checksums import fingerprint_model
from nemo_tied_lora.errors import ConfigError

__all__ = [
    "BaseMismatchError",
    "check_architecture",
    "check_weights",
    "describe_base",
    "tokenizer_identity",
]


_CONFIG_FACTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "gated_linear_unit",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "num_moe_experts",
    "moe_router_topk",
    "multi_latent_attention",
)
_MODEL_FACTS = ("position_embedding_type", "rotary_percent", "rotary_base", "share_embeddings_and_output_weights")
_logger = logging.getLogger(__name__)


class BaseMismatchError(ConfigError):
    """The adapter belongs to another base. Has one line per difference."""


def describe_base(
    chunks: Sequence[Any], *, tokenizer: Mapping[str, Any] | None = None, name: str | None = None
) -> dict[str, Any]:
    """Returns the description of the base for an adapter's file, as plain values. All ranks must call it.

    Args:
        chunks: a stage's GPTModels or HybridModels (with a `config` and a `decoder`), with or without an adapter.
        tokenizer: see `tokenizer_identity`. Rows of an embedding beyond its vocab_size are padding.
        name: the name of the base's file.

    Returns:
        The same on every rank.
    """
    # Bridge's models know how many rows are not padding. It pads otherwise than NeMo.
    rows = (tokenizer or {}).get("vocab_size") or getattr(chunks[0].config, "vocab_size", None)
    return {
        **({"name": name} if name else {}),
        "architecture": _describe_architecture(chunks[0]),
        **({"tokenizer": dict(tokenizer)} if tokenizer else {}),
        "fingerprint": fingerprint_model(chunks, vocab_rows=rows),
    }


def _describe_architecture(chunk: Any) -> dict[str, Any]:
    """Returns a model's sizes and kinds as plain values, the same on every layout, and for a paired HybridModel as for the
    GPTModel with its weights (see `layer_numbers`)."""
    config, numbers = chunk.config, LayerNumbers.of(chunk)
    facts = {name: getattr(config, name, None) for name in _CONFIG_FACTS}
    facts |= {"num_layers": numbers.count, "hybrid_layer_pattern": numbers.own_pattern}
    if not facts["num_moe_experts"]:
        facts["moe_router_topk"] = None
    activation = getattr(config, "activation_func", None)
    facts["activation"] = getattr(activation, "__name__", None)
    facts |= {name: getattr(chunk, name, None) for name in _MODEL_FACTS}
    if numbers.pattern is not None:
        facts |= _rotary_facts(chunk)
    if facts["position_embedding_type"] != "rope":
        facts["rotary_percent"] = facts["rotary_base"] = None
    return {name: value for name, value in facts.items() if value is not None}


def _rotary_facts(model: Any) -> dict[str, Any]:
    """What a GPTModel says of its rotary embedding: the share of a head that turns, and the base. A HybridModel keeps neither.

    The angles are base^(-2 i / width), in float32. So the last one gives the base to six digits or more.
    """
    angles = getattr(getattr(model, "rotary_pos_emb", None), "inv_freq", None)
    if angles is None or len(angles) < 2:
        return {}
    width = 2 * len(angles)
    base = float(f"{float(angles[-1].double() ** (-width / (width - 2))):.6g}")
    return {
        "rotary_percent": width / model.config.kv_channels,
        "rotary_base": int(base) if base.is_integer() else base,
    }


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Returns a NeMo tokenizer's kind and size, and a hash: of its model if it is a sentencepiece one, else of its
    vocabulary."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if hasattr(inner, "serialized_model_proto"):
        content = inner.serialized_model_proto()
    elif hasattr(inner, "get_vocab"):
        content = json.dumps(sorted(inner.get_vocab().items()), ensure_ascii=True).encode()
    else:
        content = None
    return {
        "kind": type(tokenizer).__name__,
        "vocab_size": int(getattr(tokenizer, "vocab_size", 0) or 0) or None,
        "sha256": None if content is None else hashlib.sha256(content).hexdigest(),
    }


def check_architecture(recorded: Mapping[str, Any], chunk: Any, who: str) -> None:
    """Compares the architecture that a file records for its base with a model.

    Args:
        recorded: the file's `base`.
        who: the file, for messages.

    Raises:
        BaseMismatchError: has one line per difference.
    """
    known, found = recorded.get("architecture") or {}, _describe_architecture(chunk)
    problems = [
        f"{who}: {fact}: the adapter was trained on {_said(fact, known)}, this model has {_said(fact, found)}"
        for fact in dict.fromkeys((*known, *found))
        if known and known.get(fact) != found.get(fact)
    ]
    if problems:
        raise BaseMismatchError(problems)


def _said(fact: str, facts: Mapping[str, Any]) -> str:
    if fact == "hybrid_layer_pattern" and facts.get(fact) is None:
        return "attention and MLP in every layer"
    return repr(facts.get(fact))


def check_weights(
    recorded: Mapping[str, Any], found: Mapping[str, Any], who: str, *, allow_other_base: bool = False
) -> None:
    """Compares fingerprint and tokenizer, if both sides have them.

    Args:
        recorded: the file's `base`.
        found: the base's `fingerprint` and `tokenizer`, as `describe_base` returns them.
        who: the file, for messages.
        allow_other_base: warn instead of raising.

    Raises:
        BaseMismatchError: names the kinds of weights that differ, and the remedy.
    """
    problems = list(_weight_differences(recorded.get("fingerprint") or {}, found.get("fingerprint") or {}))
    known, own = ((side.get("tokenizer") or {}).get("sha256") for side in (recorded, found))
    if known and own and known != own:
        problems.append(
            f"tokenizer: the adapter was trained with another one (sha256 {known[:12]}, this base's {own[:12]})"
        )
    if not problems:
        return
    if allow_other_base:
        _logger.warning("%s: used on another base, as allow_other_base asks: %s", who, "; ".join(problems))
        return
    advice = "load it on the base that it was trained on, or set allow_other_base=true"
    raise BaseMismatchError([*(f"{who}: {problem}" for problem in problems), f"{who}: {advice}"])


def _weight_differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    if not recorded or not found or recorded.get("value") == found.get("value"):
        return
    known, own = recorded.get("weights") or {}, found.get("weights") or {}
    names = [name for name in dict.fromkeys((*known, *own)) if known.get(name) != own.get(name)]
    yield (
        f"base: the adapter was trained on other weights: {', '.join(names) or 'unknown ones'} "
        f"(fingerprint {recorded.get('value')}, this base's {found.get('value')})"
    )
