# SPDX-License-Identifier: Apache-2.0
"""The whole command on the private SLURM: undisturbed runs, from `tied-lora launch` to the report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from nemo_tied_lora.launching.submit import SCRIPT
from tests.harness.command_runs import console_script
from tests.slurm.private_cluster import PrivateCluster
from tests.slurm.real_runs import STEPS, Run

POINTS = ["0_rank-2", "1_rank-4"]


@pytest.fixture(scope="module")
def sweep(submitted: dict[str, Run]) -> Run:
    """The array, after its end."""
    run = submitted["sweep"]
    for number in range(len(POINTS)):
        end = run.slurm.wait_for_state(f"{run.job}_{number}", seconds=600)
        assert end["JobState"] == "COMPLETED", run.script_log(f"{run.job}_{number}")
    return run


def test_a_run_on_two_nodes_matches_the_single_process_run(undisturbed: Run, sweep: Run) -> None:
    """Pipeline stages on two nodes. Compares each loss, gradient norm and tensor, up to the rounding of sums in float32."""
    single = Run(sweep.slurm, sweep.folder / POINTS[1], sweep.job)
    assert [step["step"] for step in undisturbed.curves] == list(range(1, STEPS + 1))
    for got, want in zip(undisturbed.curves, single.curves, strict=True):
        assert (got["lr"], got["tokens"]) == (want["lr"], want["tokens"])
        assert math.isclose(got["loss"], want["loss"], rel_tol=1e-5)
        assert math.isclose(got["grad_norm"], want["grad_norm"], rel_tol=1e-4)
    assert undisturbed.adapter.keys() == single.adapter.keys()
    for name, tensor in single.adapter.items():
        # float32; Adam divides by small second moments, so reordered sums show in the last digits (3e-7 here).
        assert torch.allclose(undisturbed.adapter[name], tensor, rtol=1e-3, atol=1e-5), name
    assert any(not torch.equal(undisturbed.adapter[name], tensor) for name, tensor in single.adapter.items())


def test_the_ranks_check_the_allocation_before_they_load_the_model(undisturbed: Run) -> None:
    log = undisturbed.log()
    assert "0: pre-flight: the same software and configuration on all 2 ranks" in log
    assert "0: pre-flight: all-reduce, pipeline parallel: 1 group of 2," in log
    assert "pre-flight" not in undisturbed.log(node=1)


def test_the_runs_folder_keeps_the_script_the_configuration_and_the_versions(undisturbed: Run) -> None:
    logs = undisturbed.folder / "logs" / f"{undisturbed.job}-0"
    for name, copy in ((SCRIPT, "job.sbatch"), ("config.yaml", "config.yaml"), ("versions.json", "versions.json")):
        assert (undisturbed.folder / name).is_file(), name
        assert (logs / copy).is_file(), copy
    assert (undisturbed.folder / SCRIPT).read_text() == (logs / "job.sbatch").read_text()
    versions = json.loads((logs / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__
    assert versions["git_commit"]


def test_a_finished_run_does_not_train_again_when_its_job_is_requeued(undisturbed: Run) -> None:
    before = undisturbed.metrics
    undisturbed.slurm.run("scontrol", "requeue", undisturbed.job)
    undisturbed.slurm.wait_until(lambda: "nothing is left to do" in undisturbed.script_log(), 120, "the second start")
    assert undisturbed.finish()["Restarts"] == "1"
    assert undisturbed.log(1) == ""
    assert undisturbed.metrics == before


def test_a_sweep_is_one_array_and_the_report_shows_its_runs_in_a_table_and_a_picture(
    slurm: PrivateCluster, sweep: Run
) -> None:
    printed = console_script("report", f"folder={sweep.folder}", folder=sweep.folder).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert rows[0][:3] == ["run", "rank", "trained"]
    assert [row[0] for row in rows[2:]] == POINTS
    assert [row[-1] for row in rows[2:]] == ["finished"] * len(POINTS)
    for name, row in zip(POINTS, rows[2:], strict=True):
        metrics = Run(slurm, sweep.folder / name, sweep.job).metrics
        assert row[2] == f"{metrics['trained_parameters']:,}"
        assert row[rows[0].index("validation loss")] == f"{metrics['validations'][-1]['validation_loss']:.4f}"
    assert len({row[2] for row in rows[2:]}) == len(POINTS)
    assert (sweep.folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in Path(sweep.folder).glob("report.*")) == [
        "report.json",
        "report.md",
        "report.png",
    ]


def test_at_once_limits_how_many_runs_of_a_sweep_run_at_the_same_time(slurm: PrivateCluster, sweep: Run) -> None:
    times = [slurm.fields(f"{sweep.job}_{number}") for number in range(len(POINTS))]
    starts, ends = ([task[key] for task in times] for key in ("StartTime", "EndTime"))
    assert all(end <= start for end, start in zip(ends[:-1], starts[1:], strict=True)), times
