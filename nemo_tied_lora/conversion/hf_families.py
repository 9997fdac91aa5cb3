# SPDX-License-Identifier: Apache-2.0
"""Translates names and row orders between Hugging Face's model families and Megatron's four linears.

There are H heads in G query groups (n = H / G heads per group), of size d; f is the feed-forward size. Tensors are whole:

===========  ==========================================================  ==========================================
target       Megatron's rows                                             Hugging Face's linears
===========  ==========================================================  ==========================================
linear_qkv   for each group: n heads of q, one of k, one of v            q_proj (H d), k_proj (G d), v_proj (G d);
             = G (n + 2) d rows                                          GPT-2: c_attn = all q, all k, all v
linear_proj  hidden                                                      o_proj; GPT-2: attn.c_proj
linear_fc1   gated: f of gate, f of up; else f                           gate_proj, up_proj; GPT-2: c_fc
linear_fc2   hidden                                                      down_proj; GPT-2: mlp.c_proj
===========  ==========================================================  ==========================================

Columns have the same order in both: linear_proj's input has one head after the other, and Hugging Face's rotary embedding
rotates halves, as Megatron's does with `rotary_interleaved=False`. GPT-2's linears are `Conv1D`, whose weights are
transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from nemo_tied_lora.adapter.shapes import LinearShape, attention_linears, mlp_linears
from nemo_tied_lora.errors import ConfigError

__all__ = [
    "FAMILIES",
    "BaseSizes",
    "Family",
    "Part",
    "family_of_base",
    "family_of_model_type",
    "join_rows",
    "split_rows",
]


@dataclass(frozen=True, kw_only=True)
class BaseSizes:
    """The sizes of a base that decide the shapes of its linears and the order of their rows."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_size: int
    gated: bool

    @classmethod
    def from_model_config(cls, model: Mapping[str, Any], source: str) -> BaseSizes:
        """Reads NeMo's model keys, of a base `.nemo` or of an adapter's record of its base.

        Args:
            source: the start of each error message.

        Raises:
            ConfigError: lists every key that is missing, is not a whole number, or does not fit the others.
        """
        needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        wrong = [key for key in needed if not isinstance(model.get(key), int) or model[key] < 1]
        if not isinstance(model.get("activation"), str):
            wrong.append("activation")
        if wrong:
            fix = "name the base that it was trained on: base=base.nemo"
            raise ConfigError([f"{source}: {key}={model.get(key)!r} does not describe a base; {fix}" for key in wrong])
        heads = model["num_attention_heads"]
        groups = model.get("num_query_groups") or heads
        if heads % groups:
            raise ConfigError(
                [f"{source}: num_attention_heads={heads} is not a multiple of num_query_groups={groups}"]
            )
        return cls(
            num_layers=model["num_layers"],
            hidden_size=model["hidden_size"],
            ffn_hidden_size=model["ffn_hidden_size"],
            num_attention_heads=heads,
            num_query_groups=groups,
            head_size=model.get("kv_channels") or model["hidden_size"] // heads,
            gated=model["activation"].endswith("glu"),
        )

    @cached_property
    def linears(self) -> dict[str, LinearShape]:
        """Target to shape. Every layer has all four targets."""
        layers = range(self.num_layers)
        widths = self.num_attention_heads * self.head_size, self.num_query_groups * self.head_size
        return {
            **attention_linears(self.hidden_size, *widths, layers),
            **mlp_linears(self.hidden_size, self.ffn_hidden_size, self.gated, layers),
        }

    def differences(self, shapes: Mapping[str, LinearShape]) -> Iterator[str]:
        """Yields one problem per linear of an adapter that this base does not have, or has in another shape."""
        for target, shape in shapes.items():
            if target not in self.linears:
                yield f"targets: {target} cannot be exported as plain LoRA; use to=safetensors"
            elif shape.sides != self.linears[target].sides:
                theirs = self.linears[target].sides
                yield f"base: its {target} is {theirs} (in, out), the adapter's {shape.sides}; name the adapter's base"

    def rows(self, target: str, share: str) -> torch.Tensor:
        """The numbers of the target's rows in Megatron that a Hugging Face linear holds, in that linear's order.

        Args:
            share: q, k, v, qkv (all q, then all k, then all v), gate, up or all.
        """
        if share in ("q", "k", "v", "qkv"):
            per_group = self.num_attention_heads // self.num_query_groups
            index = torch.arange(self.linears["linear_qkv"].out_features)
            q, k, v = index.view(self.num_query_groups, per_group + 2, self.head_size).split([per_group, 1, 1], dim=1)
            rows = {"q": q.flatten(), "k": k.flatten(), "v": v.flatten()}
            return torch.cat(list(rows.values())) if share == "qkv" else rows[share]
        index = torch.arange(self.linears[target].out_features)
        return {"gate": index[: self.ffn_hidden_size], "up": index[self.ffn_hidden_size :], "all": index}[share]


@dataclass(frozen=True)
class Part:
    """One Hugging Face linear of a layer."""

    name: str
    """Below the layer."""
    share: str
    """Of the target's rows; see `BaseSizes.rows`."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Hugging Face's names for the parts of one kind of model."""

    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    layers: str
    """The name of the list of layers."""
    targets: Mapping[str, tuple[Part, ...]]
    """Megatron's target -> the linears that hold its rows."""
    norms: Mapping[str, str]
    """Megatron's norm of a layer -> Hugging Face's, below the layer."""
    whole: Mapping[str, str]
    """Megatron's tensors outside the layers -> Hugging Face's."""
    transposed: bool
    """Whether weights are stored as (in, out)."""
    gated: bool
    nemo: Mapping[str, Any]
    """NeMo's model keys with the same value for the whole family."""
    of_pattern: bool = False
    """Whether attention and MLP are layers of their own, by a HybridModel's pattern."""

    def target_modules(self, targets: tuple[str, ...]) -> list[str]:
        """peft's `target_modules` for these targets: the shortest names that match no other linear."""
        chosen = [part.name for target in targets for part in self.targets[target]]
        others = [part.name for target in self.targets if target not in targets for part in self.targets[target]]
        short = {name.rpartition(".")[2] for name in others}
        names = [name if name.rpartition(".")[2] in short else name.rpartition(".")[2] for name in chosen]
        return sorted(set(names))

    def layer(self, number: int) -> str:
        """A layer's prefix."""
        return f"{self.layers}.{number}"

    def layer_in_config(self, number: int) -> str:
        """A layer's prefix in peft's configuration, which may be the end of a name.

        What is in front of Nemotron-H's layers differs between transformers and the code of its authors.
        """
        return f"{self.layers.rpartition('.')[2]}.{number}" if self.of_pattern else self.layer(number)


_LLAMA_TARGETS = {
    "linear_qkv": (Part("self_attn.q_proj", "q"), Part("self_attn.k_proj", "k"), Part("self_attn.v_proj", "v")),
    "linear_proj": (Part("self_attn.o_proj", "all"),),
    "linear_fc1": (Part("mlp.gate_proj", "gate"), Part("mlp.up_proj", "up")),
    "linear_fc2": (Part("mlp.down_proj", "all"),),
}
_GPT2_TARGETS = {
    "linear_qkv": (Part("attn.c_attn", "qkv"),),
    "linear_proj": (Part("attn.c_proj", "all"),),
    "linear_fc1": (Part("mlp.c_fc", "all"),),
    "linear_fc2": (Part("mlp.c_proj", "all"),),
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_types=("llama", "mistral", "qwen2"),
        layers="model.layers",
        targets=_LLAMA_TARGETS,
        norms={"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"},
        whole={
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            "output_layer.weight": "lm_head.weight",
        },
        transposed=False,
        gated=True,
        nemo={
            "activation": "fast-swiglu",
            "normalization": "rmsnorm",
            "bias": False,
            "position_embedding_type": "rope",
            "rotary_percentage": 1.0,
        },
    ),
    "gpt2": Family(
        model_types=("gpt2",),
        layers="transformer.h",
        targets=_GPT2_TARGETS,
        norms={"input_layernorm": "ln_1", "pre_mlp_layernorm": "ln_2"},
        whole={
            "embedding.word_embeddings.weight": "transformer.wte.weight",
            "embedding.position_embeddings.weight": "transformer.wpe.weight",
            "decoder.final_layernorm.weight": "transformer.ln_f.weight",
            "decoder.final_layernorm.bias": "transformer.ln_f.bias",
            "output_layer.weight": "lm_head.weight",
        },
        transposed=True,
        gated=False,
        nemo={
            "activation": "gelu",
            "normalization": "layernorm",
            "bias": True,
            "qkv_bias": True,
            "position_embedding_type": "learned_absolute",
        },
    ),
}


_NEMOTRON_H = Family(
    model_types=("nemotron_h",),
    layers="backbone.layers",
    targets={
        "linear_qkv": (Part("mixer.q_proj", "q"), Part("mixer.k_proj", "k"), Part("mixer.v_proj", "v")),
        "linear_proj": (Part("mixer.o_proj", "all"),),
        "linear_fc1": (Part("mixer.up_proj", "all"),),
        "linear_fc2": (Part("mixer.down_proj", "all"),),
    },
    norms={},
    whole={},
    transposed=False,
    gated=False,
    nemo={"activation": "squared_relu", "normalization": "rmsnorm", "position_embedding_type": "none"},
    of_pattern=True,
)
"""The one family of HybridModels whose pattern is not paired (see `adapter.layer_numbers`). For exports alone: NeMo 2.4 has
no such model. Its layers have the numbers of the pattern's places."""


def family_of_model_type(model_type: str | None, source: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
        ConfigError: the type is unknown.
    """
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.model_types)
    raise ConfigError([f"{source}: model_type={model_type!r} is not supported; it must be one of {known}"])


def family_of_base(model: Mapping[str, Any], source: str, remedy: str) -> Family:
    """The family whose Hugging Face models have the architecture of a Megatron base.

    Args:
        source: the start of each error message.
        remedy: what to do if no family has it.

    Raises:
        ConfigError: no family has it. Lists the keys that differ for each family.
    """
    reasons = []
    for family in (_NEMOTRON_H,) if model.get("hybrid_layer_pattern") else FAMILIES.values():
        differing = []
        for key in ("normalization", "position_embedding_type"):
            if str(model.get(key)).lower() != family.nemo[key]:
                differing.append(f"{key}={model.get(key)!r} (it has {family.nemo[key]!r})")
        activation = str(model.get("activation"))
        if activation.endswith("glu") != family.gated or (
            family.of_pattern and activation != family.nemo["activation"]
        ):
            differing.append(f"activation={activation!r} (it has {family.nemo['activation']!r})")
        if not differing:
            return family
        reasons.append(f"{source}: the base is not built as {'/'.join(family.model_types)}: {', '.join(differing)}")
    raise ConfigError([*reasons, f"{source}: no Hugging Face family has such a base; {remedy}"])


def split_rows(tensor: torch.Tensor, target: str, parts: tuple[Part, ...], sizes: BaseSizes) -> list[torch.Tensor]:
    """Splits a whole Megatron tensor (out, ...) into the rows of each Hugging Face linear, in that linear's order."""
    return [tensor[sizes.rows(target, part.share)] for part in parts]


def join_rows(tensors: list[torch.Tensor], target: str, parts: tuple[Part, ...], sizes: BaseSizes) -> torch.Tensor:
    """Joins the rows of Hugging Face linears to a whole Megatron tensor (out, ...). The inverse of `split_rows`."""
    joined = tensors[0].new_empty((sizes.linears[target].out_features, *tensors[0].shape[1:]))
    for tensor, part in zip(tensors, parts, strict=True):
        joined[sizes.rows(target, part.share)] = tensor
    return joined
