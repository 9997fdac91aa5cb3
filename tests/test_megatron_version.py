# SPDX-License-Identifier: Apache-2.0
"""Two ranks on the newer release of megatron-core, one process on the older: what differs between them is as it is said."""

from __future__ import annotations

import pytest

from nemo_tied_lora.config import ConfigError
from nemo_tied_lora.megatron_version import counts_repeated_gradients, megatron_version
from tests.parity.comparison import compare
from tests.parity.layouts import Layout
from tests.parity.runs import TL6, Run, oracle_of
from tests.parity.training import Record, train
from tests.ranks import run_ranks, single_process

RELATIVE = 1e-9  # float64, and sums are only reordered
OVERLAP_AND_RECOMPUTE = Run(config=TL6, loop="ddp overlap", recompute="full", steps=3)


def on_a_rank() -> Record:
    Layout(dp=2).enter()
    return train(OVERLAP_AND_RECOMPUTE)


def test_the_release_is_one_of_the_two_that_are_tested() -> None:
    assert megatron_version() in ((0, 13), (0, 16))


def test_overlap_with_full_recomputation_is_refused_by_name_or_reproduces_the_single_process_run() -> None:
    """Full recomputation gives a tied factor its gradient in parts, one a layer; the sum over ranks must wait for all."""
    single_process()
    if not counts_repeated_gradients():
        with pytest.raises(ConfigError, match=r"overlap_grad_reduce=True: not possible .* before megatron-core 0\.16"):
            train(OVERLAP_AND_RECOMPUTE)
        return
    expected = train(oracle_of(OVERLAP_AND_RECOMPUTE))
    for record in run_ranks(on_a_rank, world_size=2):
        assert compare(record, expected, RELATIVE).problems == []
