# SPDX-License-Identifier: Apache-2.0
"""What several adapters on one model take in memory: 1, 10, 1000 of them, for this adapter and for every preset.

Weights alone, as in serving: no gradients, no optimizer. Factors that are frozen at random are the same bits in all
adapters of one seed and rank, and are held once (see `several`); every adapter has its own trained factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_tied_lora.config import FACTORS, PRESETS, ConfigError, TiedLoraConfig
from nemo_tied_lora.counting import tied_copies
from nemo_tied_lora.layout import Architecture, Layout, selected_groups, stage_layers, target_shapes
from nemo_tied_lora.planning import Precision, local_numel

__all__ = ["check_numbers", "several_adapters"]


def check_numbers(numbers: object) -> tuple[int, ...]:
    """How many adapters to plan for.

    Raises:
        ConfigError: not a list of whole numbers of at least 1.
    """
    if isinstance(numbers, Sequence) and not isinstance(numbers, str):
        wrong = [number for number in numbers if type(number) is not int or number < 1]
        if numbers and not wrong:
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
