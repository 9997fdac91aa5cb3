# SPDX-License-Identifier: Apache-2.0
"""Finds the targets in a Megatron model, injects Tied-LoRA, freezes the base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from nemo_tied_lora.adapter.experts import groups_of, is_routed, linear_of, refused_layouts
from nemo_tied_lora.adapter.grad_allreduce import mark_parameters
from nemo_tied_lora.adapter.injected_adapter import Adapter, Chunk
from nemo_tied_lora.adapter.shapes import TargetSpec
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
        The adapter: its parameters, gradient sums, whole state, merging and removal.

    Raises:
        ConfigError: the model has no Megatron linears, a target or layer matches nothing, the rank exceeds a
            linear's width, a linear cannot be adapted; all problems together, the same on every stage.
        RuntimeError: the model has an adapter already.
    """
    wrapped = [model] if isinstance(model, nn.Module) else list(model)
    bodies = [gpt_model(chunk) for chunk in wrapped]
    if any(hasattr(body.decoder, "tied_lora") for body in bodies):
        raise RuntimeError("model: it has a Tied-LoRA adapter already; call adapter.remove() first")
    scans = [find_adaptable_linears(body, config.targets) for body in bodies]
    sites = [scan[0] for scan in scans]
    problems = [problem for scan in scans for problem in scan[1]]
    problems += _refused_layouts(bodies[0].config, [site.group for chunk in sites for site in chunk])
    specs = _agree_on_specs([site for chunk in sites for site in chunk], problems, bodies[0].config.num_layers, config)

    was_trained = [{name for name, p in chunk.named_parameters() if p.requires_grad} for chunk in wrapped]
    chunks, stage = [], parallel_state.get_pipeline_model_parallel_rank()
    for index, (outer, body) in enumerate(zip(wrapped, bodies, strict=True)):
        outer.requires_grad_(False)
        selected = [s for s in sites[index] if s.group in specs and s.layer in specs[s.group].layers]
        chunk_rank = index * parallel_state.get_pipeline_model_parallel_world_size() + stage
        chunks.append(_inject_chunk(outer, body, selected, specs, config, chunk_rank, was_trained[index]))
    return Adapter(config, specs, chunks)


def _refused_layouts(config: Any, groups: Iterable[str]) -> list[str]:
    sizes = {
        "tp_size": parallel_state.get_tensor_model_parallel_world_size(),
        "ep_size": parallel_state.get_expert_model_parallel_world_size(),
        "etp_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    return list(refused_layouts(config, groups, **sizes))


def _agree_on_specs(
    sites: Sequence[AdaptableLinear], problems: list[str], num_layers: int, config: TiedLoraConfig
) -> dict[str, TargetSpec]:
    """Whole shapes and layers of every target, gathered over the pipeline so that all stages decide alike."""
    stages = _gather_over_pipeline((_found_groups(sites, problems), problems))
    problems = sorted({problem for _, stage in stages for problem in stage})
    found, specs = set(), {}
    for group in [group for target in config.targets for group in groups_of(target)]:
        parts = [groups[group] for groups, _ in stages if group in groups]
        if len({shape for shape, _ in parts}) > 1:
            problems.append(f"targets: {group} has different shapes on different pipeline stages")
        elif parts:
            found.add(linear_of(group))
            layers = {layer for _, layers in parts for layer in layers}
            selected = sorted(layers if config.layers is None else layers & set(config.layers))
            kind, in_features, out_features, blocks, num_experts = parts[0][0]
            if selected:
                specs[group] = TargetSpec(kind, in_features, out_features, blocks, tuple(selected), num_experts)
    problems += _mismatches(specs, found, num_layers, config)
    if problems:
        raise ConfigError(problems)
    return specs


def _found_groups(sites: Sequence[AdaptableLinear], problems: list[str]) -> dict[str, tuple[tuple, set[int]]]:
    """Group to (kind, in, out, blocks, experts), whole, and the layers of this stage that have it."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    names: dict[str, set[str]] = {}
    for site in sites:
        names.setdefault(site.group, set()).add(site.target)
    found: dict[str, tuple[tuple, set[int]]] = {}
    for site in sites:
        rows, columns = site.module.weight.shape
        wide, high = (1, tp_size) if site.kind == "column" else (tp_size, 1)
        shape = (site.kind, columns * wide, rows * high, site.blocks, len(names[site.group]))
        known = found.setdefault(site.group, (shape, set()))
        if known[0] != shape:
            problems.append(
                f"targets: {site.target} has shape {shape[1:3]} in layer {site.layer} but {known[0][1:3]} elsewhere"
            )
        known[1].add(site.layer)
    return found


def _mismatches(
    specs: dict[str, TargetSpec], found: set[str], num_layers: int, config: TiedLoraConfig
) -> Iterable[str]:
    """found: the targets that the model has at all."""
    if not found:
        yield f"targets: none of {', '.join(config.targets)} is a Megatron linear of this model"
        return
    adapted = {linear_of(group) for group in specs}
    for target in config.targets:
        if target not in found:
            has = ", ".join(known for known in config.targets if known in found)
            yield f"targets: {target} matches no linear of this model; it has {has}"
        elif target not in adapted and all(layer < num_layers for layer in config.layers or ()):
            yield f"layers: {list(config.layers or ())} has no layer with a {target}"
    outside = [layer for layer in config.layers or () if layer >= num_layers]
    if outside:
        yield f"layers: {outside} do not exist; the model has layers 0 to {num_layers - 1}"
    for group, spec in specs.items():
        widest = min(spec.in_features, spec.out_features)
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
    sites: Sequence[AdaptableLinear],
    specs: dict[str, TargetSpec],
    config: TiedLoraConfig,
    chunk_rank: int,
    was_trained: set[str],
) -> Chunk:
    """Builds one chunk's factors at `decoder.tied_lora` and links its linears to them."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    sequence_parallel = bool(body.config.sequence_parallel) and tp_size > 1
    like = next(body.parameters())
    factors = ChunkFactors(
        config,
        specs,
        {group: [site.layer for site in sites if site.group == group] for group in specs},
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp_size,
        device=like.device,
        dtype=like.dtype,
        chunk_rank=chunk_rank,
    )
    mark_parameters(factors, specs, first=chunk_rank == 0, sequence_parallel=sequence_parallel)
    body.decoder.tied_lora = factors
    for site in sites:
        tied, own = factors.tied(site.target), factors.of_layer(site.layer, site.target)
        expert = is_routed(site.target)
        attach_to_linear(site.module, LinearAdapter(config, site.kind, tied, own, tp_size, sequence_parallel, expert))
    chunk = Chunk(outer=outer, body=body, factors=factors, sites=tuple(sites), was_trained=frozenset(was_trained))
    chunk.prepare_base()
    return chunk
