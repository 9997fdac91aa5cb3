# SPDX-License-Identifier: Apache-2.0
"""Calls a function at each step of an optimizer, and reads what it steps.

The function runs when gradients are complete, without the loss scale, clipped, and no parameter has changed yet. It does
not run for a step that the optimizer skips.

=========================================  ==========================================  ============================
optimizer                                  where the function is called                what it steps for u
=========================================  ==========================================  ============================
torch's, apex's                            torch's pre-hook of `step`; after the       u
                                           closure, if there is one (Lightning clips
                                           in it)
NeMo's O2 wrapper                          the pre-hook of the optimizer in it         a float32 copy
megatron-core's, and NeMo's wrapper of it  before `step_with_ready_grads`              u, or a float32 copy
megatron-core's distributed optimizer      the same                                    this rank's slice of the copy
=========================================  ==========================================  ============================

megatron-core calls `step_with_ready_grads` on every rank, even on one that trains nothing and has no torch optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nemo_tied_lora.errors import ConfigError

__all__ = ["Slice", "call_at_each_step", "is_distributed", "slices_of"]


@dataclass(frozen=True)
class Slice:
    """A part of a parameter that this rank's optimizer steps. value, gradient: flat, of the elements from `start` on."""

    value: torch.Tensor
    gradient: torch.Tensor | None
    start: int
    is_shared_out: bool
    """Whether other data-parallel ranks have the other parts; otherwise each of them has this one too."""


def call_at_each_step(optimizer: Any, function: Callable[[], None]) -> Callable[[], None]:
    """Makes `optimizer` call the function at each step. Returns a function that undoes this.

    Raises:
        ConfigError: not an optimizer that the table above lists.
    """
    inner = _unwrapped(optimizer)
    if hasattr(inner, "step_with_ready_grads"):
        return _before_megatrons_step(inner, function)
    if not isinstance(inner, torch.optim.Optimizer) or not hasattr(inner, "_optimizer_step_pre_hooks"):
        name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        raise ConfigError(
            [f"rank_budget: the optimizer is a {name}; pass one of torch, or what get_megatron_optimizer returns"]
        )

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            function()
            return None

        def computed() -> Any:
            loss = closure()
            function()
            return loss

        return args[:1], {**kwargs, "closure": computed}

    return inner.register_step_pre_hook(hook).remove


def is_distributed(optimizer: Any) -> bool:
    """Whether megatron-core's distributed optimizer steps this stage's parameters: the same on its data-parallel ranks."""
    return any(hasattr(part, "model_param_group_index_map") for part in _parts(optimizer))


def slices_of(optimizer: Any, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Slice]:
    """The parts of the parameters that this rank's optimizer steps. A parameter of which it steps nothing is left out."""
    wanted = list(parameters)
    found: dict[nn.Parameter, Slice] = {}
    for part in _parts(optimizer):
        distributed = hasattr(part, "model_param_group_index_map")
        found.update(_distributed_slices(part, wanted) if distributed else _whole_slices(part, wanted))
    return found


def _parts(optimizer: Any) -> Sequence[Any]:
    optimizer = getattr(optimizer, "mcore_optimizer", optimizer)
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer in NeMo's wrappers."""
    if hasattr(optimizer, "mcore_optimizer"):
        return optimizer.mcore_optimizer
    is_o2 = hasattr(optimizer, "fp32_from_float16_groups") and not hasattr(optimizer, "step_with_ready_grads")
    return optimizer.optimizer if is_o2 else optimizer


def _before_megatrons_step(optimizer: Any, function: Callable[[], None]) -> Callable[[], None]:
    original = optimizer.step_with_ready_grads

    def step_with_ready_grads(*args: Any, **kwargs: Any) -> Any:
        function()
        return original(*args, **kwargs)

    optimizer.step_with_ready_grads = step_with_ready_grads

    def undo() -> None:
        if optimizer.__dict__.get("step_with_ready_grads") is step_with_ready_grads:
            del optimizer.step_with_ready_grads

    return undo


def _copies(optimizer: Any) -> Mapping[nn.Parameter, torch.Tensor]:
    """16-bit parameters to the float32 copies that are stepped in their place."""
    models, masters = (getattr(optimizer, f"{name}_groups", []) for name in ("float16", "fp32_from_float16"))
    pairs: Iterator[Any] = zip(models, masters, strict=True)
    return {model: master for group in pairs for model, master in zip(*group, strict=True)}


def _whole_slices(optimizer: Any, parameters: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Slice]]:
    groups = getattr(optimizer, "param_groups", None) or []
    copies, stepped = _copies(optimizer), {id(tensor) for group in groups for tensor in group["params"]}
    for parameter in parameters:
        tensor = copies.get(parameter, parameter)
        if id(tensor) in stepped:
            gradient = None if tensor.grad is None else tensor.grad.detach().reshape(-1)
            yield parameter, Slice(tensor.detach().reshape(-1), gradient, 0, is_shared_out=False)


def _distributed_slices(part: Any, parameters: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Slice]]:
    for parameter in parameters:
        if parameter in part.model_param_group_index_map:
            group, place = part.model_param_group_index_map[parameter]
            stepped = part.optimizer.param_groups[group]["params"][place]
            gradient = getattr(stepped, "decoupled_grad", None)  # of the precision-aware optimizer
            gradient = stepped.grad if gradient is None else gradient
            start = part._get_model_param_range_map(parameter)["param"].start
            yield parameter, Slice(stepped.detach().reshape(-1), gradient, start, is_shared_out=True)
