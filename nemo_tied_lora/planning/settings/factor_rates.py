# SPDX-License-Identifier: Apache-2.0
"""Checks `model.optim.lr_multipliers` before a run, and says which rate each factor gets. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_tied_lora.adapter.lr_multipliers import factor_multipliers, multiplier_problems, without_effect
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import is_number

__all__ = ["KEY", "rate_lines", "rate_problems", "resolved_multipliers"]

KEY = "model.optim.lr_multipliers"


def rate_problems(cfg: Mapping[str, Any], *, adapter: bool) -> Iterator[str]:
    """Yields a line for each multiplier that no run can use.

    Args:
        adapter: whether the run trains an adapter. Without one, no multiplier has a meaning.
    """
    given = _given(cfg)
    yield from multiplier_problems(given, KEY)
    if not adapter and isinstance(given, Mapping):
        set_ = {name: value for name, value in given.items() if value is not None}
        for name, value in set_.items():
            yield f"{KEY}.{name}={value!r}: this run trains no adapter, so it has no factors; leave it out"


def rate_lines(cfg: Mapping[str, Any], config: TiedLoraConfig) -> Iterator[str]:
    """Yields which rate each factor gets, if they differ, and which multipliers have no effect. `cfg` has no problems."""
    given, lr = _given(cfg), cfg["model"]["optim"].get("lr")
    multipliers = factor_multipliers(config, given, KEY)
    if any(multiplier != 1.0 for multiplier in multipliers.values()) and is_number(lr):
        rates = ", ".join(f"{factor} {lr * multiplier:.4g}" for factor, multiplier in sorted(multipliers.items()))
        own = any((given or {}).get(factor) is not None for factor in multipliers)
        source = KEY if own else f"the preset's multipliers for rank {config.rank}"
        yield f"model.optim.lr={lr:g}: with {source}, the factors have {rates}"
    for factor in without_effect(config, given):
        yield f"{KEY}.{factor}={given[factor]:g}: has no effect, because {factor} is not trained"


def resolved_multipliers(cfg: Mapping[str, Any], config: TiedLoraConfig) -> dict[str, float]:
    """The multipliers that are not 1, the defaults included: what a resumed run must share.

    Raises:
        ConfigError: a multiplier is wrong.
    """
    multipliers = factor_multipliers(config, _given(cfg), KEY)
    return {factor: multiplier for factor, multiplier in multipliers.items() if multiplier != 1.0}


def _given(cfg: Mapping[str, Any]) -> Any:
    optim = cfg["model"].get("optim")
    return optim.get("lr_multipliers") if isinstance(optim, Mapping) else None
