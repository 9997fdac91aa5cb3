# SPDX-License-Identifier: Apache-2.0
"""Computes what an adapter costs on a layout: parameters, bytes per rank, file size, bytes sent. Builds no model.

Every number is for the rank that holds most, on the pipeline stage with the most selected linears. Let r be the
adapter's rank, T, P, C, D the tensor, pipeline, context and data parallel sizes. A rank holds its part of each factor
(see `shapes`) once per model chunk if it is tied, else once per selected layer of its stage. In a mixture it holds one
per expert, except what experts share (see `experts`). A frozen A or B has no gradient and no optimizer state; a
frozen u or v is 1 and is not stored. Collectives are counted as rings: a rank sends 2 (n-1)/n of what an all-reduce over
n ranks sums, and (n-1)/n of the whole tensor in an all-gather or a reduce-scatter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nemo_tied_lora.adapter.experts import is_routed
from nemo_tied_lora.adapter.param_count import parameter_counts, tied_copies
from nemo_tied_lora.checkpoint.nemo_adapter_packing import largest_file
from nemo_tied_lora.config import PRESETS, TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, is_whole_number
from nemo_tied_lora.planning.architecture import Architecture, selected_linears
from nemo_tied_lora.planning.parallel_layout import Layout, stage_layers

__all__ = [
    "Precision",
    "RankShare",
    "check_numbers",
    "network_bytes",
    "plan",
    "rank_share",
    "several_adapters",
]


_GRADIENT_BYTES = 4
_FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes per element. weights: in memory and in the file. master: Adam's copy of the weights; 0 if it has none."""

    weights: int
    activations: int
    gradients: int
    master: int
    moments: int
    description: str

    @classmethod
    def from_names(cls, precision: object, amp_O2: bool) -> Precision:
        """Reads NeMo's ``trainer.precision`` and ``model.megatron_amp_O2``.

        Raises:
            ConfigError: the precision is unknown, or is 32 together with megatron_amp_O2.
        """
        name = str(precision)
        half = name in ("bf16", "bf16-mixed", "bf16-true", "16", "16-mixed", "16-true")
        if not half and name not in ("32", "32-true"):
            raise ConfigError([f"trainer.precision={precision!r}: unknown; choose one of bf16, bf16-mixed, 16, 32"])
        if amp_O2 and not half:
            raise ConfigError([f"model.megatron_amp_O2=true: needs trainer.precision=bf16 or 16, not {name}"])
        if half and amp_O2:
            text = f"{name} with O2: 2-byte weights, 4-byte gradients, Adam with 4-byte master weights and two moments"
            return cls(weights=2, activations=2, gradients=_GRADIENT_BYTES, master=4, moments=8, description=text)
        text = "4-byte weights, 4-byte gradients, Adam with two 4-byte moments"
        text = f"{name}, {2 if half else 4}-byte activations: {text}"
        return cls(
            weights=4,
            activations=2 if half else 4,
            gradients=_GRADIENT_BYTES,
            master=0,
            moments=8,
            description=text,
        )

    def of_adapter(self, config: TiedLoraConfig) -> Precision:
        """The adapter's own: with ``dtype: float32`` its weights and h are float32, and Adam needs no copy of them."""
        if config.dtype is None or self.weights == _FLOAT32_BYTES:
            return self
        return replace(self, weights=_FLOAT32_BYTES, activations=_FLOAT32_BYTES, master=0)


@dataclass(frozen=True)
class RankShare:
    """Elements on one rank. held: in memory. trained: with a gradient. tied: with a gradient that is summed over the
    pipeline, counted once for all chunks. partial: with a gradient that sequence parallelism sums over TP."""

    held: int
    trained: int
    tied: int
    partial: int


def rank_share(arch: Architecture, layout: Layout, config: TiedLoraConfig) -> RankShare:
    """Counts the elements on the rank that holds most."""
    num_layers = _fullest_stage(arch, layout, config)
    held = trained = tied = partial = 0
    for group, shape in selected_linears(arch, config).items():
        ties = tied_copies(shape, config)
        for factor in config.stored:
            is_trained, is_tied = factor in config.trained, factor in config.tied
            one = math.prod(shape.local_factor_shape(factor, config.rank, layout.tp_size))
            copies = one * (layout.num_chunks * ties if is_tied else num_layers[group] * shape.num_experts)
            held += copies
            trained += copies * is_trained
            tied += one * ties * (is_trained and is_tied)
            partial += copies * (is_trained and shape.sharded_dim(factor) is None)
    return RankShare(held, trained, tied, partial)


def network_bytes(arch: Architecture, layout: Layout, config: TiedLoraConfig, precision: Precision) -> dict[str, int]:
    """Returns the bytes that one rank sends for the adapter, by purpose.

    reduced_bytes_per_step: the all-reduce of tied gradients over the pipeline group.
    sequence_parallel_bytes_per_step: the all-reduce, over the tensor group, of gradients that are partial over the sequence.
    data_parallel_bytes_per_step: the all-reduce of all gradients over the D * C ranks that hold the same shards.
    activation_bytes_per_microbatch: one r-wide exchange per selected linear, in forward or in backward (under sequence
    parallelism, half in each). Routed experts exchange nothing. Without recomputation.
    """
    share = rank_share(arch, layout, config)
    sequence_parallel = layout.sequence_parallel and layout.tp_size > 1
    linears = sum(n for group, n in _fullest_stage(arch, layout, config).items() if not is_routed(group))
    tokens = (layout.micro_batch_size or 1) * arch.seq_length // layout.cp_size
    replicas = layout.resolved_dp_size * layout.cp_size
    sent = {
        "reduced_bytes_per_step": (share.tied * precision.gradients, layout.pp_size),
        "sequence_parallel_bytes_per_step": (share.partial * precision.gradients * sequence_parallel, layout.tp_size),
        "data_parallel_bytes_per_step": (share.trained * precision.gradients, replicas),
        "activation_bytes_per_microbatch": (linears * tokens * config.rank * precision.activations, layout.tp_size),
    }
    return {purpose: _all_reduced(num_bytes, ranks) for purpose, (num_bytes, ranks) in sent.items()}


def plan(arch: Architecture, layout: Layout, config: TiedLoraConfig, precision: Precision) -> dict[str, Any]:
    """Returns all numbers of the adapter, those of LoRA with the same rank on the same linears, and their ratios, as JSON values.

    The model and the layout must have passed `parallel_layout.check`. A ratio is None if LoRA's number is 0.
    """
    alike = {"rank": config.rank, "targets": config.targets, "layers": config.layers, "dtype": config.dtype}
    lora = TiedLoraConfig.preset("lora", **alike)
    precision = precision.of_adapter(config)
    ours, loras = _numbers(arch, layout, config, precision), _numbers(arch, layout, lora, precision)
    base = arch.num_parameters
    return {
        "trained_parameters": ours["trained_parameters"],
        "lora_parameters": loras["trained_parameters"],
        "base_parameters": base,
        "percent_of_base": None if base is None else 100 * ours["trained_parameters"] / base,
        "targets": _per_target(arch, config, lora),
        "file_bytes": ours["file_bytes"],
        "reduced_bytes_per_step": ours["reduced_bytes_per_step"],
        "numbers": ours,
        "lora_numbers": loras,
        "share_of_lora": {name: ours[name] / loras[name] if loras[name] else None for name in ours},
        "adapter": config.as_dict(),
        "architecture": asdict(arch),
        "layout": {**asdict(layout), "dp_size": layout.resolved_dp_size, "world_size": layout.world_size},
        "assumptions": [
            precision.description + (", the adapter in float32" if config.dtype else ""),
            "per rank: the rank that holds most; optimizer state whole on every data-parallel rank",
            "network: bytes sent by one rank, ring collectives, activations not recomputed",
            "LoRA: this project's preset lora, same rank, targets and layers",
            "file: an upper bound, at most 64 KiB above the truth",
        ],
    }


def _numbers(arch: Architecture, layout: Layout, config: TiedLoraConfig, precision: Precision) -> dict[str, int]:
    shapes = selected_linears(arch, config)
    share = rank_share(arch, layout, config)
    per_rank = {
        "weight_bytes_per_rank": share.held * precision.weights,
        "gradient_bytes_per_rank": share.trained * precision.gradients,
        "optimizer_bytes_per_rank": share.trained * (precision.master + precision.moments),
    }
    return {
        "trained_parameters": sum(parameter_counts(shapes, config).values()),
        "trained_parameters_per_rank": share.trained,
        **per_rank,
        "bytes_per_rank": sum(per_rank.values()),
        "file_bytes": largest_file(config, shapes, precision.weights),
        **network_bytes(arch, layout, config, precision),
    }


def _per_target(arch: Architecture, config: TiedLoraConfig, lora: TiedLoraConfig) -> dict[str, dict[str, Any]]:
    shapes = selected_linears(arch, config)
    ours, loras = parameter_counts(shapes, config), parameter_counts(shapes, lora)
    return {
        target: {
            "in_features": shape.in_features,
            "out_features": shape.out_features,
            "num_layers": len(shape.layers),
            "num_experts": shape.num_experts,
            "trained_parameters": ours[target],
            "lora_parameters": loras[target],
            "share_of_lora": ours[target] / loras[target],
        }
        for target, shape in shapes.items()
    }


def _fullest_stage(arch: Architecture, layout: Layout, config: TiedLoraConfig) -> dict[str, int]:
    """Returns the number of selected layers of each group, on the stage with the most selected linears."""
    shapes = selected_linears(arch, config)
    stages = [
        {group: len(set(layers).intersection(shape.layers)) for group, shape in shapes.items()}
        for layers in stage_layers(arch, layout)
    ]
    return max(stages, key=lambda stage: sum(n * shapes[group].num_experts for group, n in stage.items()))


def _all_reduced(num_bytes: int, ranks: int) -> int:
    """Returns the bytes that each rank sends in a ring all-reduce of `num_bytes`."""
    return -(-2 * (ranks - 1) * num_bytes // ranks)


def check_numbers(numbers: object) -> tuple[int, ...]:
    """Checks the list of numbers of adapters to plan for.

    Raises:
        ConfigError: not a list of whole numbers of at least 1.
    """
    if isinstance(numbers, (list, tuple)) and numbers and all(map(is_whole_number, numbers)):
        return tuple(numbers)
    raise ConfigError([f"adapters={numbers!r}: must be a list of whole numbers of at least 1, such as [1, 10, 1000]"])


def several_adapters(
    arch: Architecture, layout: Layout, config: TiedLoraConfig, precision: Precision, numbers: Sequence[int]
) -> dict[str, Any]:
    """Returns the bytes of several adapters' weights on one model, as JSON values.

    There is an entry for "this adapter" and one for every preset with the same rank, targets and layers:

    - own_bytes and shared_bytes: per adapter, and once for all adapters, on the rank that holds most
    - bytes_per_rank: on that rank, one number for each of `numbers`
    - bytes: on all ranks of one copy of the model, one number for each of `numbers`
    """
    alike = {"rank": config.rank, "targets": config.targets, "layers": config.layers}
    precision = precision.of_adapter(config)
    configs = {"this adapter": config} | {name: TiedLoraConfig.preset(name, **alike) for name in PRESETS}
    return {
        "numbers": list(numbers),
        "adapters": {name: _bytes(arch, layout, each, precision, numbers) for name, each in configs.items()},
    }


def _bytes(
    arch: Architecture, layout: Layout, config: TiedLoraConfig, precision: Precision, numbers: Sequence[int]
) -> dict[str, Any]:
    stages = [_stage_elements(arch, layout, config, layers) for layers in stage_layers(arch, layout)]
    own, shared = max(stages, key=sum)
    every_own, every_shared = (layout.tp_size * sum(kind) for kind in zip(*stages, strict=True))
    element = precision.weights
    return {
        "own_bytes": own * element,
        "shared_bytes": shared * element,
        "bytes_per_rank": [(shared + number * own) * element for number in numbers],
        "bytes": [(every_shared + number * every_own) * element for number in numbers],
    }


def _stage_elements(
    arch: Architecture, layout: Layout, config: TiedLoraConfig, layers: Sequence[int]
) -> tuple[int, int]:
    """Returns (elements per adapter, elements that all adapters share) on one rank of a stage with these layers."""
    own = shared = 0
    for shape in selected_linears(arch, config).values():
        num_linears = len(set(layers).intersection(shape.layers)) * shape.num_experts
        for factor in config.stored:
            num_tied = layout.num_chunks * tied_copies(shape, config)
            copies = num_tied if factor in config.tied else num_linears
            elements = copies * math.prod(shape.local_factor_shape(factor, config.rank, layout.tp_size))
            own += elements * (factor in config.trained)
            shared += elements * (factor not in config.trained)
    return own, shared
