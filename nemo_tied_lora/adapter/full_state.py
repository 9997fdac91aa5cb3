# SPDX-License-Identifier: Apache-2.0
"""The layout-free state: whole A, B, u, v <-> each rank's shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nemo_tied_lora.adapter.experts import group_of, own_names, tied_names
from nemo_tied_lora.adapter.shapes import TargetSpec, factor_shape, local_shape, sharded_dim
from nemo_tied_lora.adapter.sharding import shard, unshard
from nemo_tied_lora.adapter.tied_factors import ChunkFactors, is_stored, tied_factors
from nemo_tied_lora.config import FACTORS, TiedLoraConfig

__all__ = ["check_state", "expected_shapes", "factors_of_layer", "gather", "load", "stream"]


def expected_shapes(config: TiedLoraConfig, specs: Mapping[str, TargetSpec]) -> dict[str, tuple[int, ...]]:
    """Name to whole shape of every stored tensor, in the order of the file."""
    return {key: factor_shape(f, specs[group_of(name)], config.rank) for key, _, name, f in _entries(config, specs)}


def gather(
    config: TiedLoraConfig, specs: Mapping[str, TargetSpec], chunks: Sequence[ChunkFactors], device: torch.device
) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU of every rank; see `stream`."""
    return dict(stream(config, specs, chunks, device))


def stream(
    config: TiedLoraConfig,
    specs: Mapping[str, TargetSpec],
    chunks: Sequence[ChunkFactors],
    device: torch.device,
    names: Iterable[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor on the CPU) one after the other, gathered over the tensor-parallel group, then the pipeline.

    A rank that does not keep them holds one at a time. A tied tensor is the same on every stage and is not sent
    across the pipeline. All ranks must go through it to the end, also one that holds no tensor; `device` is where it
    receives the others'. names: all of them, in the order wanted; None: the order of `expected_shapes`.
    """
    own = {(layer, t, f): p for chunk in chunks for layer, t, f, p in chunk.named_own()}
    owners, dtype = _owners(own)
    tied = {(t, f): p for t, f, p in chunks[0].named_tied()}
    entries = {entry[0]: entry for entry in _entries(config, specs)}
    for key in entries if names is None else names:
        _, layer, name, factor = entries[key]
        spec = specs[group_of(name)]
        if layer is None:
            yield key, _gather_shards(tied[name, factor].detach().clone(), factor, spec).cpu()
            continue
        part = own.get((layer, name, factor))
        local = torch.empty(local_shape(factor, spec, config.rank, _tp_size()), dtype=dtype, device=device)
        if part is not None:
            local.copy_(part.detach())
        yield key, _gather_shards(_from_stage(local, owners[layer]), factor, spec).cpu()


def load(
    config: TiedLoraConfig,
    specs: Mapping[str, TargetSpec],
    chunks: Sequence[ChunkFactors],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Copies this rank's part of every tensor, after all of them were checked.

    Raises:
        ValueError: see `check_state`.
    """
    check_state(state, expected_shapes(config, specs))
    tp_rank, tp_size = _groups().get_tensor_model_parallel_rank(), _tp_size()
    with torch.no_grad():
        for chunk in chunks:
            for name, factor, parameter in chunk.named_tied():
                full = state[f"{name}.{factor}"]
                parameter.copy_(shard(full, factor, specs[group_of(name)], tp_rank, tp_size))
            for layer, name, factor, parameter in chunk.named_own():
                full = state[f"layers.{layer}.{name}.{factor}"]
                parameter.copy_(shard(full, factor, specs[group_of(name)], tp_rank, tp_size))


def check_state(state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names, shapes and values with what the adapter needs.

    Raises:
        ValueError: lists every missing, unexpected, misshapen and non-finite tensor, a line each.
    """
    problems = [f"state: {name} is missing" for name in expected if name not in state]
    problems += [f"state: {name} is unexpected" for name in state if name not in expected]
    for name, shape in expected.items():
        tensor = state.get(name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            problems.append(f"state: {name} has shape {tuple(tensor.shape)}, the adapter needs {shape}")
        elif not tensor.is_floating_point():
            problems.append(f"state: {name} is {tensor.dtype}, not a floating-point tensor")
        elif not torch.isfinite(tensor).all():
            problems.append(f"state: {name} holds NaN or infinity")
    if problems:
        raise ValueError("\n".join(problems))


def _entries(config: TiedLoraConfig, specs: Mapping[str, TargetSpec]) -> Iterator[tuple[str, int | None, str, str]]:
    """(key, layer or None where tied, name, factor) of every stored tensor, the same on every rank."""
    tied = tied_factors(config)
    stored = [factor for factor in FACTORS if is_stored(factor, config)]
    for group, spec in specs.items():
        for name in tied_names(group, spec.num_experts, config.experts):
            yield from ((f"{name}.{factor}", None, name, factor) for factor in stored if factor in tied)
    own = [factor for factor in stored if factor not in tied]
    for layer in sorted({layer for spec in specs.values() for layer in spec.layers}):
        names = [name for g, s in specs.items() if layer in s.layers for name in own_names(g, s.num_experts)]
        for name in names:
            yield from ((f"layers.{layer}.{name}.{factor}", layer, name, factor) for factor in own)


def _groups() -> Any:
    """Megatron's groups, imported when tensors move between ranks: reading a file needs none of it."""
    from megatron.core import parallel_state

    return parallel_state


def _tp_size() -> int:
    return _groups().get_tensor_model_parallel_world_size()


def _owners(own: Mapping[tuple[int, str, str], torch.Tensor]) -> tuple[dict[int, int], torch.dtype | None]:
    """Layer to the pipeline rank that holds it; the dtype of what they hold, None where nothing is per layer."""
    size = _groups().get_pipeline_model_parallel_world_size()
    dtype = next((tensor.dtype for tensor in own.values()), None)
    stages: list[tuple[list[int], torch.dtype | None]] = [(sorted({layer for layer, _, _ in own}), dtype)] * size
    if size > 1:
        group = _groups().get_pipeline_model_parallel_group()
        torch.distributed.all_gather_object(stages, stages[0], group=group)
    owners = {layer: rank for rank, (held, _) in enumerate(stages) for layer in held}
    return owners, next((dtype for _, dtype in stages if dtype is not None), None)


def _from_stage(tensor: torch.Tensor, stage: int) -> torch.Tensor:
    if _groups().get_pipeline_model_parallel_world_size() > 1:
        group = _groups().get_pipeline_model_parallel_group()
        torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(group, stage), group=group)
    return tensor


def _gather_shards(part: torch.Tensor, factor: str, spec: TargetSpec) -> torch.Tensor:
    if sharded_dim(factor, spec.kind) is None or _tp_size() == 1:
        return part
    shards = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(_tp_size())]
    torch.distributed.all_gather(shards, part.contiguous(), group=_groups().get_tensor_model_parallel_group())
    return unshard(shards, factor, spec)


def factors_of_layer(
    config: TiedLoraConfig, state: Mapping[str, torch.Tensor], layer: int, target: str
) -> dict[str, torch.Tensor]:
    """The layer's A, B and, where they are stored, u and v, tied or not."""
    names = {factor: (f"{target}.{factor}", f"layers.{layer}.{target}.{factor}") for factor in "ABuv"}
    found = {f: next((state[n] for n in pair if n in state), None) for f, pair in names.items()}
    return {factor: tensor for factor, tensor in found.items() if tensor is not None}
