# SPDX-License-Identifier: Apache-2.0
"""Negative controls: switches each guard off, and runs the test that must then fail.

Controls that need several ranks are in other files: tests/adapter/test_flag_controls.py for the parameters' flags,
tests/resilience/test_ranks_in_trouble.py for ranks in trouble, tests/nemo/test_guarded_training.py for NeMo's loop.
"""

from __future__ import annotations

import json

import pytest

from tests.harness.command_runs import user_environment
from tests.harness.forks import run_forked
from tests.harness.paths import ROOT
from tests.harness.switched_off import run_tests

# Guard: (its function, its test, words of the failure, which show that the test fails because the guard is off).
CONTROLS = {
    "tie guard": (
        "nemo_tied_lora.adapter.replica_check:check_ties",
        "adapter/test_replica_check.py::test_a_chunk_that_differs_inside_one_process_is_named",
        "DID NOT RAISE",
    ),
    "tie guard before a save": (
        "nemo_tied_lora.adapter.replica_check:check_ties",
        "adapter/test_replica_check.py::test_nothing_is_saved_over_a_good_file",
        "assert",
    ),
    "check of gradients": (
        "nemo_tied_lora.adapter.nonfinite_grads:find_nonfinite",
        "nemo/test_guarded_training.py::test_the_tensor_nearest_to_the_cause_is_named",
        "assert",
    ),
    "order of the reported gradients": (
        "nemo_tied_lora.adapter.nonfinite_grads:_layer",
        "nemo/test_guarded_training.py::test_the_tensor_nearest_to_the_cause_is_named",
        "layers.10.linear_qkv.u",
    ),
    "check of a loaded state": (
        "nemo_tied_lora.adapter.full_state:check_state",
        "adapter/test_full_state.py::test_a_bad_state_is_refused_with_every_reason_and_nothing_is_changed[NaN]",
        "DID NOT RAISE",
    ),
    "check of the base's architecture": (
        "nemo_tied_lora.checkpoint.base_identity:check_architecture",
        "checkpoint/test_base_identity.py::test_another_architecture_is_refused_with_each_difference",
        "BaseMismatchError",
    ),
    "check of the base's fingerprint": (
        "nemo_tied_lora.checkpoint.base_identity:check_weights",
        "checkpoint/test_base_identity.py::test_other_weights_are_refused_by_name_and_can_be_allowed",
        "DID NOT RAISE",
    ),
    "loops that are wrong in NeMo": (
        "nemo_tied_lora.planning.settings.training_loop_checks:loop_problems()",
        "nemo/test_nemo_loops.py::test_what_nemo_cannot_do_is_refused_by_name",
        "DID NOT RAISE",
    ),
    "loops that are wrong in NeMo, in the pre-flight": (
        "nemo_tied_lora.planning.settings.training_loop_checks:loop_problems()",
        "planning/test_layout_fits_cluster.py::test_what_cannot_be_trained_through_nemo_is_refused[distributed_fused_adam]",
        "DID NOT RAISE",
    ),
    "interleaved pipelines and mixtures of experts in NeMo": (
        "nemo_tied_lora.planning.preflight:_layout_problems()",
        "planning/test_layout_fits_cluster.py::test_what_cannot_be_trained_through_nemo_is_refused",
        "DID NOT RAISE",
    ),
    "a user's loop with Megatron's DDP": (
        "nemo_tied_lora.planning.settings.training_loop_checks:check_ddp",
        "nemo/test_nemo_loops.py::test_your_own_loop_is_refused_before_it_wraps_the_model",
        "DID NOT RAISE",
    ),
    "layouts of experts": (
        "nemo_tied_lora.adapter.experts:refused_layouts()",
        "adapter/test_experts.py::test_layouts_that_are_not_right_yet_are_refused_by_name",
        "assert 0 == 1",
    ),
    "pipeline, with other problems": (
        "nemo_tied_lora.planning.parallel_layout:_pipeline_problems()",
        "planning/test_parallel_layout.py::test_every_problem_of_a_layout_is_reported",
        "model.pipeline_model_parallel_size",
    ),
    "the adapter's rank and layers, with other problems": (
        "nemo_tied_lora.planning.parallel_layout:_adapter_problems()",
        "planning/test_parallel_layout.py::test_every_problem_of_a_layout_is_reported",
        "layers",
    ),
    "lengths and batch sizes of the data": (
        "nemo_tied_lora.planning.data.data_checks:batch_problems()",
        "planning/test_layout_fits_cluster.py::test_data_that_does_not_fit_the_layout_or_the_base_is_refused",
        "DID NOT RAISE",
    ),
    "SLURM's tasks and nodes": (
        "nemo_tied_lora.planning.layout_fits_cluster:launcher_problems()",
        "planning/test_ranks_under_slurm.py::test_ranks_that_slurm_did_not_start_are_named",
        "assert 0 == 1",
    ),
    "settings of the guards": (
        "nemo_tied_lora.planning.settings.run_settings:GuardSettings.__post_init__",
        "nemo/test_guarded_training.py::test_wrong_settings_are_refused_together",
        "DID NOT RAISE",
    ),
}
# Checks of a layout: the checked value to the function that checks it.
LAYOUT_CHECKS = {
    "world size": "world",
    "data parallel size": "world",
    "layers over stages": "pipeline",
    "layers over chunks": "pipeline",
    "chunks without stages": "pipeline",
    "heads": "tensor_parallel",
    "mlp": "tensor_parallel",
    "vocabulary": "tensor_parallel",
    "sequence over tensor parallel": "sequence",
    "sequence over tensor and context parallel": "sequence",
    "sequence over context parallel": "sequence",
    "batch": "batch",
    "microbatches of an interleaved schedule": "batch",
}
CONTROLS |= {
    f"layout: {value}": (
        f"nemo_tied_lora.planning.parallel_layout:_{check}_problems()",
        f"planning/test_parallel_layout.py::test_a_wrong_layout_is_refused_with_value_and_remedy[{value}]",
        "assert []",
    )
    for value, check in LAYOUT_CHECKS.items()
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """The exit code and the failure of each control's test. One process runs all tests."""
    folder = tmp_path_factory.mktemp("switched_off")
    rows, results = [control[:2] for control in CONTROLS.values()], folder / "results.json"
    done = run_forked(run_tests, rows, str(results), cwd=ROOT, env=user_environment(), timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CONTROLS, json.loads(results.read_text()), strict=True))


@pytest.mark.parametrize("guard", CONTROLS)
def test_without_the_guard_its_test_fails(outcomes: dict[str, tuple[int, str]], guard: str) -> None:
    code, failure = outcomes[guard]
    assert code == pytest.ExitCode.TESTS_FAILED, failure
    assert CONTROLS[guard][2] in failure, failure


def test_every_check_of_a_layout_has_its_control() -> None:
    from tests.planning import test_parallel_layout

    (cases,) = test_parallel_layout.test_a_wrong_layout_is_refused_with_value_and_remedy.pytestmark
    assert cases.kwargs["ids"] == list(LAYOUT_CHECKS)
