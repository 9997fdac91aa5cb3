# SPDX-License-Identifier: Apache-2.0
"""Compares all tensors that a Hugging Face folder stores with those that its config.json describes.

transformers drops a tensor that its model has no place for, and draws random numbers for one that is missing. A comparison
of logits with transformers finds neither. So every stored tensor must be used, be equal to its twin, or be a constant with
the value that it must have; each other one is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nemo_tied_lora.conversion.hf_families import BaseSizes, Family
from nemo_tied_lora.conversion.hf_weights import HfWeights
from nemo_tied_lora.errors import Problems

__all__ = ["check_stored", "storage_dtype"]

_HEAD, _ROW_NAMES = "lm_head.weight", ("embedding.word_embeddings.weight", "output_layer.weight")
_INV_FREQ = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")
_MASK = re.compile(r"(?:^|\.)h\.\d+\.attn\.(masked_)?bias$")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_stored(
    weights: HfWeights, family: Family, sizes: BaseSizes, model: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    """Compares names and shapes of the whole folder, before anything is converted.

    Args:
        model: NeMo's model keys, made of `config`.
        config: config.json with all its defaults.

    Afterwards `weights.spare` has the names that the model does not take.

    Returns:
        Notes: files with weights that are not read.

    Raises:
        ConfigError: lists what is missing, of another shape or dtype, or has no place in the model.
    """
    expected = expected_shapes(family, sizes, model, config)
    problems = Problems(_missing(weights, expected, config))
    problems += _other_shapes(weights, expected)
    known = {weights.stored_name(name) for name in expected}
    for name in sorted(weights.files.keys() - known):
        problem = _unused(weights, name, family, config)
        problems += [problem] if problem else []
        weights.spare.add(name)
    Problems(f"path={weights.folder}: {line}" for line in _shortened(problems)).raise_if_any()
    unread = weights.not_read()
    return [f"not read: {', '.join(unread)}"] if unread else []


def expected_shapes(
    family: Family, sizes: BaseSizes, model: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its Hugging Face name, with its shape there."""
    hidden, rows = sizes.hidden_size, config["vocab_size"]
    kinds = ("weight", "bias") if family.nemo["normalization"] == "layernorm" else ("weight",)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, source in family.whole.items():
        if name == "embedding.position_embeddings.weight":
            shapes[source] = (model["max_position_embeddings"], hidden)
        elif name not in _ROW_NAMES:
            shapes[source] = (hidden,)
        elif not (name == "output_layer.weight" and model["share_embeddings_and_output_weights"]):
            shapes[source] = (rows, hidden)
    for layer in range(sizes.num_layers):
        prefix = family.layer(layer)
        shapes |= {f"{prefix}.{norm}.{kind}": (hidden,) for norm in family.norms.values() for kind in kinds}
        for target, parts in family.targets.items():
            for part in parts:
                out, width = len(sizes.rows(target, part.share)), sizes.linears[target].in_features
                shapes[f"{prefix}.{part.name}.weight"] = (width, out) if family.transposed else (out, width)
                if model["bias"] or (model["qkv_bias"] and target == "linear_qkv"):
                    shapes[f"{prefix}.{part.name}.bias"] = (out,)
    return shapes


def storage_dtype(weights: HfWeights) -> torch.dtype:
    """The widest dtype of the stored weights; float32 at most."""
    found = {weights.dtype(name) for name in weights.files if not _INV_FREQ.search(name) and not _MASK.search(name)}
    found &= set(_DTYPES)
    return found.pop() if len(found) == 1 and torch.float64 not in found else torch.float32


def _missing(weights: HfWeights, expected: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Iterator[str]:
    for name in expected:
        if weights.stored_name(name) is None:
            fix = "; if it is the embedding, set tie_word_embeddings to true in config.json" if name == _HEAD else ""
            yield f"{name}: missing, though config.json describes it{fix}"


def _other_shapes(weights: HfWeights, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in expected.items():
        stored = weights.stored_name(name)
        if stored is None:
            continue
        if weights.shape(stored) != shape:
            yield f"{stored}: has shape {weights.shape(stored)}, but {shape} by config.json; correct one of them"
        elif weights.dtype(stored) not in _DTYPES:
            yield f"{stored}: has dtype {weights.dtype(stored)}, as quantized weights have; save it unquantized"


def _unused(weights: HfWeights, name: str, family: Family, config: Mapping[str, Any]) -> str | None:
    """What is wrong with a tensor that the model does not take."""
    if name == _HEAD and config.get("tie_word_embeddings"):
        twin = weights.stored_name(family.whole["embedding.word_embeddings.weight"])
        if twin is None or _equal(weights.read(name), weights.read(twin)):
            return None
        return (
            f"{name}: differs from {twin}, though config.json says tie_word_embeddings=true; set it to false to keep "
            f"both, or remove {name} to use the embedding, as transformers does"
        )
    if _INV_FREQ.search(name) and not family.transposed:
        return _wrong_frequencies(weights.read(name), name, config)
    mask = _MASK.search(name)
    if mask and family.transposed:
        tensor = weights.read(name)
        causal = torch.ones(tensor.shape[-2:], dtype=torch.bool).tril() if tensor.dim() == 4 else None
        right = tensor.numel() == 1 if mask[1] else causal is not None and _equal(tensor.bool()[0, 0], causal)
        return None if right else f"{name}: is not the causal mask; this is another kind of model"
    return f"{name}: the model that config.json describes has no place for it, and transformers would drop it"


def _wrong_frequencies(stored: torch.Tensor, name: str, config: Mapping[str, Any]) -> str | None:
    """Old versions of transformers stored the rotary frequencies, theta^(-2 i / size). New ones compute them."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = float(config.get("rope_theta") or 10000.0)
    computed = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    # bfloat16 keeps three digits.
    if stored.shape == computed.shape and torch.allclose(stored.double(), computed, rtol=1e-2, atol=0.0):
        return None
    return (
        f"{name}: differs from the frequencies of rope_theta={theta:g} in config.json, which would be used; correct it"
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b.to(a.dtype)))


_SHOWN = 20


def _shortened(problems: list[str]) -> list[str]:
    rest = len(problems) - _SHOWN
    return [*problems[:_SHOWN], f"and {rest} more of this kind"] if rest > 0 else problems
