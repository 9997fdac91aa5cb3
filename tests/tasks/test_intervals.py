# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals: exact where that is possible, their coverage on simulated data, and their speed. Pure maths."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from nemo_tied_lora.tasks.intervals import (
    Interval,
    difference,
    difference_over_seeds,
    over_items,
    over_seeds,
    resampled_sums,
)


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def scores(values: np.ndarray) -> np.ndarray:
    """Statistics (items, 2) of scores (items,)."""
    return np.stack([values, np.ones(len(values))], 1)


def share_that_covers(make: Callable[[np.random.Generator], Interval], truth: float, runs: int = 300) -> float:
    intervals = [make(np.random.default_rng(run)) for run in range(runs)]
    return float(np.mean([one.low <= truth <= one.high for one in intervals]))


def test_a_resample_has_as_many_items_each_drawn_as_often_as_any() -> None:
    sums = resampled_sums(np.eye(5), resamples=4000)
    assert set(sums.sum(1)) == {5}
    assert sums.mean(0) == pytest.approx(np.ones(5), abs=0.06)
    assert sums.var() == pytest.approx(0.8, abs=0.05)  # of a binomial count


def test_the_interval_is_that_of_the_normal_law_for_many_items() -> None:
    values = np.random.default_rng(0).normal(7, 2, 400)
    found = over_items(scores(values), mean)
    half = 1.96 * values.std() / 20
    assert (found.value, found.low, found.high) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half), abs=0.02
    )


def test_an_interval_over_items_covers_the_truth_95_times_in_100() -> None:
    def one(draw: np.random.Generator) -> Interval:
        return over_items(scores((draw.random(200) < 0.7) * 100.0), mean, resamples=500)

    assert 0.91 <= share_that_covers(one, 70.0) <= 0.98


def test_a_difference_is_paired_so_what_items_share_does_not_widen_it() -> None:
    draw = np.random.default_rng(1)
    hard = draw.normal(0, 30, 300)
    first, second = (scores(hard + draw.normal(shift, 3, 300)) for shift in (50, 52))
    paired = difference(first, second, mean)
    assert paired.value == pytest.approx(2, abs=0.7)
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * 3 * np.sqrt(2 / 300), rel=0.15)
    alone = over_items(second, mean)
    assert alone.high - alone.low > 5 * (paired.high - paired.low)
    swapped = difference(second, first, mean)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-paired.value, -paired.high, -paired.low))


def test_only_runs_of_the_same_items_and_seeds_are_compared() -> None:
    with pytest.raises(ValueError, match="they have 5 and 6 items"):
        difference(np.ones((5, 2)), np.ones((6, 2)), mean)
    with pytest.raises(ValueError, match="paired by seed, but there are 1 and 2"):
        difference_over_seeds([np.ones((5, 2))], [np.ones((5, 2))] * 2, mean)
    with pytest.raises(ValueError, match="they have 5 and 6 items"):
        over_seeds([np.ones((5, 2)), np.ones((6, 2))], mean)


def runs_of(draw: np.random.Generator, seeds: int, *, seed_noise: float, items: int = 200) -> list[np.ndarray]:
    """Differences of scores around 0: of the seed, of the item, and of both."""
    both = draw.normal(0, seed_noise, (seeds, 1)) + draw.normal(0, 25, (1, items)) + draw.normal(0, 40, (seeds, items))
    return [scores(one) for one in both]


@pytest.mark.parametrize(("seeds", "seed_noise"), [(3, 0.0), (3, 3.0), (2, 3.0)])
def test_an_interval_over_seeds_and_items_covers_the_truth(seeds: int, seed_noise: float) -> None:
    nothing = [scores(np.zeros(200))] * seeds

    def one(draw: np.random.Generator) -> Interval:
        runs = runs_of(draw, seeds, seed_noise=seed_noise)
        return difference_over_seeds(nothing, runs, mean, resamples=300)

    assert share_that_covers(one, 0.0, runs=150) >= 0.91


def test_an_interval_over_items_alone_is_too_narrow_where_seeds_differ() -> None:
    """The negative control: what the resampling of seeds is for."""

    def one(draw: np.random.Generator) -> Interval:
        together = np.mean(runs_of(draw, 3, seed_noise=10.0), 0)
        return over_items(together, mean, resamples=300)

    assert share_that_covers(one, 0.0, runs=150) < 0.75


def test_one_seed_gives_the_interval_over_items() -> None:
    draw = np.random.default_rng(2)
    first, second = (scores(draw.normal(shift, 5, 50)) for shift in (0, 1))
    assert difference_over_seeds([first], [second], mean) == difference(first, second, mean)
    assert over_seeds([first], mean) == over_items(first, mean)


def test_seeds_share_their_draw_of_items() -> None:
    """Equal runs of all seeds hold no more than one run does, so more seeds must not narrow the interval."""
    run = scores(np.random.default_rng(3).normal(0, 5, 100))
    found, alone = over_seeds([run] * 4, mean), over_items(run, mean)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))


def test_1000_items_are_resampled_10000_times_in_about_a_second() -> None:
    statistics = np.random.default_rng(4).random((1000, 10))
    start = time.process_time()
    resampled_sums(statistics, resamples=10_000)
    assert time.process_time() - start < 3  # 0.2 s on a free core
