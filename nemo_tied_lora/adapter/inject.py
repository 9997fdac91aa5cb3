# SPDX-License-Identifier: Apache-2.0
"""Injects Tied-LoRA into a Megatron model and freezes the base."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from nemo_tied_lora.adapter.agreement import exchange, raise_together
from nemo_tied_lora.adapter.experts import groups_of, is_routed, linear_of, refused_layouts
from nemo_tied_lora.adapter.grad_allreduce import mark_parameters
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.injected_chunk import Chunk
from nemo_tied_lora.adapter.layer_numbers import LayerNumbers
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.target_modules import (
    AdaptableLinear,
    find_adaptable_linears,
    gpt_model,
    used_twice,
    wrappers,
)
from nemo_tied_lora.adapter.tied_factors import ChunkFactors
from nemo_tied_lora.adapter.tied_linear import LinearAdapter
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.platform.devices import collective_device

__all__ = ["inject"]


def inject(model: nn.Module | Sequence[nn.Module], config: TiedLoraConfig) -> Adapter:
    """Adds Tied-LoRA to a Megatron model in place and freezes everything else.

    All ranks of the job must call this together, before the model is wrapped in Megatron's DDP. If it fails on one
    rank, it raises on all ranks and changes no model.

    Args:
        model: one Megatron module (a GPTModel or HybridModel, wrapped or not), or the list of a stage's chunks. A stage
            or chunk may have no layers, and no parameters at all.
        config: what to inject.

    Returns:
        The adapter. It gives access to the parameters, the gradient sums, the whole state, merging and removal.

    Raises:
        ConfigError: the model has no Megatron linears or is wrapped in DDP, a target or layer matches nothing, the rank
            exceeds a linear's width, or a linear cannot be adapted. Lists all problems together, the same on every rank.
        RuntimeError: the model already has an adapter, or another rank failed.
    """
    failure: Exception | None = None
    found = _Findings(failed=True)
    try:
        part = _scan(model, config)
        found = part.findings(config)
    except Exception as error:
        failure = error
    everyone = exchange(found)
    with ExitStack() as undo:
        try:
            if not any(rank.failed for rank in everyone):
                shapes, dtype = _agree(everyone, config)
                adapter = Adapter(config, shapes, _build_chunks(part, shapes, config, dtype))
                for chunk in adapter.chunks:
                    undo.callback(chunk.detach)
                    chunk.attach()
        except Exception as error:
            failure = error
        raise_together("inject", failure)
        undo.pop_all()
    return adapter


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """What one rank tells the others. groups: to whole shapes, with the layers of this stage. dtypes: the floating-point
    dtypes of its linears' weights. failed: whether it failed to find anything."""

    groups: dict[str, LinearShape] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    dtypes: frozenset[torch.dtype] = frozenset()
    numbers: LayerNumbers | None = None
    config: TiedLoraConfig | None = None
    failed: bool = False


@dataclass(frozen=True)
class _Part:
    """This rank's part of the model. bodies: the GPTModels or HybridModels in `outers`. linears: of each chunk."""

    outers: list[nn.Module]
    bodies: list[Any]
    linears: list[list[AdaptableLinear]]
    problems: list[str]

    def findings(self, config: TiedLoraConfig) -> _Findings:
        every = list(itertools.chain(*self.linears))
        problems = [*self.problems, *used_twice(every)]
        problems += _refused_layouts(self.bodies[0].config, [linear.group for linear in every])
        groups = _found_groups(every, problems)
        weights = (linear.module.weight for linear in every)
        dtypes = frozenset(weight.dtype for weight in weights if weight.dtype.is_floating_point)
        numbers = LayerNumbers.of(self.bodies[0])
        return _Findings(groups=groups, problems=problems, dtypes=dtypes, numbers=numbers, config=config)


def _scan(model: nn.Module | Sequence[nn.Module], config: Any) -> _Part:
    """Finds the linears and their problems. Changes nothing."""
    if not isinstance(config, TiedLoraConfig):
        kind = type(config).__name__
        raise TypeError(f"inject: config is a {kind}; pass a TiedLoraConfig, such as TiedLoraConfig.preset('tl6')")
    if not isinstance(model, (nn.Module, Iterable)):
        raise ConfigError(
            [f"model: a {type(model).__name__}; pass a Megatron module, or the list of this stage's chunks"]
        )
    outers = [model] if isinstance(model, nn.Module) else list(model)
    if not outers:
        raise ConfigError(["model: an empty list; pass this stage's chunks"])
    data_parallel = [type(wrapper).__name__ for chunk in outers for wrapper in wrappers(chunk) if _sums(wrapper)]
    if data_parallel:
        fix = "inject first, then wrap it: its buffers would not hold the adapter's gradients, and leave them unsummed"
        raise ConfigError([f"model: is wrapped in {data_parallel[0]} already; {fix}"])
    bodies = [gpt_model(chunk) for chunk in outers]
    if any(hasattr(body.decoder, "tied_lora") for body in bodies):
        raise RuntimeError("model: it has a Tied-LoRA adapter already; call adapter.remove() first")
    scans = [find_adaptable_linears(body, config.targets) for body in bodies]
    return _Part(outers, bodies, [scan[0] for scan in scans], [problem for scan in scans for problem in scan[1]])


def _sums(wrapper: nn.Module) -> bool:
    """Whether a wrapper sums gradients over data-parallel ranks: Megatron's kinds have `ddp_config`, torch's have `reducer`."""
    return hasattr(wrapper, "ddp_config") or hasattr(wrapper, "reducer")


def _refused_layouts(config: Any, groups: Iterable[str]) -> list[str]:
    sizes = {
        "tp_size": parallel_state.get_tensor_model_parallel_world_size(),
        "ep_size": parallel_state.get_expert_model_parallel_world_size(),
        "etp_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    return list(refused_layouts(config, groups, **sizes))


def _agree(everyone: Sequence[_Findings], config: TiedLoraConfig) -> tuple[dict[str, LinearShape], torch.dtype]:
    """Decides alike on all ranks.

    Returns:
        Group to whole shape, with the selected layers of all stages; the factors' dtype.

    Raises:
        ConfigError: lists the problems of all ranks.
    """
    first = everyone[0]
    assert first.config is not None
    assert first.numbers is not None
    problems = sorted({problem for rank in everyone for problem in rank.problems})
    others = [rank for rank, found in enumerate(everyone) if found.config != first.config]
    if others:
        problems.append(f"config: rank {others[0]} has another one than rank 0; pass the same one on all ranks")
    shapes = _agreed_shapes([rank.groups for rank in everyone], problems, first.numbers, first.config)
    if problems:
        raise ConfigError(problems)
    if config.dtype is not None:
        return shapes, getattr(torch, config.dtype)
    dtypes = sorted({dtype for rank in everyone for dtype in rank.dtypes}, key=str)
    return shapes, functools.reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()


def _agreed_shapes(
    stages: Sequence[dict[str, LinearShape]], problems: list[str], numbers: LayerNumbers, config: TiedLoraConfig
) -> dict[str, LinearShape]:
    """Group to whole shape, with the selected layers of all stages. Adds to `problems`."""
    found: dict[str, set[int]] = {}
    agreed = {}
    for group in [group for target in config.targets for group in groups_of(target)]:
        parts = [groups[group] for groups in stages if group in groups]
        if len({replace(shape, layers=()) for shape in parts}) > 1:
            problems.append(f"targets: {group} has different shapes on different pipeline stages")
        elif parts:
            layers = {layer for shape in parts for layer in shape.layers}
            found.setdefault(linear_of(group), set()).update(layers)
            selected = sorted(layers if config.layers is None else layers & set(config.layers))
            if selected:
                agreed[group] = replace(parts[0], layers=tuple(selected))
    problems += _mismatches(agreed, found, numbers, config)
    return agreed


def _found_groups(linears: Sequence[AdaptableLinear], problems: list[str]) -> dict[str, LinearShape]:
    """Group to whole shape, with the layers of this stage that have it. Adds to `problems`."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    names: dict[str, set[str]] = {}
    for linear in linears:
        names.setdefault(linear.group, set()).add(linear.name)
    found: dict[str, LinearShape] = {}
    for linear in linears:
        rows, columns = linear.module.weight.shape
        wide, high = (1, tp_size) if linear.kind == "column" else (tp_size, 1)
        shape = LinearShape(
            linear.kind, columns * wide, rows * high, linear.num_blocks, (linear.layer,), len(names[linear.group])
        )
        known = found.setdefault(linear.group, shape)
        if replace(known, layers=shape.layers) != shape:
            problems.append(
                f"targets: {linear.name} has shape {shape.sides} in layer {linear.layer} but {known.sides} elsewhere"
            )
        found[linear.group] = replace(known, layers=tuple(sorted({*known.layers, linear.layer})))
    return found


def _mismatches(
    shapes: dict[str, LinearShape], found: dict[str, set[int]], numbers: LayerNumbers, config: TiedLoraConfig
) -> Iterable[str]:
    """Yields one line per target, layer or rank that does not fit. found: the targets that the model has, and where."""
    if not found:
        yield f"targets: none of {', '.join(config.targets)} is a Megatron linear of this model{numbers.note}"
        return
    adapted = {linear_of(group) for group in shapes}
    for target in config.targets:
        if target not in found:
            has = ", ".join(known for known in config.targets if known in found)
            yield f"targets: {target} matches no linear of this model; it has {has}{numbers.note}"
        elif target not in adapted and all(layer < numbers.count for layer in config.layers or ()):
            have = ", ".join(map(str, sorted(found[target])))
            yield f"layers: {list(config.layers or ())} has no layer with a {target}; layers {have} have one"
    yield from numbers.outside(config.layers or ())
    for group, shape in shapes.items():
        widest = min(shape.sides)
        if config.rank > widest:
            yield f"rank={config.rank}: more than {widest}, the smaller side of {group}; choose a smaller rank"


def _build_chunks(
    part: _Part, shapes: dict[str, LinearShape], config: TiedLoraConfig, dtype: torch.dtype
) -> list[Chunk]:
    """Builds the factors of this stage's chunks. The model does not have them yet."""
    stage, num_stages = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    device = _device(part.bodies)
    chunks = []
    for index, (outer, body) in enumerate(zip(part.outers, part.bodies, strict=True)):
        selected = [s for s in part.linears[index] if s.group in shapes and s.layer in shapes[s.group].layers]
        chunks.append(_build_chunk(outer, body, selected, shapes, config, index * num_stages + stage, device, dtype))
    return chunks


def _device(bodies: Sequence[Any]) -> torch.device:
    """The device of this stage's parameters; that of collectives if the stage has none."""
    first = next(itertools.chain(*(body.parameters() for body in bodies)), None)
    return collective_device() if first is None else first.device


def _build_chunk(
    outer: nn.Module,
    body: Any,
    linears: Sequence[AdaptableLinear],
    shapes: dict[str, LinearShape],
    config: TiedLoraConfig,
    chunk_rank: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Chunk:
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    sequence_parallel = bool(body.config.sequence_parallel) and tp_size > 1
    factors = ChunkFactors(
        config,
        shapes,
        {group: [linear.layer for linear in linears if linear.group == group] for group in shapes},
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
        device=device,
        dtype=dtype,
        chunk_rank=chunk_rank,
    )
    mark_parameters(factors, shapes, first=chunk_rank == 0, sequence_parallel=sequence_parallel)
    adapters = {
        linear.module: LinearAdapter(
            config,
            linear.kind,
            factors.tied(linear.name),
            factors.of_layer(linear.layer, linear.name),
            tp_size,
            sequence_parallel,
            is_routed(linear.name),
        )
        for linear in linears
    }
    return Chunk(outer=outer, body=body, factors=factors, linears=tuple(linears), adapters=adapters)
