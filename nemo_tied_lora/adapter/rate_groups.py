# SPDX-License-Identifier: Apache-2.0
"""The optimizer's parameter groups of an adapter: one for each learning rate. For torch's optimizers and Megatron's.

Factors with the same multiplier share a group, so without multipliers there is one. Every group has the key `lr_mult`, as in
Megatron.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from nemo_tied_lora.adapter.factor_names import FactorName

__all__ = ["groups_by_multiplier", "megatron_optimizer", "megatron_overrides", "split_megatron_groups"]


def groups_by_multiplier(
    named: Sequence[tuple[str, nn.Parameter]], multipliers: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Returns `{"params": [...], "lr_mult": m}` for each multiplier: the same number of groups on every rank.

    A pipeline stage that trains none of a group's factors gets an empty group, so that it still takes part in every
    collective. Each parameter is listed once, however many layers share it: else it would be stepped once per layer.

    Args:
        named: the trained parameters of this rank, as `Adapter.named_parameters` yields them.
        multipliers: as `factor_multipliers` returns them.
    """
    groups: dict[float, list[nn.Parameter]] = {multiplier: [] for multiplier in multipliers.values()}
    for name, parameter in named:
        groups[multipliers[FactorName.parse(name).factor]].append(parameter)
    return [{"params": parameters, "lr_mult": multiplier} for multiplier, parameters in groups.items()]


def megatron_optimizer(
    named: Sequence[tuple[str, nn.Parameter]],
    multipliers: Mapping[str, float],
    config: Any,
    model_chunks: Sequence[nn.Module],
    **more: Any,
) -> Any:
    """Returns `get_megatron_optimizer(config, model_chunks, **more)` with a group for each multiplier.

    megatron-core 0.16 takes them as `config_overrides`. Before that it takes one multiplier alone (`scale_lr_cond`,
    `lr_mult`), so the groups that it has built are split, by the same key `lr_mult`. In both, `lr` of a group is scaled at
    once, and `OptimizerParamScheduler` scales what it sets: maximum, minimum and warm-up.
    """
    from megatron.core import optimizer as megatron

    multiplier_of = {parameter: multipliers[FactorName.parse(name).factor] for name, parameter in named}
    if "config_overrides" in inspect.signature(megatron.get_megatron_optimizer).parameters:
        own = more.pop("config_overrides", None)
        overrides = megatron.get_standard_config_overrides(config) if own is None else dict(own)
        overrides |= megatron_overrides(multiplier_of, config)
        return megatron.get_megatron_optimizer(config, model_chunks, config_overrides=overrides, **more)
    with split_megatron_groups(multiplier_of):
        made = megatron.get_megatron_optimizer(config, model_chunks, **more)
    for group in made.param_groups:
        group["lr"] = group["max_lr"] * group["lr_mult"]
    return made


@contextmanager
def split_megatron_groups(multiplier_of: Mapping[nn.Parameter, float]) -> Iterator[None]:
    """A context in which megatron-core before 0.16 builds an optimizer's groups by multiplier.

    Args:
        multiplier_of: the model's parameters; those that are missing have 1.
    """
    from megatron.core import optimizer as megatron

    build: Callable[..., list[dict[str, Any]]] = megatron._get_param_groups

    def split(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        groups = []
        for group in build(*args, **kwargs):
            parts: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                parts.setdefault(multiplier_of.get(parameter, 1.0), []).append(parameter)
            groups += [
                {**group, "params": parameters, "lr_mult": group["lr_mult"] * multiplier}
                for multiplier, parameters in parts.items()
            ]
        return groups

    megatron._get_param_groups = split
    try:
        yield
    finally:
        megatron._get_param_groups = build


def megatron_overrides(multiplier_of: Mapping[nn.Parameter, float], config: Any) -> dict[Any, Any]:
    """`config_overrides` of megatron-core from 0.16 on, for the parameters whose multiplier is not 1.

    Its scheduler reads `max_lr` and `min_lr`. Its checkpoints tell groups apart by `lr_mult`, among others.
    """
    from megatron.core.optimizer import ParamKey
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

    overrides = {}
    for multiplier in sorted(set(multiplier_of.values()) - {1.0}):

        def is_one(parameter: nn.Parameter, name: str, multiplier: float = multiplier) -> bool:
            return multiplier_of.get(parameter) == multiplier

        predicate = ParamWithNamePredicate(name=f"tied_lora lr_mult={multiplier!r}", fn=is_one)
        rate = config.lr * multiplier
        least = None if config.min_lr is None else config.min_lr * multiplier
        group = {"lr": rate, "max_lr": rate, "min_lr": least, "lr_mult": multiplier}
        overrides[ParamKey(with_name_predicate=predicate)] = group
    return overrides
