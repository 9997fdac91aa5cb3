# SPDX-License-Identifier: Apache-2.0
"""Gathers whole factors from all ranks, and loads whole factors into each rank's shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nemo_tied_lora.adapter.factor_names import FactorName, expected_shapes, factor_names, names_of_linear
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.sharding import shard, unshard
from nemo_tied_lora.adapter.tied_factors import ChunkFactors
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["check_state", "factors_of_layer", "gather", "load", "stream"]


def gather(
    config: TiedLoraConfig, shapes: Mapping[str, LinearShape], chunks: Sequence[ChunkFactors], device: torch.device
) -> dict[str, torch.Tensor]:
    """Returns all whole tensors on the CPU of every rank; see `stream`."""
    return dict(stream(config, shapes, chunks, device))


def stream(
    config: TiedLoraConfig,
    shapes: Mapping[str, LinearShape],
    chunks: Sequence[ChunkFactors],
    device: torch.device,
    names: Iterable[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, whole tensor on the CPU), gathered over the tensor-parallel group, then over the pipeline.

    A rank that does not keep the tensors holds one at a time. A tied tensor is the same on every stage and is not sent
    over the pipeline. All ranks must exhaust the iterator, even those that hold no tensor.

    Args:
        device: where a rank receives tensors of other stages.
        names: all names, in the wanted order. None: the order of `factor_names`.
    """
    held: dict[FactorName, torch.Tensor] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_factors():
            held.setdefault(name, parameter)
    owners, dtype = _owners(held)
    ordered = factor_names(config, shapes) if names is None else map(FactorName.parse, names)
    for name in ordered:
        shape = shapes[name.group]
        if name.layer is None:
            yield str(name), _gather_shards(held[name].detach().clone(), name.factor, shape).cpu()
            continue
        local_shape = shape.local_factor_shape(name.factor, config.rank, _tp_size())
        local = torch.empty(local_shape, dtype=dtype, device=device)
        if name in held:
            local.copy_(held[name].detach())
        yield str(name), _gather_shards(_from_stage(local, owners[name.layer, name.group]), name.factor, shape).cpu()


def load(
    config: TiedLoraConfig,
    shapes: Mapping[str, LinearShape],
    chunks: Sequence[ChunkFactors],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Checks the whole state, then copies this rank's part of every tensor.

    Raises:
        ValueError: see `check_state`. Nothing is copied then.
    """
    check_state(state, expected_shapes(config, shapes))
    tp_rank, tp_size = _groups().get_tensor_model_parallel_rank(), _tp_size()
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_factors():
                parameter.copy_(shard(state[str(name)], name.factor, shapes[name.group], tp_rank, tp_size))


def check_state(state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks names, shapes, dtypes and values against the shapes that the adapter needs.

    Raises:
        ValueError: has one line per missing, unexpected, misshapen or non-finite tensor.
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


def _groups() -> Any:
    """Megatron's groups. Imported late, because reading an adapter's file needs this module but not Megatron."""
    from megatron.core import parallel_state

    return parallel_state


def _tp_size() -> int:
    return _groups().get_tensor_model_parallel_world_size()


def _owners(held: Mapping[FactorName, torch.Tensor]) -> tuple[dict[tuple[int, str], int], torch.dtype | None]:
    """(layer, group) to the pipeline rank that holds it; the dtype of the layers' own tensors, None if there are none.

    Two stages of a HybridModel may share a layer: the first has its attention, the second its MLP.
    """
    size = _groups().get_pipeline_model_parallel_world_size()
    own = {(name.layer, name.group): tensor.dtype for name, tensor in held.items() if name.layer is not None}
    stages: list[tuple[list[Any], torch.dtype | None]] = [(sorted(own), next(iter(own.values()), None))] * size
    if size > 1:
        group = _groups().get_pipeline_model_parallel_group()
        torch.distributed.all_gather_object(stages, stages[0], group=group)
    owners = {place: rank for rank, (places, _) in enumerate(stages) for place in places}
    return owners, next((dtype for _, dtype in stages if dtype is not None), None)


def _from_stage(tensor: torch.Tensor, stage: int) -> torch.Tensor:
    if _groups().get_pipeline_model_parallel_world_size() > 1:
        group = _groups().get_pipeline_model_parallel_group()
        torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(group, stage), group=group)
    return tensor


def _gather_shards(part: torch.Tensor, factor: str, shape: LinearShape) -> torch.Tensor:
    if shape.sharded_dim(factor) is None or _tp_size() == 1:
        return part
    shards = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(_tp_size())]
    torch.distributed.all_gather(shards, part.contiguous(), group=_groups().get_tensor_model_parallel_group())
    return unshard(shards, factor, shape)


def factors_of_layer(
    config: TiedLoraConfig, state: Mapping[str, torch.Tensor], layer: int, linear: str
) -> dict[str, torch.Tensor]:
    """A and B of one linear, tied or not, and its u and v if they are stored."""
    return {factor: state[str(name)] for factor, name in names_of_linear(config, layer, linear).items()}
