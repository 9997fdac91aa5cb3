# SPDX-License-Identifier: Apache-2.0
"""Negative controls: each guard switched off in turn, and the test that goes red. None may stay green.

Those of the parameters' flags and of the sums are in tests/parity/runs.py (FAULTS).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.switched_off import VARIABLE

# What is switched off: (where, the test, words of its failure: it is to fail for want of the guard and of nothing else).
CONTROLS = {
    "tie guard": (
        "nemo_tied_lora.tie_guard:check_ties",
        "test_tie_guard.py::test_a_chunk_that_differs_inside_one_process_is_named",
        "DID NOT RAISE",
    ),
    "tie guard before a save": (
        "nemo_tied_lora.tie_guard:check_ties",
        "test_tie_guard.py::test_nothing_is_saved_over_a_good_file",
        "assert",
    ),
    "look at the gradients": (
        "nemo_tied_lora.finite_gradients:find_nonfinite",
        "test_guarded_training.py::test_the_tensor_nearest_to_the_cause_is_named",
        "assert",
    ),
    "check of a loaded state": (
        "nemo_tied_lora.adapter_state:check_state",
        "test_adapter_state.py::test_a_bad_state_is_refused_with_every_reason_and_nothing_is_changed[NaN]",
        "DID NOT RAISE",
    ),
    "the base's architecture": (
        "nemo_tied_lora.base_identity:check_architecture",
        "test_base_identity.py::test_another_architecture_is_refused_with_each_difference",
        "BaseMismatchError",
    ),
    "the base's fingerprint": (
        "nemo_tied_lora.base_identity:check_weights",
        "test_base_identity.py::test_other_weights_are_refused_by_name_and_can_be_allowed",
        "DID NOT RAISE",
    ),
    "loops that NeMo gets wrong": (
        "nemo_tied_lora.loops:loop_problems()",
        "test_nemo_loops.py::test_what_nemo_cannot_do_is_refused_by_name",
        "DID NOT RAISE",
    ),
    "layouts of experts": (
        "nemo_tied_lora.experts:refused_layouts()",
        "test_moe.py::test_layouts_that_are_not_right_yet_are_refused_by_name",
        "assert 0 == 1",
    ),
}
TESTS = Path(__file__).parent


@pytest.mark.parametrize("guard", CONTROLS)
def test_without_the_guard_its_test_goes_red(guard: str) -> None:
    place, test, words = CONTROLS[guard]
    environment = {**os.environ, VARIABLE: place}
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(TESTS / test)],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout[-2000:]
    assert words in run.stdout, run.stdout[-2000:]
