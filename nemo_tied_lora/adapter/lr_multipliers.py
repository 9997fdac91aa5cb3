# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each factor, as a multiple of the run's one rate: defaults by preset and rank, and their checks.

Adam moves every element by about its rate, whatever the size of its gradient. So one rate for A, B, u and v is a choice, not
a neutral start, and the best one changes with the rank and the preset. `DEFAULTS` holds the multipliers that make up for it.

Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_tied_lora.config import PRESETS, TiedLoraConfig
from nemo_tied_lora.errors import Problems, is_number

__all__ = ["DEFAULTS", "ByRank", "factor_multipliers", "multiplier_problems", "without_effect"]

_NAMES = ("A", "B", "u", "v")


@dataclass(frozen=True)
class ByRank:
    """A multiplier that depends on the rank: `at_rank_8 * (rank / 8) ** power`."""

    at_rank_8: float
    power: float = 0.0

    def at(self, rank: int) -> float:
        """The multiplier at this rank."""
        return self.at_rank_8 * (rank / 8) ** self.power


DEFAULTS: dict[str, dict[str, ByRank]] = {
    "lora": {"A": ByRank(1.0), "B": ByRank(1.0, -1.0)},
    "tl5": {"A": ByRank(2.0, -0.5), "B": ByRank(2.0, -0.5)},
    "tl6": {"A": ByRank(4.0), "B": ByRank(4.0, -0.5), "u": ByRank(4.0), "v": ByRank(4.0, -0.5)},
    "vera": {"u": ByRank(40.0), "v": ByRank(40.0, -0.5)},
    "adalora": {"A": ByRank(4.0), "B": ByRank(4.0), "u": ByRank(4.0, -0.5)},
}
"""The default multipliers of each preset, measured: docs/learning_rates.md. One rate serves all of them at every rank: the best
one of plain LoRA of rank 8. A factor or a preset that is not here has 1."""


def factor_multipliers(
    config: TiedLoraConfig, given: Mapping[str, Any] | None = None, key: str = "lr_multipliers"
) -> dict[str, float]:
    """Returns the multiplier of each trained factor, in the order of `config.trained`.

    Args:
        given: factor to multiplier; None, or a factor that is missing or None: the default. The defaults are those of the
            preset whose fields the configuration has, however it was written; without one, 1. Factors that are not trained
            have no effect.
        key: the name of `given` in messages.

    Raises:
        ConfigError: lists every name that is no factor, and every value that is not a finite number greater than 0.
    """
    Problems(multiplier_problems(given, key)).raise_if_any()
    own = given or {}
    defaults = DEFAULTS.get(_preset_of(config) or "", {})
    chosen = {}
    for factor in config.trained:
        default = defaults.get(factor, ByRank(1.0)).at(config.rank)
        chosen[factor] = default if own.get(factor) is None else float(own[factor])
    return chosen


def multiplier_problems(given: object, key: str = "lr_multipliers") -> Iterator[str]:
    """Yields a line for each name that is no factor, and each value that is not a finite number greater than 0."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        yield f"{key}={given!r}: must give a number for each factor, as {{A: 1, B: 4}}"
        return
    for name, value in given.items():
        if name not in _NAMES:
            close = _likely(str(name))
            hint = f" (did you mean {close}?)" if close else ""
            yield f"{key}.{name}={value!r}: {name} is no factor{hint}; the factors are {', '.join(_NAMES)}"
        elif value is not None and not (is_number(value) and value > 0):
            remedy = f"to keep {name} as it is, leave it out of model.peft.tied_lora.trained"
            yield f"{key}.{name}={value!r}: must be a finite number greater than 0; {remedy}"


def without_effect(config: TiedLoraConfig, given: Mapping[str, Any] | None) -> list[str]:
    """The factors of `given` that have a value and are not trained."""
    return [name for name, value in (given or {}).items() if value is not None and name not in config.trained]


def _preset_of(config: TiedLoraConfig) -> str | None:
    """The preset whose fields the configuration has."""
    for name, fields in PRESETS.items():
        if all(getattr(config, field) == value for field, value in fields.items()):
            return name
    return None


def _likely(name: str) -> str | None:
    """The factor that a user may have meant: `a` for A, `U` for u, `lora_B` for B."""
    last = name.rpartition("_")[2]
    same = [factor for factor in _NAMES if factor == last or factor.lower() == last.lower()]
    return next(iter(same or difflib.get_close_matches(name, _NAMES, n=1)), None)
