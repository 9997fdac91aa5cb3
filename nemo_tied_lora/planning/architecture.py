# SPDX-License-Identifier: Apache-2.0
"""Derives a Megatron GPT's sizes and linears from plain configuration values. Needs neither torch nor a model.

The keys are NeMo's (``model.num_layers``). Absent and null keys mean what they mean in NeMo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_tied_lora.adapter.experts import groups_of
from nemo_tied_lora.adapter.shapes import LinearShape, attention_linears, mlp_linears
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import Problems, is_whole_number

__all__ = ["Architecture", "Mixture", "divisors", "selected_linears"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a whole Megatron GPT, not of one rank's shard.

    Raises:
        ConfigError: a size is not a whole number of at least 1, or sizes do not fit each other.
    """

    num_layers: int
    """Transformer layers, over all stages."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width inside the MLP. In a gated MLP, the width after the gate."""
    num_attention_heads: int
    num_query_groups: int
    """Heads of K and of V; fewer than num_attention_heads with grouped queries."""
    kv_channels: int
    """Width of one head."""
    seq_length: int
    """Tokens in a sequence (NeMo's encoder_seq_length)."""
    vocab_size: int | None = None
    """Rows of the embedding. None: unknown until the tokenizer is read; num_parameters is then None too."""
    gated: bool = False
    """linear_fc1 holds gate and up: twice ffn_hidden_size rows."""
    bias: bool = True
    """Every linear of a layer has a bias."""
    qkv_bias: bool = False
    """linear_qkv has a bias, even if `bias` is False."""
    qk_norm: bool = False
    """Q and K are normalised per head."""
    norm_bias: bool = True
    """Norms hold a bias beside their weight (LayerNorm does, RMSNorm does not)."""
    learned_positions: bool = False
    """A learned position embedding of seq_length rows."""
    shared_output: bool = True
    """The output layer and the embedding share their weight."""
    mixture: Mixture | None = None
    """The experts that replace the MLP of some layers. None: a dense model."""

    def __post_init__(self) -> None:
        problems = Problems()
        for name, value in vars(self).items():
            if name in _SIZES or (name == "vocab_size" and value is not None):
                problems.whole_number(f"model.{_NEMO_NAME.get(name, name)}", value)
        if not problems and self.num_attention_heads % self.num_query_groups:
            problems.append(
                f"model.num_query_groups={self.num_query_groups}: must divide model.num_attention_heads="
                f"{self.num_attention_heads}; use one of {divisors(self.num_attention_heads)}"
            )
        problems.raise_if_any()

    @classmethod
    def from_model_config(cls, cfg: Mapping[str, Any]) -> Architecture:
        """Reads a NeMo GPT's configuration: the section ``model``, or the model_config.yaml of a ``.nemo``.

        As in NeMo, an absent or null ffn_hidden_size is 4 * hidden_size, num_query_groups is num_attention_heads, and
        kv_channels is hidden_size / num_attention_heads. An activation that ends in "glu" is gated.

        Raises:
            ConfigError: with all missing keys and wrong values.
        """
        problems = Problems(
            f"model.{key}: missing; set it to the base model's value"
            for key in ("num_layers", "hidden_size", "num_attention_heads", "encoder_seq_length")
            if cfg.get(key) is None
        )
        key = "multi_latent_attention"
        if cfg.get(key):
            problems.append(
                f"model.{key}={cfg[key]!r}: such a model is not supported; use a dense GPT and remove the key"
            )
        hidden, heads = _hidden_and_heads(cfg)
        if cfg.get("kv_channels") is None and hidden % heads:
            problems.append(
                f"model.hidden_size={hidden}: not divisible by model.num_attention_heads={heads}; "
                f"set model.kv_channels, or use one of {divisors(hidden)} heads"
            )
        mixture = problems.attempt(Mixture.from_model_config, cfg)
        return problems.build(cls, **_sizes_of(cfg), **_options_of(cfg), mixture=mixture)

    @property
    def num_parameters(self) -> int | None:
        """Number of the base's parameters: embeddings, layers with norms, biases and routers, last norm, output layer."""
        if self.vocab_size is None:
            return None
        shapes = _linear_shapes(self)
        norm = self.hidden_size * (2 if self.norm_bias else 1)
        layer = 2 * norm + (shapes["linear_qkv"].out_features if self.qkv_bias and not self.bias else 0)
        layer += 2 * self.kv_channels * (2 if self.norm_bias else 1) if self.qk_norm else 0
        linears = sum(
            shape.out_features * (shape.in_features + self.bias) * shape.num_linears for shape in shapes.values()
        )
        routers = self.mixture.num_experts * len(self.mixture.layers) if self.mixture else 0
        rows = self.vocab_size * (1 if self.shared_output else 2) + self.seq_length * self.learned_positions
        return self.num_layers * layer + linears + norm + (rows + routers) * self.hidden_size


def selected_linears(arch: Architecture, config: TiedLoraConfig) -> dict[str, LinearShape]:
    """Group to shape of the linears that the configuration selects, each with its selected layers."""
    shapes, found = _linear_shapes(arch), {}
    for group in [group for target in config.targets for group in groups_of(target) if group in shapes]:
        layers = [layer for layer in shapes[group].layers if config.layers is None or layer in config.layers]
        if layers:
            found[group] = dataclasses.replace(shapes[group], layers=tuple(layers))
    return found


_SIZES = tuple(field.name for field in dataclasses.fields(Architecture) if field.default is dataclasses.MISSING)
_NEMO_NAME = {"seq_length": "encoder_seq_length", "vocab_size": "override_vocab_size"}


def _linear_shapes(arch: Architecture) -> dict[str, LinearShape]:
    """Group to shape of every linear that some layer of the model has."""
    every = range(arch.num_layers)
    queries, keys = arch.kv_channels * arch.num_attention_heads, arch.kv_channels * arch.num_query_groups
    dense = [layer for layer in every if arch.mixture is None or layer not in arch.mixture.layers]
    shapes = attention_linears(arch.hidden_size, queries, keys, every)
    shapes |= mlp_linears(arch.hidden_size, arch.ffn_hidden_size, arch.gated, dense)
    shapes |= arch.mixture.linears(arch.hidden_size, arch.gated) if arch.mixture else {}
    return {group: shape for group, shape in shapes.items() if shape.layers}


def _sizes_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sizes, with NeMo's defaults for null. A size that is missing or follows from a wrong one becomes 1:
    `from_model_config` reports the cause."""
    hidden, heads = _hidden_and_heads(cfg)
    derived = {"ffn_hidden_size": 4 * hidden, "num_query_groups": heads, "kv_channels": max(hidden // heads, 1)}
    sizes = {name: cfg.get(_NEMO_NAME.get(name, name)) for name in _SIZES}
    return {name: derived.get(name, 1) if value is None else value for name, value in sizes.items()}


def _hidden_and_heads(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """Returns hidden_size and num_attention_heads. Both are 1 if one of them is wrong; `Architecture` reports it."""
    hidden, heads = cfg.get("hidden_size"), cfg.get("num_attention_heads")
    return (hidden, heads) if is_whole_number(hidden) and is_whole_number(heads) else (1, 1)


def _options_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what only `num_parameters` needs, with NeMo's defaults."""
    return {
        "vocab_size": cfg.get("override_vocab_size"),
        "gated": str(cfg.get("activation", "gelu")).endswith("glu"),
        "bias": bool(cfg.get("bias", True)),
        "qkv_bias": bool(cfg.get("qkv_bias", False)),
        "qk_norm": bool(cfg.get("qk_layernorm", False)),
        "norm_bias": "rms" not in str(cfg.get("normalization", "LayerNorm")).lower(),
        "learned_positions": cfg.get("position_embedding_type", "learned_absolute") == "learned_absolute",
        "shared_output": bool(cfg.get("share_embeddings_and_output_weights", True)),
    }


def divisors(number: int) -> str:
    """Lists a number's divisors, for messages."""
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """megatron-core's mixture of experts, which replaces the MLP of some layers."""

    num_experts: int
    ffn_hidden_size: int
    """Width inside one expert."""
    shared_ffn_hidden_size: int | None = None
    """Width inside all shared experts together. None: no shared experts."""
    layers: tuple[int, ...]
    """Numbers, from 0, of the layers that have experts. The other layers are dense."""

    @classmethod
    def from_model_config(cls, cfg: Mapping[str, Any]) -> Mixture | None:
        """Reads megatron-core's keys num_moe_experts, moe_ffn_hidden_size, moe_shared_expert_intermediate_size and
        moe_layer_freq. Returns None for a dense model. Absent and null keys mean what they mean in megatron-core.

        Raises:
            ConfigError: with all wrong values.
        """
        if cfg.get("num_moe_experts") is None:
            return None
        hidden, ffn = cfg.get("hidden_size"), cfg.get("ffn_hidden_size")
        width = cfg.get("moe_ffn_hidden_size") or ffn or 4 * (hidden if is_whole_number(hidden) else 1)
        sizes = {"num_moe_experts": cfg["num_moe_experts"], "moe_ffn_hidden_size": width}
        shared = cfg.get("moe_shared_expert_intermediate_size")
        if shared is not None:
            sizes["moe_shared_expert_intermediate_size"] = shared
        problems = Problems()
        for name, value in sizes.items():
            problems.whole_number(f"model.{name}", value)
        num_layers = cfg.get("num_layers")
        layers = _layers_with_experts(cfg.get("moe_layer_freq"), num_layers if is_whole_number(num_layers) else 1)
        if layers is None and is_whole_number(num_layers):
            problems.append(
                f"model.moe_layer_freq={cfg['moe_layer_freq']!r}: must be a whole number of at least 1, or a list of "
                f"num_layers={num_layers} zeros and ones"
            )
        problems.raise_if_any()
        return cls(
            num_experts=sizes["num_moe_experts"],
            ffn_hidden_size=width,
            shared_ffn_hidden_size=shared,
            layers=layers or (),
        )

    def linears(self, hidden_size: int, gated: bool) -> dict[str, LinearShape]:
        """Group to shape of the experts' and the shared experts' linears."""
        parts = {
            "experts": (self.ffn_hidden_size, self.num_experts),
            "shared_experts": (self.shared_ffn_hidden_size, 1),
        }
        return {
            f"{part}.{linear}": shape
            for part, (width, num_experts) in parts.items()
            if width is not None
            for linear, shape in mlp_linears(hidden_size, width, gated, self.layers, num_experts).items()
        }


def _layers_with_experts(freq: object, num_layers: int) -> tuple[int, ...] | None:
    """Returns the layers that have experts. None if megatron-core does not accept the value."""
    if freq is None:
        freq = 1
    if is_whole_number(freq):
        return tuple(range(0, num_layers, freq))
    if isinstance(freq, list) and len(freq) == num_layers and all(has in (0, 1) for has in freq):
        return tuple(layer for layer, has in enumerate(freq) if has)
    return None
