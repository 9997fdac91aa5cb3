# SPDX-License-Identifier: Apache-2.0
"""Gathers the optimizer's tensors whole and by name, and scatters them to each rank's shards.

Adam's moments of "layers.7.linear_qkv.v" have the shape of that v and are sharded like it. So the functions that gather
and load the adapter (see `full_state`) also serve every slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from nemo_tied_lora.adapter import full_state
from nemo_tied_lora.adapter.factor_names import FactorName, expected_shapes
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.checkpoint.local_optimizer_state import LocalState, group_key

__all__ = ["gather_options", "gather_tensors", "scatter_options", "scatter_slot"]


class _View:
    """A chunk's factors, with another tensor in the place of each parameter."""

    def __init__(self, factors: Any, tensor_of: Callable[[nn.Parameter], torch.Tensor]) -> None:
        self._factors, self._tensor_of = factors, tensor_of

    def named_factors(self) -> Iterator[tuple[FactorName, torch.Tensor]]:
        return ((name, self._tensor_of(parameter)) for name, parameter in self._factors.named_factors())


def gather_tensors(adapter: Adapter, state: LocalState) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yields (group, {"adapter/linear_qkv.A": whole, "exp_avg/linear_qkv.A": whole, ...}), one group after the other.

    All ranks must exhaust it. Each holds the tensors of one group at a time, on the CPU.
    """
    device = adapter.device
    dtypes = _agreed({slot: next(iter(held.values())).dtype for slot, held in state.slots.items() if held})
    factors = [chunk.factors for chunk in adapter.chunks]
    for group, shape in adapter.shapes.items():
        whole = full_state.gather(adapter.config, {group: shape}, factors, device)
        tensors = {f"adapter/{name}": tensor for name, tensor in whole.items()}
        for slot, dtype in sorted(dtypes.items()):
            views: Any = [_View(chunk, _reader(state.slots.get(slot, {}), dtype)) for chunk in factors]
            whole = full_state.gather(adapter.config, {group: shape}, views, device)
            tensors |= {f"{slot}/{name}": tensor for name, tensor in whole.items() if _is_trained(adapter, name)}
        yield group, tensors


def scatter_slot(adapter: Adapter, whole: Mapping[str, torch.Tensor]) -> dict[nn.Parameter, torch.Tensor]:
    """Returns this rank's part of one slot, for each trained parameter.

    Raises:
        ValueError: lists every missing, unexpected, misshapen or non-finite tensor.
    """
    dtype = next(iter(whole.values())).dtype if whole else torch.float32
    parts: dict[nn.Parameter, torch.Tensor] = {}

    def part_of(parameter: nn.Parameter) -> torch.Tensor:
        return parts.setdefault(parameter, torch.zeros_like(parameter, dtype=dtype, requires_grad=False))

    expected = expected_shapes(adapter.config, adapter.shapes)
    # Frozen factors have no moments; `load` gets one zero, expanded, for each.
    frozen = {n: torch.zeros(()).expand(shape) for n, shape in expected.items() if not _is_trained(adapter, n)}
    views: Any = [_View(chunk.factors, part_of) for chunk in adapter.chunks]
    full_state.load(adapter.config, adapter.shapes, views, {**whole, **frozen})
    return {parameter: tensor for parameter, tensor in parts.items() if parameter.requires_grad}


def gather_options(adapter: Adapter, state: LocalState) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Returns (options per parameter group, {scalar: {parameter's name: value}}), the same on every rank.

    All ranks must call it. A stage without a group's parameters has stepped nothing, so the group's options come from the
    rank with the most steps.
    """
    names = {parameter: name for name, parameter in adapter.named_parameters()}
    own = {key: {names[p]: value for p, value in held.items()} for key, held in state.scalars.items()}
    scalars: dict[str, dict[str, float]] = {}
    options: dict[Any, dict[str, Any]] = {}
    for groups, held in _all_gather((state.options, own)):
        for key, values in held.items():
            scalars.setdefault(key, {}).update(values)
        for group in groups:
            known = options.setdefault(group_key(group), group)
            if not known or (group.get("step") or 0.0) > (known.get("step") or 0.0):
                options[group_key(group)] = group
    return list(options.values()), scalars


def scatter_options(
    adapter: Adapter, scalars: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[nn.Parameter, float]]:
    """Returns each scalar for this rank's parameters."""
    return {
        key: {parameter: values[name] for name, parameter in adapter.named_parameters() if name in values}
        for key, values in scalars.items()
    }


def _is_trained(adapter: Adapter, name: str) -> bool:
    return FactorName.parse(name).factor in adapter.config.trained


def _reader(held: Mapping[nn.Parameter, torch.Tensor], dtype: torch.dtype) -> Callable[[nn.Parameter], torch.Tensor]:
    def tensor_of(parameter: nn.Parameter) -> torch.Tensor:
        tensor = held.get(parameter)
        return torch.zeros_like(parameter, dtype=dtype) if tensor is None else tensor.to(parameter.device)

    return tensor_of


def _agreed(dtypes: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The slots of all ranks: a stage without parameters has no slots, but must take part in gathering them."""
    return {slot: dtype for rank in _all_gather(dtypes) for slot, dtype in rank.items()}


def _all_gather(value: Any) -> list[Any]:
    group = parallel_state.get_model_parallel_group()
    values = [value] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values
