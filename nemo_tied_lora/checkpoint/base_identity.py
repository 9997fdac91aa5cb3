# SPDX-License-Identifier: Apache-2.0
"""Which base model an adapter belongs to: architecture, tokenizer, and a fingerprint of the weights (see
`weight_checksums`)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_tied_lora.checkpoint.weight_checksums import fingerprint_model
from nemo_tied_lora.errors import ConfigError

__all__ = [
    "BaseMismatchError",
    "check_architecture",
    "check_weights",
    "describe_architecture",
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
    """The adapter belongs to another base: a line for each difference."""


def describe_base(
    chunks: Sequence[Any], *, tokenizer: Mapping[str, Any] | None = None, name: str | None = None
) -> dict[str, Any]:
    """What an adapter's file says of its base: plain values. All ranks must call it, and get the same.

    Args:
        chunks: a stage's GPTModels (with a `config` and a `decoder`), with an adapter or without.
        tokenizer: see `tokenizer_identity`; its vocab_size tells which rows of an embedding are padding.
        name: of the base's file.
    """
    rows = (tokenizer or {}).get("vocab_size")
    return {
        **({"name": name} if name else {}),
        "architecture": describe_architecture(chunks[0]),
        **({"tokenizer": dict(tokenizer)} if tokenizer else {}),
        "fingerprint": fingerprint_model(chunks, vocab_rows=rows),
    }


def describe_architecture(chunk: Any) -> dict[str, Any]:
    """A GPTModel's sizes and kinds, whole (not one rank's): plain values, the same on every layout."""
    config = chunk.config
    facts = {name: getattr(config, name, None) for name in _CONFIG_FACTS}
    if not facts["num_moe_experts"]:
        facts["moe_router_topk"] = None
    activation = getattr(config, "activation_func", None)
    facts["activation"] = getattr(activation, "__name__", None)
    facts |= {name: getattr(chunk, name, None) for name in _MODEL_FACTS}
    if facts["position_embedding_type"] != "rope":
        facts["rotary_percent"] = facts["rotary_base"] = None
    return {name: value for name, value in facts.items() if value is not None}


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """A NeMo tokenizer's kind, size, and a hash of what it was trained to: the model of a sentencepiece one, the
    vocabulary of any other."""
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
    """Compares what a file says of its base with a model.

    Raises:
        BaseMismatchError: a line for each difference.
    """
    known, found = recorded.get("architecture") or {}, describe_architecture(chunk)
    problems = [
        f"{who}: {fact}: the adapter was trained on {known.get(fact)!r}, this model has {found.get(fact)!r}"
        for fact in dict.fromkeys((*known, *found))
        if known and known.get(fact) != found.get(fact)
    ]
    if problems:
        raise BaseMismatchError(problems)


def check_weights(
    recorded: Mapping[str, Any], found: Mapping[str, Any], who: str, *, allow_other_base: bool = False
) -> None:
    """Compares fingerprint and tokenizer, where both are known.

    Args:
        recorded: a file's `base`.
        found: `fingerprint` and `tokenizer` of the base at hand, as `describe_base` gives them.
        allow_other_base: only warn.

    Raises:
        BaseMismatchError: which kinds of weights differ, and what to do.
    """
    problems = list(_weight_differences(recorded.get("fingerprint") or {}, found.get("fingerprint") or {}))
    known, own = ((side.get("tokenizer") or {}).get("sha256") for side in (recorded, found))
    if known and own and known != own:
        problems.append(f"tokenizer: the adapter was trained with another one (sha256 {known[:12]}, here {own[:12]})")
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
        f"(fingerprint {recorded.get('value')}, here {found.get('value')})"
    )
