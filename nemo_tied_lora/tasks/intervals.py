# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals by the bootstrap: over items, of paired differences, and over seeds and items together.

Every function works on statistics (items, k): numbers whose sums over items give the metric, as `Metric` makes them. So
corpus metrics such as BLEU are resampled exactly, without scoring a text again.

Two arrays with the same number of items are resampled with the same draws of items, because the draws depend on the seed
and the number of items alone. So a difference of two runs is paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "Interval",
    "difference",
    "difference_over_seeds",
    "interval",
    "over_items",
    "over_seeds",
    "resampled_sums",
]

LEVEL = 0.95
RESAMPLES = 10_000
_CHUNK = 2_000_000
"""So many draws of an item are held at a time."""

Value = Callable[[np.ndarray], np.ndarray]
"""Sums (..., k) to the metric (...)."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval, in the metric's unit."""

    value: float
    low: float
    high: float


def interval(value: float, resampled: np.ndarray, level: float = LEVEL) -> Interval:
    """The percentile interval of resampled values (resamples,)."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def resampled_sums(statistics: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Sums over items drawn with replacement: (items, k) to (resamples, k).

    The draws depend on `seed`, `resamples` and the number of items alone.
    """
    items = len(statistics)
    draws = np.random.default_rng(seed)
    sums = np.empty((resamples, statistics.shape[1]))
    rows = max(1, _CHUNK // items)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = draws.integers(0, items, (count, items)) + items * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * items).reshape(count, items)
        sums[start : start + count] = times @ statistics
    return sums


def over_items(statistics: np.ndarray, value: Value, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The metric of one run, with its interval over items.

    Args:
        statistics: (items, k).
    """
    sums = resampled_sums(statistics, resamples=resamples, seed=seed)
    return interval(float(value(statistics.sum(0))), value(sums))


def difference(
    first: np.ndarray, second: np.ndarray, value: Value, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Second minus first, with its interval over items that both have answered.

    Args:
        first, second: (items, k), of the same items in the same order.

    Raises:
        ValueError: the numbers of items differ.
    """
    _check_paired([first], [second])
    sums = (resampled_sums(one, resamples=resamples, seed=seed) for one in (first, second))
    before, after = (value(one) for one in sums)
    return interval(float(value(second.sum(0)) - value(first.sum(0))), after - before)


def over_seeds(runs: Sequence[np.ndarray], value: Value, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of the metric over runs that differ in their seed, with its interval over seeds and items.

    Args:
        runs: one array (items, k) for each seed, of the same items in the same order.

    Raises:
        ValueError: the numbers of items differ.
    """
    return _over_seeds([(run,) for run in runs], lambda sums: value(sums[0]), resamples, seed)


def difference_over_seeds(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    value: Value,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean over seeds of second minus first, with its interval over seeds and items.

    Each resample draws seeds and items with replacement. All seeds share the draw of items, because they answer the same
    items: drawing anew for each seed would count the noise of the items as if more seeds could remove it.

    The deviations between drawn seeds are widened by sqrt(S / (S - 1)) for S seeds: S draws from S seeds vary less than S
    new seeds would. docs/evaluate.md says what remains of the coverage for 2 and 3 seeds. One seed: an interval over
    items alone.

    Args:
        first, second: one array (items, k) for each seed; the n-th of both belong to the same seed.

    Raises:
        ValueError: the numbers of seeds or of items differ.
    """
    _check_paired(first, second)
    pairs = list(zip(first, second, strict=True))
    return _over_seeds(pairs, lambda sums: value(sums[1]) - value(sums[0]), resamples, seed)


def _over_seeds(
    runs: Sequence[tuple[np.ndarray, ...]],
    value: Callable[[Sequence[np.ndarray]], np.ndarray],
    resamples: int,
    seed: int,
) -> Interval:
    """The interval of the mean over seeds of `value`, which takes the sums of one seed's arrays (items, k) together."""
    _check_paired([run[0] for run in runs], [run[-1] for run in runs])
    seeds = len(runs)
    each = np.stack([value([resampled_sums(one, resamples=resamples, seed=seed) for one in run]) for run in runs])
    drawn = np.random.default_rng([seed, seeds]).integers(0, seeds, (seeds, resamples))
    mean = each.mean(0)
    deviations = np.take_along_axis(each, drawn, 0).mean(0) - mean
    widened = mean + deviations * (np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0)
    estimate = np.mean([value([one.sum(0) for one in run]) for run in runs])
    return interval(float(estimate), widened)


def _check_paired(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> None:
    if len(first) != len(second):
        raise ValueError(f"runs are paired by seed, but there are {len(first)} and {len(second)}")
    sizes = sorted({len(one) for one in (*first, *second)})
    if len(sizes) > 1:
        raise ValueError(f"runs are paired by item, but they have {' and '.join(map(str, sizes))} items")
