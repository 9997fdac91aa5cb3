# SPDX-License-Identifier: Apache-2.0
"""Which base model an adapter belongs to: architecture, tokenizer, and a fingerprint of the weights.

The fingerprint is the same on every parallel layout, exactly. A weight's checksum is

    sum over its elements of  bits(element) * m0(layer) * m1(row) * m2(column) * ...   modulo 2^64

where `bits` are those of the element rounded to bfloat16, as an integer, and the m are odd numbers drawn from the
element's place in the whole weight. Integer sums do not depend on their order, so each rank sums its own shards and
one all-reduce adds the ranks up; replicas are counted once. Odd factors let no single changed element pass unnoticed.
Rounding makes a float32 base and the same base loaded as bfloat16 agree; a base that was rounded to float16 on the way
may not. Rows that padding adds to an embedding are zeros, and add nothing.

Every element is read: a GPU does it at the speed of its memory, a CPU core at about 0.1 billion elements a second.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from nemo_tied_lora.config import ConfigError

__all__ = [
    "BaseMismatchError",
    "WeightChecksums",
    "check_architecture",
    "check_weights",
    "describe_architecture",
    "describe_base",
    "fingerprint_model",
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
_SLAB = 1 << 20  # elements at a time: eight bytes each while they are multiplied
_LAYER = re.compile(r"(?<=\blayers\.)(\d+)\.")
_MASK = (1 << 64) - 1
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


def fingerprint_model(chunks: Sequence[Any], vocab_rows: int | None = None) -> dict[str, Any]:
    """The fingerprint of the base weights of a whole model. All ranks must call it, and get the same.

    Args:
        chunks: a stage's GPTModels. An adapter's tensors are left out; what Megatron calls a main replica counts.
        vocab_rows: rows of the embedding and output layer that the tokenizer uses; None: all.
    """
    checksums = WeightChecksums()
    for chunk in chunks:
        for key, tensor, offset, padded in _own_shards(chunk):
            if padded and vocab_rows is not None:
                tensor = tensor[: max(0, vocab_rows - offset[0])]
            checksums.add(key, tensor, offset)
    checksums.sum_over_ranks(next(chunks[0].parameters()).device)
    return checksums.as_dict(vocab_rows)


class WeightChecksums:
    """Adds up the checksums of weights, piece by piece, in any order and from anywhere in the whole weights."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}

    def add(self, key: str, tensor: torch.Tensor, offset: Sequence[int]) -> None:
        """Counts one piece.

        Args:
            key: the weight's name in a distributed checkpoint; a layer's number in it becomes the first coordinate.
            tensor: the piece.
            offset: where its first element lies in the whole weight, with as many numbers as the weight has dims:
                more than `tensor` has where the first ones count layers or experts.
        """
        key = re.sub(r"^(module\.|model\.)*", "", key)
        numbered = _LAYER.search(key)
        if numbered:
            key, offset = _LAYER.sub("", key, count=1), (int(numbered[1]), *offset)
        shape = (1,) * (len(offset) - tensor.ndim) + tuple(tensor.shape)
        total = _checksum(tensor.detach().reshape(shape), offset) if tensor.numel() else 0
        self._sums[key] = (self._sums.get(key, 0) + total) & _MASK

    def sum_over_ranks(self, device: torch.device) -> None:
        """Adds up all ranks of the job."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return
        known: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(known, sorted(self._sums))
        keys = sorted({key for rank in known for key in rank})
        values = torch.tensor([_signed(self._sums.get(key, 0)) for key in keys], dtype=torch.int64, device=device)
        torch.distributed.all_reduce(values)
        self._sums = {key: value & _MASK for key, value in zip(keys, values.tolist(), strict=True)}

    def as_dict(self, vocab_rows: int | None = None) -> dict[str, Any]:
        """The fingerprint: `value` over all weights, and each kind's own checksum, to say what differs."""
        weights = {key: f"{value:016x}" for key, value in sorted(self._sums.items())}
        value = hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:32]
        return {"value": value, "vocab_rows": vocab_rows, "weights": weights}


def _weight_differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    if not recorded or not found or recorded.get("value") == found.get("value"):
        return
    known, own = recorded.get("weights") or {}, found.get("weights") or {}
    names = [name for name in dict.fromkeys((*known, *own)) if known.get(name) != own.get(name)]
    yield (
        f"base: the adapter was trained on other weights: {', '.join(names) or 'unknown ones'} "
        f"(fingerprint {recorded.get('value')}, here {found.get('value')})"
    )


def _own_shards(chunk: Any) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...], bool]]:
    """(key, tensor, offset in the whole weight, whether its rows may be padded) of what this rank counts.

    Megatron's own description for distributed checkpoints says where each shard lies, gate and up apart.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    state = chunk.sharded_state_dict(prefix="")
    state = {key: value for key, value in state.items() if ".tied_lora." not in f".{key}"}
    apply_factories(state)
    for value in _leaves(state):
        if not isinstance(value, ShardedTensor) or not is_main_replica(value.replica_id):
            continue
        if value.data is not None and value.data.is_floating_point() and not value.data.is_meta:
            yield value.key, value.data, tuple(value.global_offset), bool(value.allow_shape_mismatch)


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, Mapping):
        for value in state.values():
            yield from _leaves(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _leaves(value)
    else:
        yield state


@torch.no_grad()
def _checksum(tensor: torch.Tensor, offset: Sequence[int]) -> int:
    """The sum of the module's formula over one piece, in 0 .. 2^64 - 1."""
    factors = [
        _multipliers(dim, start, size, tensor.device)
        for dim, (start, size) in enumerate(zip(offset, tensor.shape, strict=True))
    ]
    lead = torch.ones(1, dtype=torch.int64, device=tensor.device)
    for factor in factors[:-1]:
        lead = (lead.unsqueeze(1) * factor).reshape(-1)
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, _SLAB // rows.shape[1])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, rows.shape[0], step):
        bits = rows[start : start + step].to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int64)
        total += (bits.mul_(factors[-1]).sum(1) * lead[start : start + step]).sum()
    return int(total.item()) & _MASK


@functools.lru_cache(maxsize=64)
def _multipliers(dim: int, start: int, size: int, device: torch.device) -> torch.Tensor:
    """An odd pseudo-random number for each place along a dim: splitmix64, whose products wrap around."""
    x = torch.arange(start + 1, start + size + 1, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15)
    x += _signed(0xD1B54A32D192ED03 * (dim + 1) & _MASK)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return ((x ^ _shifted(x, 31)) | 1).to(device)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A shift to the right that brings in zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
