# SPDX-License-Identifier: Apache-2.0
"""What a model looks like and how it is laid over ranks, from plain config values; neither torch nor a model needed.

The keys are NeMo's (``model.num_layers``, ``model.tensor_model_parallel_size``, ``trainer.devices``), and so are the
meanings of absent and null ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from nemo_tied_lora.config import ConfigError, TiedLoraConfig
from nemo_tied_lora.counting import TargetShape

__all__ = ["Architecture", "Layout", "check", "stage_layers", "target_shapes"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Megatron GPT's sizes, whole (not one rank's shard).

    Raises:
        ConfigError: a size is not a whole number of at least 1, or sizes do not fit each other.
    """

    num_layers: int
    """Transformer layers, over all stages."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width inside the MLP, after the gate where it is gated."""
    num_attention_heads: int
    num_query_groups: int
    """Heads of K and of V; fewer than num_attention_heads with grouped queries."""
    kv_channels: int
    """Width of one head."""
    seq_length: int
    """Tokens in a sequence (NeMo's encoder_seq_length)."""
    vocab_size: int | None = None
    """Rows of the embedding. None: not known (it then comes from the tokenizer); num_parameters is None too."""
    gated: bool = False
    """linear_fc1 holds gate and up: twice ffn_hidden_size rows."""
    bias: bool = True
    """Every linear of a layer has a bias."""
    qkv_bias: bool = False
    """linear_qkv has a bias although the others have none."""
    qk_norm: bool = False
    """Q and K are normalised per head."""
    norm_bias: bool = True
    """Norms hold a bias beside their weight (LayerNorm does, RMSNorm does not)."""
    learned_positions: bool = False
    """A learned position embedding of seq_length rows."""
    shared_output: bool = True
    """The output layer is the embedding."""

    def __post_init__(self) -> None:
        problems = [
            f"model.{_NEMO_NAME.get(name, name)}={value!r}: must be a whole number of at least 1"
            for name, value in vars(self).items()
            if not _is_size(value) and (name in _SIZES or (name == "vocab_size" and value is not None))
        ]
        if not problems and self.num_attention_heads % self.num_query_groups:
            problems.append(
                f"model.num_query_groups={self.num_query_groups}: must divide model.num_attention_heads="
                f"{self.num_attention_heads}; use one of {_divisors(self.num_attention_heads)}"
            )
        if problems:
            raise ConfigError(problems)

    @classmethod
    def from_model_config(cls, cfg: Mapping[str, Any]) -> Architecture:
        """From a NeMo GPT model config (the ``model`` section, or a ``.nemo`` file's model_config.yaml).

        As in NeMo: null or absent ffn_hidden_size is 4 * hidden_size, num_query_groups is num_attention_heads,
        kv_channels is hidden_size / num_attention_heads, and an activation that ends in "glu" is gated.

        Raises:
            ConfigError: all missing keys and bad values together.
        """
        problems = [
            f"model.{key}: missing; set it to the base model's value"
            for key in ("num_layers", "hidden_size", "num_attention_heads", "encoder_seq_length")
            if cfg.get(key) is None
        ]
        problems += [
            f"model.{key}={cfg[key]!r}: such a model is not supported; use a dense GPT and remove the key"
            for key in ("num_moe_experts", "multi_latent_attention")
            if cfg.get(key)
        ]
        hidden, heads = _hidden_and_heads(cfg)
        if cfg.get("kv_channels") is None and hidden % heads:
            problems.append(
                f"model.hidden_size={hidden}: not divisible by model.num_attention_heads={heads}; "
                f"set model.kv_channels, or use one of {_divisors(hidden)} heads"
            )
        return _built(cls, {**_sizes_of(cfg), **_options_of(cfg)}, problems)

    @property
    def num_parameters(self) -> int | None:
        """The base's parameters: embeddings, layers with norms and biases, last norm, output layer."""
        if self.vocab_size is None:
            return None
        shapes = _linear_shapes(self)
        norm = self.hidden_size * (2 if self.norm_bias else 1)
        layer = sum(inputs * outputs for inputs, outputs in shapes.values()) + 2 * norm
        layer += sum(outputs for _, outputs in shapes.values()) if self.bias else 0
        layer += shapes["linear_qkv"][1] if self.qkv_bias and not self.bias else 0
        layer += 2 * self.kv_channels * (2 if self.norm_bias else 1) if self.qk_norm else 0
        rows = self.vocab_size * (1 if self.shared_output else 2) + self.seq_length * self.learned_positions
        return self.num_layers * layer + norm + rows * self.hidden_size


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the model is laid over ranks; the world is num_nodes * devices = tp * pp * cp * dp.

    Raises:
        ConfigError: lists every size that is not a whole number of at least 1.
    """

    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    dp_size: int | None = None
    """None: whatever the world leaves."""
    virtual_pp_size: int | None = None
    """Model chunks on each pipeline stage (interleaved schedule). None: one, not interleaved."""
    sequence_parallel: bool = False
    """Split the sequence over the tensor-parallel ranks between the linears; means nothing at tp_size 1."""
    num_nodes: int = 1
    devices: int = 1
    """Ranks on each node."""
    micro_batch_size: int | None = None
    """Sequences in one forward pass of one data-parallel rank. None: batches are not checked."""
    global_batch_size: int | None = None
    """Sequences in one optimizer step. None: batches are not checked."""

    def __post_init__(self) -> None:
        optional = ("dp_size", "virtual_pp_size", "micro_batch_size", "global_batch_size")
        problems = [
            f"{_LAYOUT_KEYS[name]}={value!r}: must be a whole number of at least 1"
            for name, value in vars(self).items()
            if name != "sequence_parallel" and not _is_size(value) and not (value is None and name in optional)
        ]
        if self.sequence_parallel not in (True, False):
            problems.append(f"model.sequence_parallel={self.sequence_parallel!r}: must be true or false")
        if problems:
            raise ConfigError(problems)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Layout:
        """From a whole NeMo config with the sections ``model`` and ``trainer``; absent and null keys mean 1.

        Raises:
            ConfigError: sizes out of bounds, or keys that ask for stages of unequal size.
        """
        sections = {"model": cfg.get("model") or {}, "trainer": cfg.get("trainer") or {}}
        keys = {name: path.split(".") for name, path in _LAYOUT_KEYS.items()}
        found = {name: sections.get(path[0], {}).get(path[-1]) for name, path in keys.items()}
        values: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
        devices = values.get("devices")
        if isinstance(devices, Sequence) and not isinstance(devices, str):  # Lightning also takes their numbers
            values["devices"] = len(devices)
        problems = [
            f"model.{key}={sections['model'][key]!r}: stages of unequal size are not supported; remove it"
            for key in _UNEQUAL_STAGES
            if sections["model"].get(key)
        ]
        return _built(cls, values, problems)

    @property
    def world_size(self) -> int:
        """num_nodes * devices."""
        return self.num_nodes * self.devices

    @property
    def num_chunks(self) -> int:
        """Model chunks on each stage."""
        return self.virtual_pp_size or 1

    @property
    def resolved_dp_size(self) -> int:
        """dp_size, or what the world leaves; 0 where the world is too small (`check` refuses that)."""
        return self.dp_size or self.world_size // (self.tp_size * self.pp_size * self.cp_size)


def target_shapes(arch: Architecture, config: TiedLoraConfig) -> dict[str, TargetShape]:
    """Target name to (in, out) of the whole linear and how many selected layers have it."""
    num_layers = arch.num_layers if config.layers is None else len(config.layers)
    shapes = _linear_shapes(arch)
    return {target: TargetShape(*shapes[target], num_layers) for target in config.targets}


def stage_layers(arch: Architecture, layout: Layout) -> list[list[int]]:
    """Each pipeline stage's global layer numbers. With chunks, stage p holds chunks p, p + PP, p + 2 PP, ..."""
    size = arch.num_layers // (layout.pp_size * layout.num_chunks)
    return [
        [
            layer
            for chunk in range(layout.num_chunks)
            for layer in range((chunk * layout.pp_size + stage) * size, (chunk * layout.pp_size + stage + 1) * size)
        ]
        for stage in range(layout.pp_size)
    ]


def check(arch: Architecture, layout: Layout, config: TiedLoraConfig | None = None) -> list[str]:
    """Everything that keeps this model, layout and adapter from running together, a line each; empty if all is well.

    The rank is free of the layout: it need not be divisible by the tensor-parallel size. With config None only the
    model and the layout are looked at.
    """
    parts = [_world_problems(layout), _tensor_parallel_problems(arch, layout), _sequence_problems(arch, layout)]
    parts += [_pipeline_problems(arch, layout), _batch_problems(layout)]
    parts += [] if config is None else [_adapter_problems(arch, config)]
    return [problem for part in parts for problem in part]


_SIZES = tuple(field.name for field in dataclasses.fields(Architecture) if field.default is dataclasses.MISSING)
_NEMO_NAME = {"seq_length": "encoder_seq_length", "vocab_size": "override_vocab_size"}
_LAYOUT_KEYS = {
    "tp_size": "model.tensor_model_parallel_size",
    "pp_size": "model.pipeline_model_parallel_size",
    "cp_size": "model.context_parallel_size",
    "dp_size": "dp_size",  # of the library only: NeMo derives it from the world
    "virtual_pp_size": "model.virtual_pipeline_model_parallel_size",
    "sequence_parallel": "model.sequence_parallel",
    "num_nodes": "trainer.num_nodes",
    "devices": "trainer.devices",
    "micro_batch_size": "model.micro_batch_size",
    "global_batch_size": "model.global_batch_size",
}
_UNEQUAL_STAGES = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)


_Checked = TypeVar("_Checked")


def _built(build: Callable[..., _Checked], values: Mapping[str, Any], problems: list[str]) -> _Checked:
    """``build(**values)``; what it refuses is reported together with the problems found before."""
    try:
        built = build(**values)
    except ConfigError as refused:
        raise ConfigError([*problems, *refused.problems]) from None
    if problems:
        raise ConfigError(problems)
    return built


def _linear_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Target name to (in, out)."""
    attention = arch.kv_channels * arch.num_attention_heads
    return {
        "linear_qkv": (arch.hidden_size, attention + 2 * arch.kv_channels * arch.num_query_groups),
        "linear_proj": (attention, arch.hidden_size),
        "linear_fc1": (arch.hidden_size, arch.ffn_hidden_size * (2 if arch.gated else 1)),
        "linear_fc2": (arch.ffn_hidden_size, arch.hidden_size),
    }


def _sizes_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes, with NeMo's meaning of null. What is missing, or follows from a bad size, stands in as 1: the cause
    is named elsewhere."""
    hidden, heads = _hidden_and_heads(cfg)
    derived = {"ffn_hidden_size": 4 * hidden, "num_query_groups": heads, "kv_channels": max(hidden // heads, 1)}
    sizes = {name: cfg.get(_NEMO_NAME.get(name, name)) for name in _SIZES}
    return {name: derived.get(name, 1) if value is None else value for name, value in sizes.items()}


def _hidden_and_heads(cfg: Mapping[str, Any]) -> tuple[int, int]:
    """hidden_size and num_attention_heads; both 1 where either is not a size, which is reported by name."""
    hidden, heads = cfg.get("hidden_size"), cfg.get("num_attention_heads")
    return (hidden, heads) if _is_size(hidden) and _is_size(heads) else (1, 1)


def _options_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What only the base's own parameter count needs, with NeMo's defaults."""
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


def _world_problems(layout: Layout) -> Iterator[str]:
    tp_size, pp_size, cp_size, world = layout.tp_size, layout.pp_size, layout.cp_size, layout.world_size
    model_ranks = tp_size * pp_size * cp_size
    sizes = f"tensor {tp_size} x pipeline {pp_size} x context {cp_size}"
    ranks = f"trainer.num_nodes={layout.num_nodes} x trainer.devices={layout.devices}: world size {world}"
    if world % model_ranks:
        wanted = _round_up(world, model_ranks)
        yield f"{ranks} is not a multiple of {sizes} = {model_ranks}; ask for {wanted} ranks, or split the model less"
    elif layout.dp_size is not None and world != model_ranks * layout.dp_size:
        yield f"{ranks} is not {sizes} x dp_size={layout.dp_size}; set dp_size to {world // model_ranks}"


def _tensor_parallel_problems(arch: Architecture, layout: Layout) -> Iterator[str]:
    tp_size = layout.tp_size
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
    sizes: dict[str, int] = {name: getattr(arch, name) for name in names}
    if arch.vocab_size is not None:
        sizes["override_vocab_size"] = arch.vocab_size
    fitting = _divisors(math.gcd(*sizes.values()))
    for name, value in sizes.items():
        if value % tp_size:
            yield (
                f"model.tensor_model_parallel_size={tp_size}: model.{name}={value} is not divisible by it; "
                f"use one of {fitting}"
            )


def _sequence_problems(arch: Architecture, layout: Layout) -> Iterator[str]:
    length, tp_size, cp_size = arch.seq_length, layout.tp_size, layout.cp_size
    context = 2 * cp_size if cp_size > 1 else 1
    if length % context:
        yield (
            f"model.context_parallel_size={cp_size}: model.encoder_seq_length={length} is not divisible by twice it; "
            f"use a sequence length of {_round_up(length, context)}, or a context_parallel_size of 1"
        )
    elif layout.sequence_parallel and tp_size > 1 and (length // cp_size) % tp_size:
        yield (
            f"model.sequence_parallel=true: model.encoder_seq_length={length} / context_parallel_size={cp_size} is "
            f"not divisible by tensor_model_parallel_size={tp_size}; use a sequence length of "
            f"{_round_up(length, math.lcm(context, cp_size * tp_size))}, or sequence_parallel=false"
        )


def _pipeline_problems(arch: Architecture, layout: Layout) -> Iterator[str]:
    pp_size, chunks, layers = layout.pp_size, layout.num_chunks, arch.num_layers
    if layers % pp_size:
        yield (
            f"model.pipeline_model_parallel_size={pp_size}: model.num_layers={layers} is not divisible by it; "
            f"use one of {_divisors(layers)}"
        )
    elif layout.virtual_pp_size is not None and pp_size == 1:
        yield f"model.virtual_pipeline_model_parallel_size={chunks}: needs at least 2 pipeline stages; set it to null"
    elif layers % (pp_size * chunks):
        yield (
            f"model.virtual_pipeline_model_parallel_size={chunks}: a stage's layers, {layers // pp_size}, are not "
            f"divisible by it; use one of {_divisors(layers // pp_size)}"
        )


def _batch_problems(layout: Layout) -> Iterator[str]:
    micro, whole, dp_size = layout.micro_batch_size, layout.global_batch_size, layout.resolved_dp_size
    if micro is None or whole is None or dp_size == 0:
        return
    if whole % (micro * dp_size):
        yield (
            f"model.global_batch_size={whole}: not divisible by micro_batch_size={micro} x data-parallel size "
            f"{dp_size}; use {_round_up(whole, micro * dp_size)}, or another micro_batch_size"
        )
    elif layout.num_chunks > 1 and whole // (micro * dp_size) % layout.pp_size:
        yield (
            f"model.global_batch_size={whole}: an interleaved schedule needs the number of microbatches, "
            f"{whole // (micro * dp_size)}, divisible by pipeline_model_parallel_size={layout.pp_size}; use "
            f"{_round_up(whole, micro * dp_size * layout.pp_size)}"
        )


def _adapter_problems(arch: Architecture, config: TiedLoraConfig) -> Iterator[str]:
    outside = [layer for layer in config.layers or () if layer >= arch.num_layers]
    if outside:
        yield f"layers: {outside} do not exist; the model has layers 0 to {arch.num_layers - 1}, counted from 0"
    for target in config.targets:
        bound = min(_linear_shapes(arch)[target])
        if config.rank > bound:
            yield (
                f"rank={config.rank}: more than the {bound} of {target}'s smaller side; "
                f"use at most {bound}, or leave {target} out of targets"
            )


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
