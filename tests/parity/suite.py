# SPDX-License-Identifier: Apache-2.0
"""Runs all layouts with the same number of ranks in one start. Each rank compares its records with the oracle's."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from tests.harness.ranks import run_ranks, single_process
from tests.parity.comparison import Verdict, compare, unequal_to_plain
from tests.parity.layouts import LAYOUTS
from tests.parity.runs import FAULTS, TOLERANCES, Run, oracle_of, runs_of
from tests.parity.training import Record, train

__all__ = ["all_runs", "oracle", "verdicts"]


def verdicts(layout: str, run: str) -> list[Verdict]:
    """Each rank's verdict on one run on one layout."""
    outcome = _outcome(LAYOUTS[layout].world_size)
    if isinstance(outcome, AssertionError):
        raise outcome
    return [rank[layout, run] for rank in outcome]


@functools.cache
def _oracle(key: str) -> Record:
    single_process()
    return train(_requests()[key])


def oracle(run: Run) -> Record:
    """The single-process run's record."""
    return _oracle(repr(oracle_of(run)))


@functools.cache
def _requests() -> dict[str, Run]:
    runs = [run for layout in LAYOUTS for run in all_runs(layout).values()]
    return {repr(oracle_of(run)): oracle_of(run) for run in runs}


def all_runs(layout: str) -> dict[str, Run]:
    """The runs of a layout, with its planted errors."""
    return runs_of(layout) | FAULTS.get(layout, {})


@functools.cache
def _outcome(world_size: int) -> list[dict[tuple[str, str], Verdict]] | AssertionError:
    """Each rank's verdicts. The ranks start once, even if they fail."""
    plan = {name: all_runs(name) for name, layout in LAYOUTS.items() if layout.world_size == world_size}
    expected = {repr(oracle_of(run)): oracle(run) for runs in plan.values() for run in runs.values()}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "oracle.pt")
        torch.save(expected, path)
        if world_size == 1:
            return [_on_a_rank(plan, path)]
        try:
            return run_ranks(_on_a_rank, plan, path, world_size=world_size, timeout=600)
        except AssertionError as failure:
            return failure


def _on_a_rank(plan: dict[str, dict[str, Run]], path: str) -> dict[tuple[str, str], Verdict]:
    expected = torch.load(path, weights_only=False)
    results = {}
    for name, runs in plan.items():
        layout = LAYOUTS[name]
        if layout.world_size > 1:
            layout.enter()
        for run_name, run in runs.items():
            record, single = train(run, sequence_parallel=layout.sequence_parallel), expected[repr(oracle_of(run))]
            results[name, run_name] = verdict = compare(record, single, TOLERANCES[run.dtype])
            if run.base is not None:
                twin = train(replace(run, plain=True, fault=None), sequence_parallel=layout.sequence_parallel)
                verdict.unequal = unequal_to_plain(record, twin, single)
    return results
