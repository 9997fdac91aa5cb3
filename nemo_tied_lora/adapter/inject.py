# SPDX-License-Identifier: Apache-2.0
"""Injects Tied-LoRA into a Megatron model and freezes the base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from nemo_tied_lora.adapter.experts import groups_of, is_routed, linear_of, refused_layouts
from nemo_tied_lora.adapter.grad_allreduce import mark_parameters
from nemo_tied_lora.adapter.injected_adapter import Adapter, Chunk
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.target_modules import AdaptableLinear, find_adaptable_linears, gpt_model
from nemo_tied_lora.adapter.tied_factors import ChunkFactors
from nemo_tied_lora.adapter.tied_linear import LinearAdapter, attach_to_linear
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError

__all__ = ["inject"]


def inject(model: nn.Module | Sequence[nn.Module], config: TiedLoraConfig) -> Adapter:
    """Adds Tied-LoRA to a Megatron model in place and freezes everything else.

    All ranks of a pipeline must call this together, before the model is wrapped in Megatron's DDP.

    Args:
        model: one Megatron module (a GPTModel, wrapped or not), or the list of a stage's chunks.
        config: what to inject.

    Returns:
        The adapter. It gives access to the parameters, the gradient sums, the whole state, merging and removal.

    Raises:
        ConfigError: the model has no Megatron linears, a target or layer matches nothing, the rank exceeds a linear's
            width, or a linear cannot be adapted. Lists all problems together, the same on every stage.
        RuntimeError: the model already has an adapter.
    """
    wrapped = [model] if isinstance(model, nn.Module) else list(model)
    bodies = [gpt_model(chunk) for chunk in wrapped]
    if any(hasattr(body.decoder, "tied_lora") for body in bodies):
        raise RuntimeError("model: it has a Tied-LoRA adapter already; call adapter.remove() first")
    scans = [find_adaptable_linears(body, config.targets) for body in bodies]
    linears = [scan[0] for scan in scans]
    problems = [problem for scan in scans for problem in scan[1]]
    problems += _refused_layouts(bodies[0].config, [linear.group for chunk in linears for linear in chunk])
    shapes = _agree_on_shapes(
        [linear for chunk in linears for linear in chunk], problems, bodies[0].config.num_layers, config
    )

    was_trained = [{name for name, p in chunk.named_parameters() if p.requires_grad} for chunk in wrapped]
    chunks, stage = [], parallel_state.get_pipeline_model_parallel_rank()
    for index, (outer, body) in enumerate(zip(wrapped, bodies, strict=True)):
        outer.requires_grad_(False)
        selected = [s for s in linears[index] if s.group in shapes and s.layer in shapes[s.group].layers]
        chunk_rank = index * parallel_state.get_pipeline_model_parallel_world_size() + stage
        chunks.append(_inject_chunk(outer, body, selected, shapes, config, chunk_rank, was_trained[index]))
    return Adapter(config, shapes, chunks)


def _refused_layouts(config: Any, groups: Iterable[str]) -> list[str]:
    sizes = {
        "tp_size": parallel_state.get_tensor_model_parallel_world_size(),
        "ep_size": parallel_state.get_expert_model_parallel_world_size(),
        "etp_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    return list(refused_layouts(config, groups, **sizes))


def _agree_on_shapes(
    linears: Sequence[AdaptableLinear], problems: list[str], num_layers: int, config: TiedLoraConfig
) -> dict[str, LinearShape]:
    """Gathers shapes and layers over the pipeline, so that all stages decide alike.

    Returns:
        Group to whole shape, with the selected layers of all stages.

    Raises:
        ConfigError: lists the problems of all stages.
    """
    stages = _gather_over_pipeline((_found_groups(linears, problems), problems))
    problems = sorted({problem for _, stage in stages for problem in stage})
    found, agreed = set(), {}
    for group in [group for target in config.targets for group in groups_of(target)]:
        parts = [groups[group] for groups, _ in stages if group in groups]
        if len({replace(shape, layers=()) for shape in parts}) > 1:
            problems.append(f"targets: {group} has different shapes on different pipeline stages")
        elif parts:
            found.add(linear_of(group))
            layers = {layer for shape in parts for layer in shape.layers}
            selected = sorted(layers if config.layers is None else layers & set(config.layers))
            if selected:
                agreed[group] = replace(parts[0], layers=tuple(selected))
    problems += _mismatches(agreed, found, num_layers, config)
    if problems:
        raise ConfigError(problems)
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
    shapes: dict[str, LinearShape], found: set[str], num_layers: int, config: TiedLoraConfig
) -> Iterable[str]:
    """Yields one line per target, layer or rank that does not fit. found: the targets that the model has."""
    if not found:
        yield f"targets: none of {', '.join(config.targets)} is a Megatron linear of this model"
        return
    adapted = {linear_of(group) for group in shapes}
    for target in config.targets:
        if target not in found:
            has = ", ".join(known for known in config.targets if known in found)
            yield f"targets: {target} matches no linear of this model; it has {has}"
        elif target not in adapted and all(layer < num_layers for layer in config.layers or ()):
            yield f"layers: {list(config.layers or ())} has no layer with a {target}"
    outside = [layer for layer in config.layers or () if layer >= num_layers]
    if outside:
        yield f"layers: {outside} do not exist; the model has layers 0 to {num_layers - 1}"
    for group, shape in shapes.items():
        widest = min(shape.sides)
        if config.rank > widest:
            yield f"rank={config.rank}: more than {widest}, the smaller side of {group}; choose a smaller rank"


def _gather_over_pipeline(value: object) -> list:
    size = parallel_state.get_pipeline_model_parallel_world_size()
    if size == 1:
        return [value]
    values: list = [None] * size
    torch.distributed.all_gather_object(values, value, group=parallel_state.get_pipeline_model_parallel_group())
    return values


def _inject_chunk(
    outer: nn.Module,
    body: Any,
    linears: Sequence[AdaptableLinear],
    shapes: dict[str, LinearShape],
    config: TiedLoraConfig,
    chunk_rank: int,
    was_trained: set[str],
) -> Chunk:
    """Builds one chunk's factors at `decoder.tied_lora` and attaches its linears to them."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    sequence_parallel = bool(body.config.sequence_parallel) and tp_size > 1
    like = next(body.parameters())
    factors = ChunkFactors(
        config,
        shapes,
        {group: [linear.layer for linear in linears if linear.group == group] for group in shapes},
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
        device=like.device,
        dtype=like.dtype,
        chunk_rank=chunk_rank,
    )
    mark_parameters(factors, shapes, first=chunk_rank == 0, sequence_parallel=sequence_parallel)
    body.decoder.tied_lora = factors
    for linear in linears:
        tied, own = factors.tied(linear.name), factors.of_layer(linear.layer, linear.name)
        expert = is_routed(linear.name)
        attach_to_linear(
            linear.module, LinearAdapter(config, linear.kind, tied, own, tp_size, sequence_parallel, expert)
        )
    chunk = Chunk(outer=outer, body=body, factors=factors, linears=tuple(linears), was_trained=frozenset(was_trained))
    chunk.prepare_base()
    return chunk
