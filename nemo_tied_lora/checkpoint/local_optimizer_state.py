# SPDX-License-Identifier: Apache-2.0
"""Reads and writes an optimizer's state by model parameter: of torch, apex, NeMo's O2 and megatron-core's optimizer.

A slot is one kind of tensor that an optimizer keeps per parameter, in the parameter's (local) shape: "exp_avg",
"exp_avg_sq", and "master", the float32 copy of a 16-bit parameter. A scalar is one number per parameter (torch's "step").
Options belong to a parameter group: learning rate, betas, apex's "step". Groups differ in their multipliers (`lr_mult`,
megatron-core's `wd_mult`). Another layout may have other groups on a rank, so groups are found by `group_key`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from nemo_tied_lora.errors import ConfigError

__all__ = ["LocalState", "group_key", "read_optimizer", "write_optimizer"]

MASTER = "master"
_IDENTITY = {"lr_mult": 1.0, "wd_mult": 1.0, "is_expert_parallel": False}
"""What tells groups apart, and its value in groups without the key."""
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


@dataclass
class LocalState:
    """The state of this rank's optimizer, by the model's parameters."""

    slots: dict[str, dict[nn.Parameter, torch.Tensor]] = field(default_factory=dict)
    scalars: dict[str, dict[nn.Parameter, float]] = field(default_factory=dict)
    options: list[dict[str, Any]] = field(default_factory=list)


def group_key(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a parameter group is known by, on every layout."""
    return tuple(options.get(name, default) for name, default in _IDENTITY.items())


def read_optimizer(optimizer: Any, parameters: Iterable[nn.Parameter]) -> LocalState:
    """Returns the state of `optimizer` for the adapter's parameters. All ranks must call it.

    With megatron-core's distributed optimizer, each tensor is assembled from the parts of the data-parallel ranks.

    Raises:
        ConfigError: the optimizer keeps something that is neither a number nor a tensor of the parameter's shape.
    """
    if hasattr(optimizer, "mcore_optimizer"):
        return _read_distributed(optimizer.mcore_optimizer, list(parameters))
    if hasattr(optimizer, "fp32_from_float16_groups"):
        masters = _masters(optimizer)
        state = _read_torch(optimizer.optimizer, {master: model for model, master in masters.items()})
        state.slots[MASTER] = {model: master.detach() for model, master in masters.items()}
        return state
    return _read_torch(optimizer, {})


def write_optimizer(optimizer: Any, state: LocalState) -> None:
    """Loads what `read_optimizer` returned, on the same or another layout, into the optimizer."""
    if hasattr(optimizer, "mcore_optimizer"):
        _write_distributed(optimizer.mcore_optimizer, state)
        return
    if hasattr(optimizer, "fp32_from_float16_groups"):
        masters = _masters(optimizer)
        _write_torch(optimizer.optimizer, {master: model for model, master in masters.items()}, state)
        for model, saved in state.slots.get(MASTER, {}).items():
            if model in masters:
                masters[model].data.copy_(saved)
        return
    _write_torch(optimizer, {}, state)


def _masters(wrapper: Any) -> dict[nn.Parameter, torch.Tensor]:
    """Model parameter to its float32 copy, which the inner optimizer steps (NeMo's O2)."""
    groups = zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups, strict=True)
    return {model: master for models, masters in groups for model, master in zip(models, masters, strict=True)}


def _read_torch(optimizer: Any, model_of: Mapping[Any, nn.Parameter]) -> LocalState:
    state, saved = LocalState(), optimizer.state_dict()
    for group, numbered in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        state.options.append({key: value for key, value in numbered.items() if key != "params"})
        for stepped, index in zip(group["params"], numbered["params"], strict=True):
            parameter = model_of.get(stepped, stepped)
            for key, value in saved["state"].get(index, {}).items():
                _add_entry(state, key, parameter, value, optimizer)
    return state


def _add_entry(state: LocalState, key: str, parameter: nn.Parameter, value: Any, optimizer: Any) -> None:
    if value is None:  # SGD without momentum
        return
    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        state.slots.setdefault(key, {})[parameter] = value
    elif isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.dim() == 0):
        state.scalars.setdefault(key, {})[parameter] = float(value)
    else:
        kept = f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise ConfigError(
            [
                f"model.optim.name: {type(optimizer).__name__} keeps {key}, {kept}, for a parameter of shape "
                f"{tuple(parameter.shape)}; a checkpoint can hold only what has the parameter's shape; "
                "choose fused_adam, adamw or adam"
            ]
        )


def _write_torch(optimizer: Any, model_of: Mapping[Any, nn.Parameter], state: LocalState) -> None:
    numbered = optimizer.state_dict()["param_groups"]
    tensors: dict[int, dict[str, Any]] = {}
    for group, numbers in zip(optimizer.param_groups, numbered, strict=True):
        for stepped, index in zip(group["params"], numbers["params"], strict=True):
            parameter = model_of.get(stepped, stepped)
            held = {key: of[parameter] for key, of in state.slots.items() if key != MASTER and parameter in of}
            scalars = {key: torch.tensor(of[parameter]) for key, of in state.scalars.items() if parameter in of}
            if held or scalars:
                tensors[index] = {**held, **scalars}
    groups = [{**now, **_saved_options(now, state.options)} for now in numbered]
    optimizer.load_state_dict({"state": tensors, "param_groups": groups})


def _saved_options(now: Mapping[str, Any], saved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The saved options of a group of this run. Other multipliers keep their rates: the options are those of any group."""
    saved = [options for options in saved if options]
    same = next((options for options in saved if group_key(options) == group_key(now)), None)
    if same is not None:
        return dict(same)
    left_out = (*_IDENTITY, *_RATES)
    return {key: value for key, value in (saved[0] if saved else {}).items() if key not in left_out}


def _parts(optimizer: Any) -> Sequence[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _owner(optimizer: Any, parameter: nn.Parameter) -> Any:
    """The chained optimizer whose shard on this rank holds a part of the parameter, or None."""
    return next((part for part in _parts(optimizer) if parameter in getattr(part, "model_param_gbuf_map", {})), None)


def _read_distributed(optimizer: Any, parameters: Sequence[nn.Parameter]) -> LocalState:
    state = LocalState()
    stepped = any(part.optimizer.state for part in _parts(optimizer))
    if _any_rank(stepped):
        for parameter in parameters:
            held = _own_shard(optimizer, parameter)
            for key in sorted(_union(set(held))):
                flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
                if key in held:
                    part, start, end = held[key]
                    flat[start:end] = part.reshape(-1)
                torch.distributed.all_reduce(flat, group=_data_parallel_group())
                state.slots.setdefault(key, {})[parameter] = flat.view(parameter.shape)
    for part in _parts(optimizer):
        groups = part.state_dict()["optimizer"]["param_groups"] if part.optimizer.state else [{}]
        state.options += [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return state


def _own_shard(optimizer: Any, parameter: nn.Parameter) -> dict[str, tuple[torch.Tensor, int, int]]:
    """Slot to (this rank's part of the flat parameter, its start, its end)."""
    part = _owner(optimizer, parameter)
    if part is None:
        return {}
    span = part._get_model_param_range_map(parameter)["param"]
    tensors = part._get_main_param_and_optimizer_states(parameter)
    return {
        MASTER if key == "param" else key: (tensor.detach(), span.start, span.end)
        for key, tensor in tensors.items()
        if tensor.dim() > 0
    }


def _write_distributed(optimizer: Any, state: LocalState) -> None:
    for part in _parts(optimizer):
        now = part.optimizer.state_dict()["param_groups"]
        merged = [{**group, **_saved_options(group, state.options)} for group in now]
        if any("step" in group for group in state.options):
            part.load_state_dict({"optimizer": {"param_groups": merged}})
            # megatron-core (0.13, without apex) gives torch one tensor as the step count of all parameters. Each
            # parameter's step would then increase the count of all.
            for held in part.optimizer.state.values():
                held.update({key: value.clone() for key, value in held.items() if key == "step"})
    parameters = {parameter for of in state.slots.values() for parameter in of}
    with torch.no_grad():
        for parameter in parameters:
            part = _owner(optimizer, parameter)
            if part is None:
                continue
            span = part._get_model_param_range_map(parameter)["param"]
            tensors = part._get_main_param_and_optimizer_states(parameter)
            for key, tensor in tensors.items():
                slot = state.slots.get(MASTER if key == "param" else key, {})
                if parameter in slot and tensor.dim() > 0:
                    tensor.view(-1).copy_(slot[parameter].reshape(-1)[span.start : span.end])


def _data_parallel_group() -> torch.distributed.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _union(names: set[str]) -> set[str]:
    """The names on any data-parallel rank: a rank may hold no part of a parameter."""
    found: list[set[str]] = [set()] * parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    torch.distributed.all_gather_object(found, names, group=_data_parallel_group())
    return set().union(*found)


def _any_rank(flag: bool) -> bool:
    return bool(_union({"yes"} if flag else set()))
