# SPDX-License-Identifier: Apache-2.0
"""What the package's default multipliers reach in the sweep of the rates. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nemo_tied_lora.adapter.lr_multipliers import DEFAULTS

from .plan import Plan
from .sweeping import Curve, best_gains

__all__ = ["default_shares"]


def default_shares(plan: Plan, found: Sequence[Curve], preset: str) -> dict[int, float]:
    """Rank to the share of its best gain that a preset reaches with its defaults, at the plan's one rate.

    Ranks are left out at which no run had these rates.
    """
    best = best_gains(found)
    shares: dict[int, float] = {}
    for curve in found:
        if curve.preset == preset:
            wanted = {factor: plan.one_rate * by.at(curve.rank) for factor, by in DEFAULTS[preset].items()}
            rate = _same(curve.gains, plan.multipliers(curve.rule, curve.rank), wanted)
            if rate is not None:
                shares[curve.rank] = curve.gains[rate] / best[preset, curve.rank]
    return dict(sorted(shares.items()))


def _same(gains: Mapping[float, float], multipliers: Mapping[str, float], wanted: Mapping[str, float]) -> float | None:
    """The rate of a curve at which each factor has its wanted rate."""
    for rate in gains:
        if all(math.isclose(rate * multipliers.get(factor, 1.0), one, rel_tol=1e-6) for factor, one in wanted.items()):
            return rate
    return None
