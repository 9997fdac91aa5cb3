# SPDX-License-Identifier: Apache-2.0
"""What an adapter costs on a layout: parameters, bytes per rank, file size, bytes on the network. No model is built.

Every number is for the rank that holds most: one of the pipeline stage with the most selected linears. Let r be the
adapter's rank, T, P, C, D the tensor, pipeline, context and data parallel sizes. A rank holds

======  ============  ============  ====  =======
kind    A             B             u     v
======  ============  ============  ====  =======
column  (r, in)       (out/T, r)    (r)   (out/T)
row     (r, in/T)     (out, r)      (r)   (out)
======  ============  ============  ====  =======

once per model chunk where tied, once per selected layer of its stage otherwise, and in a mixture as often for each
expert, but for what experts share (see `experts`; linear_qkv and linear_fc1 are column
parallel, linear_proj and linear_fc2 row parallel). A frozen A or B is held without gradient and optimizer state; a
frozen u or v is 1 and is not held. Collectives are counted as rings: a rank sends 2 (n-1)/n of what an all-reduce over
n ranks sums, and (n-1)/n of the whole tensor in an all-gather or a reduce-scatter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_tied_lora.adapter.experts import is_routed, linear_of, own_names
from nemo_tied_lora.adapter.param_count import factor_numel, parameter_counts, stored_counts, tied_copies
from nemo_tied_lora.adapter.shapes import TargetShape
from nemo_tied_lora.config import FACTORS, PRESETS, TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, is_whole_number
from nemo_tied_lora.planning.architecture import Architecture, selected_groups, target_shapes
from nemo_tied_lora.planning.parallel_layout import Layout, stage_layers

__all__ = [
    "Precision",
    "RankShare",
    "check_numbers",
    "file_bytes",
    "local_numel",
    "network_bytes",
    "plan",
    "rank_share",
    "several_adapters",
]


_COLUMN = ("linear_qkv", "linear_fc1")
# Which factors tensor parallelism splits; the others are replicated, and partial under sequence parallelism.
_SPLIT = {"column": ("B", "v"), "row": ("A",)}
_GRADIENT_BYTES = 4
# model_config.yaml: the adapter's own keys, the layer numbers of every target, and room for facts about the run.
_YAML_ALLOWANCE = 16 * 1024
_TAR_BLOCK, _TAR_RECORD = 512, 10240


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes per element. weights: also the file's. master: Adam's own copy of the weights, 0 where there is none."""

    weights: int
    activations: int
    gradients: int
    master: int
    moments: int
    description: str

    @classmethod
    def from_names(cls, precision: object, amp_O2: bool) -> Precision:
        """From NeMo's ``trainer.precision`` and ``model.megatron_amp_O2``.

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


@dataclass(frozen=True)
class RankShare:
    """Elements on one rank. held: in memory. trained: with a gradient. tied: with a gradient summed over the pipeline,
    once, however many chunks hold a copy. partial: with a gradient summed over TP under sequence parallelism."""

    held: int
    trained: int
    tied: int
    partial: int


def rank_share(arch: Architecture, layout: Layout, config: TiedLoraConfig) -> RankShare:
    """What the rank that holds most holds of each kind."""
    num_layers = _fullest_stage(arch, layout, config)
    held = trained = tied = partial = 0
    for target, shape in target_shapes(arch, config).items():
        kind = "column" if linear_of(target) in _COLUMN else "row"
        ties = tied_copies(shape, config)
        for factor in FACTORS:
            is_trained, is_tied = factor in config.trained, factor in config.tied
            if not is_trained and factor in ("u", "v"):
                continue
            one = local_numel(factor, target, shape, config.rank, layout.tp_size)
            copies = one * (layout.num_chunks * ties if is_tied else num_layers[target] * shape.num_experts)
            held += copies
            trained += copies * is_trained
            tied += one * ties * (is_trained and is_tied)
            partial += copies * (is_trained and factor not in _SPLIT[kind])
    return RankShare(held, trained, tied, partial)


def network_bytes(arch: Architecture, layout: Layout, config: TiedLoraConfig, precision: Precision) -> dict[str, int]:
    """Bytes that one rank sends for the adapter, per purpose.

    reduced_bytes_per_step: a step's one all-reduce of the trained tied tensors' gradients over the pipeline group.
    sequence_parallel_bytes_per_step: a step's all-reduce, over the tensor group, of what is partial over the sequence.
    data_parallel_bytes_per_step: a step's all-reduce of all gradients over the D * C ranks that hold the same shards.
    activation_bytes_per_microbatch: per selected linear one r-wide exchange in forward or backward (two halves under
    sequence parallelism), none for a routed expert's; no recomputation.
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


def file_bytes(shapes: Mapping[str, TargetShape], config: TiedLoraConfig, bytes_per_element: int) -> int:
    """Size of the adapter's `.nemo` file, an upper bound at most 64 KiB above the truth.

    The tensors and the safetensors header are exact. model_config.yaml is allowed 16 KiB, and the tar's own headers,
    padding and end are added.
    """
    tensors = (sum(stored_counts(shapes, config).values()) - _seeded(shapes, config)) * bytes_per_element
    members = [_YAML_ALLOWANCE, 8 + _safetensors_header_bytes(shapes, config, bytes_per_element) + tensors]
    blocks = sum(_TAR_BLOCK + _round_up(size, _TAR_BLOCK) for size in members)
    return _round_up(blocks + 2 * _TAR_BLOCK, _TAR_RECORD)


def plan(arch: Architecture, layout: Layout, config: TiedLoraConfig, precision: Precision) -> dict[str, Any]:
    """Every number of the adapter, of LoRA of the same rank on the same linears, and their ratios, ready for JSON.

    The model and the layout must have passed `layout.check`. A ratio is null where LoRA's number is 0.
    """
    lora = TiedLoraConfig.preset("lora", rank=config.rank, targets=config.targets, layers=config.layers)
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
            precision.description,
            "per rank: the rank that holds most; optimizer state whole on every data-parallel rank",
            "network: bytes sent by one rank, ring collectives, activations not recomputed",
            "LoRA: this project's preset lora, same rank, targets and layers",
            "file: an upper bound, at most 64 KiB above the truth",
        ],
    }


def _numbers(arch: Architecture, layout: Layout, config: TiedLoraConfig, precision: Precision) -> dict[str, int]:
    shapes = target_shapes(arch, config)
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
        "file_bytes": file_bytes(shapes, config, precision.weights),
        **network_bytes(arch, layout, config, precision),
    }


def _per_target(arch: Architecture, config: TiedLoraConfig, lora: TiedLoraConfig) -> dict[str, dict[str, Any]]:
    shapes = target_shapes(arch, config)
    ours, loras = parameter_counts(shapes, config), parameter_counts(shapes, lora)
    return {
        target: {
            **asdict(shape),
            "trained_parameters": ours[target],
            "lora_parameters": loras[target],
            "share_of_lora": ours[target] / loras[target],
        }
        for target, shape in shapes.items()
    }


def _fullest_stage(arch: Architecture, layout: Layout, config: TiedLoraConfig) -> dict[str, int]:
    """Selected layers of each group on the stage that has the most linears."""
    groups = selected_groups(arch, config)
    stages = [
        {name: len(set(layers).intersection(group.layers)) for name, group in groups.items()}
        for layers in stage_layers(arch, layout)
    ]
    return max(stages, key=lambda stage: sum(n * groups[name].num_experts for name, n in stage.items()))


def local_numel(factor: str, target: str, shape: TargetShape, rank: int, tp_size: int) -> int:
    """Elements of one tensor on one rank."""
    kind = "column" if linear_of(target) in _COLUMN else "row"
    whole = {"A": rank * shape.in_features, "B": shape.out_features * rank, "u": rank, "v": shape.out_features}[factor]
    return whole // tp_size if factor in _SPLIT[kind] else whole


def _all_reduced(num_bytes: int, ranks: int) -> int:
    """Bytes that each of the ranks sends in a ring all-reduce of num_bytes."""
    return -(-2 * (ranks - 1) * num_bytes // ranks)


def _safetensors_header_bytes(shapes: Mapping[str, TargetShape], config: TiedLoraConfig, element: int) -> int:
    """The JSON header as safetensors writes it: compact, padded to 8 bytes."""
    header, offset = {}, 0
    for name, shape in sorted(_stored(shapes, config)):
        end = offset + math.prod(shape) * element
        header[name] = {"dtype": "F32" if element == 4 else "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return _round_up(len(json.dumps(header, separators=(",", ":"))), 8)


def _stored(shapes: Mapping[str, TargetShape], config: TiedLoraConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor in the file: what is not tied is stacked over the layers."""
    for target, shape in shapes.items():
        sides: dict[str, tuple[int, ...]] = {"u": (config.rank,), "v": (shape.out_features,)}
        sides |= {"A": (config.rank, shape.in_features), "B": (shape.out_features, config.rank)}
        own = shape.num_layers * len(own_names(target, shape.num_experts))
        for factor in FACTORS:
            if factor in ("A", "B") or factor in config.trained:
                copies = tied_copies(shape, config) if factor in config.tied else own
                lead = () if factor in config.tied and copies == 1 else (copies,)
                yield f"{target}.{factor}", (*lead, *sides[factor])


def _seeded(shapes: Mapping[str, TargetShape], config: TiedLoraConfig) -> int:
    """Elements that the file holds as their seed."""
    frozen = [f for f in ("A", "B") if f not in config.trained and config.frozen_factors == "seed"]
    return sum(factor_numel(factor, shape, config) for shape in shapes.values() for factor in frozen)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def check_numbers(numbers: object) -> tuple[int, ...]:
    """How many adapters to plan for.

    Raises:
        ConfigError: not a list of whole numbers of at least 1.
    """
    if isinstance(numbers, (list, tuple)) and numbers and all(map(is_whole_number, numbers)):
        return tuple(numbers)
    raise ConfigError([f"adapters={numbers!r}: must be a list of whole numbers of at least 1, such as [1, 10, 1000]"])


def several_adapters(
    arch: Architecture, layout: Layout, config: TiedLoraConfig, precision: Precision, numbers: Sequence[int]
) -> dict[str, Any]:
    """Bytes of the adapters' weights, ready for JSON.

    "this adapter" and every preset, of the same rank, targets and layers, to: own_bytes and shared_bytes of the rank that
    holds most; bytes_per_rank, on that rank, and bytes, on all ranks that hold one copy of the model, each a list as
    long as `numbers`.
    """
    alike = {"rank": config.rank, "targets": config.targets, "layers": config.layers}
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
    """(what each adapter has of its own, what all share) on one rank of a stage with these layers."""
    groups = selected_groups(arch, config)
    own = shared = 0
    for target, shape in target_shapes(arch, config).items():
        num_linears = len(set(layers).intersection(groups[target].layers)) * shape.num_experts
        for factor in _held(config):
            num_tied = layout.num_chunks * tied_copies(shape, config)
            copies = num_tied if factor in config.tied else num_linears
            elements = copies * local_numel(factor, target, shape, config.rank, layout.tp_size)
            own += elements * (factor in config.trained)
            shared += elements * (factor not in config.trained)
    return own, shared


def _held(config: TiedLoraConfig) -> list[str]:
    """The factors that are in memory; a frozen u or v is 1 and is not."""
    return [factor for factor in FACTORS if factor in config.trained or factor in ("A", "B")]
