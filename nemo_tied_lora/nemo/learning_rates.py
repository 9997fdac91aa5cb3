# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each factor in NeMo's loops: parameter groups, NeMo's schedule, and the log.

NeMo's schedules cannot scale a group: `min_lr` is one number for all groups, and some take the first group's rate for all.
So every group has the run's rate for NeMo, and its multiplier acts on what NeMo's schedule returns: on the peak, the warm-up
and `min_lr` alike.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from omegaconf import open_dict

from nemo_tied_lora.adapter.factor_names import FactorName
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.lr_multipliers import factor_multipliers
from nemo_tied_lora.adapter.rate_groups import groups_by_multiplier, split_megatron_groups
from nemo_tied_lora.errors import ConfigError

__all__ = ["FactorRatesMixin", "scaled"]

_KEY = "lr_multipliers"


class FactorRatesMixin:
    """A mixin in front of a NeMo model: `model.optim.lr_multipliers` scales the learning rate of the adapter's factors.

    It works in the O1 and O2 loops and with `mcore_distributed_optim`. Without an adapter, the rates are NeMo's.
    """

    tied_lora: Adapter | None
    lr_multipliers: Mapping[str, float] = {}
    """Each trained factor's multiplier, the defaults included. Set when the optimizer is made."""

    def setup_optimizer_param_groups(self) -> None:
        """Sets a group for each multiplier, each parameter listed once; NeMo's groups without an adapter."""
        if self.tied_lora is None:
            super().setup_optimizer_param_groups()  # type: ignore[misc]
            return
        named = list(self.tied_lora.named_parameters())
        self._optimizer_param_groups = tuple(groups_by_multiplier(named, self.lr_multipliers))

    def setup_optimization(self, optim_config: Any = None, optim_kwargs: Any = None) -> Any:
        """NeMo's, which would pass `lr_multipliers` on to the class of the optimizer.

        Raises:
            ConfigError: a multiplier is wrong, or there is no adapter.
        """
        optim: Any = self._optim_config_copy(optim_config)  # type: ignore[attr-defined]
        if optim is None or (_KEY not in optim and self.tied_lora is None):
            return super().setup_optimization(optim, optim_kwargs)  # type: ignore[misc]
        with open_dict(optim):
            given = optim.pop(_KEY, None)
        multiplier_of = {}
        if self.tied_lora is not None:
            self.lr_multipliers = factor_multipliers(self.tied_lora.config, given, f"model.optim.{_KEY}")
            named = self.tied_lora.named_parameters()
            multiplier_of = {p: self.lr_multipliers[FactorName.parse(name).factor] for name, p in named}
        elif any(value is not None for value in (given or {}).values()):
            raise ConfigError([f"model.optim.{_KEY}={given}: there is no adapter to scale; leave it out"])
        with split_megatron_groups(multiplier_of):
            made = super().setup_optimization(optim, optim_kwargs)  # type: ignore[misc]
        if self.tied_lora is not None:  # a base's .nemo holds this section, and stock NeMo would fail with the key
            with open_dict(self.cfg):  # type: ignore[attr-defined]
                self.cfg.optim[_KEY] = given  # type: ignore[attr-defined]
        return made

    def configure_optimizers(self) -> Any:
        """NeMo's, with each group's rate scaled."""
        made = super().configure_optimizers()  # type: ignore[misc]
        if self.tied_lora is not None:
            if (schedule := self._schedule()) is not None:
                scaled(schedule)
            else:
                for group in self._optimizer.param_groups:  # type: ignore[attr-defined]
                    group["lr"] *= group.get("lr_mult", 1.0)
        return made

    def training_step(self, dataloader_iter: Any) -> Any:
        """NeMo's. Logs the schedule's rate as `lr`, and the factors' rates as `lr_A`, ... if they are not the same.

        NeMo logs the first group's rate.
        """
        loss = super().training_step(dataloader_iter)  # type: ignore[misc]
        if any(multiplier != 1.0 for multiplier in self.lr_multipliers.values()):
            schedule = self._schedule()
            rate = self.cfg.optim.lr if schedule is None else schedule.unscaled  # type: ignore[attr-defined]
            rates = {"lr": rate, **{f"lr_{factor}": rate * m for factor, m in self.lr_multipliers.items()}}
            for name, value in rates.items():
                self.log(name, value, rank_zero_only=True, batch_size=1)  # type: ignore[attr-defined]
        return loss

    def _schedule(self) -> Any:
        """NeMo's schedule; None for a constant rate."""
        made = getattr(self, "_scheduler", None)
        return None if made is None else made["scheduler"]


def scaled(schedule: Any) -> Any:
    """Makes a schedule scale each of its optimizer's groups by its `lr_mult`. Changes and returns the schedule."""
    if not isinstance(schedule, _Scaled):
        groups = schedule.optimizer.param_groups
        kind: Any = type(schedule)
        schedule.__class__ = _scaled_class(kind)
        schedule.keep_rate(groups[0]["lr"] if groups else 0.0)
    return schedule


class _Scaled:
    """In front of a schedule of torch or NeMo."""

    optimizer: Any
    base_lrs: list[float]
    _last_lr: list[float]
    unscaled: float
    """The rate of a group whose multiplier is 1. Checkpoints hold it: the product is the same, to the bit."""

    def get_lr(self) -> list[float]:
        groups, now = self.optimizer.param_groups, self.unscaled
        for group in groups:
            group["lr"] = now  # torch's StepLR multiplies it
        rates: list[float] = super().get_lr()  # type: ignore[misc]
        self.keep_rate(now)
        self.unscaled = rates[0] if rates else now
        return self._of_groups(self.unscaled)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets the groups' rates too. On another layout, this rank may have another number of groups."""
        before, now = len(state["base_lrs"]), len(self.optimizer.param_groups)
        # Lists have an entry for each group. All entries are equal, because NeMo knows no multipliers.
        lists = {key for key, value in state.items() if isinstance(value, list) and 0 < before == len(value)}
        rate = state["unscaled"] if "unscaled" in state else state["_last_lr"][0]
        super().load_state_dict({**state, **{key: [state[key][0]] * now for key in lists}})  # type: ignore[misc]
        self.keep_rate(rate)

    def keep_rate(self, unscaled: float) -> None:
        """Sets the groups' rates until the next step of the schedule."""
        self.unscaled = unscaled
        self._last_lr = self._of_groups(unscaled)
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def _of_groups(self, unscaled: float) -> list[float]:
        return [unscaled * group.get("lr_mult", 1.0) for group in self.optimizer.param_groups]


@functools.cache
def _scaled_class(kind: type) -> type:
    return type(f"Scaled{kind.__name__}", (_Scaled, kind), {})
