# SPDX-License-Identifier: Apache-2.0
"""Describes how a model is spread over ranks, and checks whether that can work. Needs neither torch nor a model.

The keys are NeMo's (``model.tensor_model_parallel_size``, ``trainer.devices``). Absent and null keys mean what they mean
in NeMo.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from nemo_tied_lora.adapter.experts import refused_layouts
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.architecture import Architecture, divisors, selected_linears

__all__ = ["Architecture", "Layout", "check", "check_ranks", "fsdp_problems", "selected_linears", "stage_layers"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parallel sizes of a run. The world size is num_nodes * devices = tp * pp * cp * dp.

    Raises:
        ConfigError: with every size that is not a whole number of at least 1.
    """

    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    dp_size: int | None = None
    """None: the world size divided by the other sizes."""
    virtual_pp_size: int | None = None
    """Model chunks on each pipeline stage (interleaved schedule). None: one, not interleaved."""
    sequence_parallel: bool = False
    """Split the sequence over the tensor-parallel ranks between the linears. No effect at tp_size 1."""
    ep_size: int = 1
    """Ranks that share the experts of a layer."""
    num_nodes: int = 1
    devices: int = 1
    """Ranks on each node."""
    micro_batch_size: int | None = None
    """Sequences in one forward pass of one data-parallel rank. None: batches are not checked."""
    global_batch_size: int | None = None
    """Sequences in one optimizer step. None: batches are not checked."""

    def __post_init__(self) -> None:
        optional = ("dp_size", "virtual_pp_size", "micro_batch_size", "global_batch_size")
        problems = Problems()
        for name, value in vars(self).items():
            if name != "sequence_parallel" and not (value is None and name in optional):
                problems.whole_number(_LAYOUT_KEYS[name], value)
        problems.flag("model.sequence_parallel", self.sequence_parallel)
        problems.raise_if_any()

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Layout:
        """Reads a NeMo configuration with the sections ``model`` and ``trainer``. Absent and null keys mean 1.

        Raises:
            ConfigError: a size is out of bounds, or a key asks for stages of unequal size.
        """
        sections = {"model": cfg.get("model") or {}, "trainer": cfg.get("trainer") or {}}
        keys = {name: path.split(".") for name, path in _LAYOUT_KEYS.items()}
        found = {name: sections.get(path[0], {}).get(path[-1]) for name, path in keys.items()}
        values: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
        devices = values.get("devices")
        if isinstance(devices, Sequence) and not isinstance(
            devices, str
        ):  # Lightning also accepts a list of device numbers
            values["devices"] = len(devices)
        problems = Problems(
            f"model.{key}={sections['model'][key]!r}: stages of unequal size are not supported; remove it"
            for key in _UNEQUAL_STAGES
            if sections["model"].get(key)
        )
        return problems.build(cls, **values)

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
        """dp_size, or if it is None, what the world size leaves. 0 if the world is too small; `check` refuses that."""
        return self.dp_size or self.world_size // (self.tp_size * self.pp_size * self.cp_size)


def stage_layers(arch: Architecture, layout: Layout) -> list[list[int]]:
    """Returns each pipeline stage's global layer numbers. With chunks, stage p holds chunks p, p + PP, p + 2 PP, ..."""
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
    """Returns every reason why this model, layout and adapter cannot run together, one line per problem.

    The adapter's rank need not be divisible by the tensor-parallel size.

    Args:
        config: None: check only the model and the layout.
    """
    parts = [_world_problems(layout), _tensor_parallel_problems(arch, layout), _sequence_problems(arch, layout)]
    parts += [_pipeline_problems(arch, layout), _batch_problems(layout)]
    parts += [] if config is None else [_adapter_problems(arch, config), _expert_problems(arch, layout, config)]
    return [problem for part in parts for problem in part]


def check_ranks(layout: Layout) -> list[str]:
    """The part of `check` that needs no model: ranks and parallel sizes, batches and ranks."""
    return [*_world_problems(layout), *_batch_problems(layout)]


_LAYOUT_KEYS = {
    "tp_size": "model.tensor_model_parallel_size",
    "pp_size": "model.pipeline_model_parallel_size",
    "cp_size": "model.context_parallel_size",
    "dp_size": "dp_size",  # not a NeMo key: NeMo derives it from the world size
    "virtual_pp_size": "model.virtual_pipeline_model_parallel_size",
    "sequence_parallel": "model.sequence_parallel",
    "ep_size": "model.expert_model_parallel_size",
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


def fsdp_problems(model: Mapping[str, Any]) -> Iterator[str]:
    """Yields one line if the section `model` asks for FSDP, by itself or in a layout's YAML."""
    if model.get("fsdp"):
        yield (
            f"model.fsdp={str(model['fsdp']).lower()}: not possible; FSDP would shard what all layers share; use tensor or "
            "pipeline parallel"
        )


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
    fitting = divisors(math.gcd(*sizes.values()))
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
            f"use one of {divisors(layers)}"
        )
    elif layout.virtual_pp_size is not None and pp_size == 1:
        yield f"model.virtual_pipeline_model_parallel_size={chunks}: needs at least 2 pipeline stages; set it to null"
    elif layers % (pp_size * chunks):
        yield (
            f"model.virtual_pipeline_model_parallel_size={chunks}: a stage's layers, {layers // pp_size}, are not "
            f"divisible by it; use one of {divisors(layers // pp_size)}"
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
    for target, shape in selected_linears(arch, config).items():
        bound = min(shape.sides)
        if config.rank > bound:
            yield (
                f"rank={config.rank}: more than the {bound} of {target}'s smaller side; "
                f"use at most {bound}, or leave {target} out of targets"
            )


def _expert_problems(arch: Architecture, layout: Layout, config: TiedLoraConfig) -> Iterator[str]:
    model = SimpleNamespace(sequence_parallel=layout.sequence_parallel, moe_token_dispatcher_type="alltoall")
    sizes = {"tp_size": layout.tp_size, "ep_size": layout.ep_size, "etp_size": layout.tp_size}
    yield from (f"model.{problem}" for problem in refused_layouts(model, selected_linears(arch, config), **sizes))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
