# SPDX-License-Identifier: Apache-2.0
"""What SLURM says of the ranks and of the time that is left, against the layout. Pure Python."""

from __future__ import annotations

import pytest

from nemo_tied_lora.planning import layout_fits_cluster
from nemo_tied_lora.planning.parallel_layout import Layout

STEP = {
    "RANK": "0",
    "WORLD_SIZE": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


@pytest.mark.parametrize(
    ("step", "layout", "text"),
    [
        ({}, {"num_nodes": 2, "devices": 8}, []),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, {"num_nodes": 2, "devices": 8}, []),
        ({}, {"num_nodes": 1, "devices": 16}, ["trainer.num_nodes=1: SLURM runs this on 2 nodes; set it to 2"]),
        (
            {},
            {"num_nodes": 2, "devices": 4},
            [
                "trainer.num_nodes=2 x trainer.devices=4 = 8, but the launcher started 16 ranks on 2 nodes; set "
                "trainer.num_nodes=2 trainer.devices=8, or start 8"
            ],
        ),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "9,7"},
            {"num_nodes": 2, "devices": 8},
            ["SLURM_STEP_TASKS_PER_NODE=[9, 7]: nodes hold different numbers of ranks; --ntasks-per-node=8"],
        ),
        ({"SLURM_GPUS_ON_NODE": "4"}, {"num_nodes": 2, "devices": 8}, ["SLURM gave this node 4 GPUs"]),
    ],
)
def test_ranks_that_slurm_did_not_start_are_named(
    step: dict[str, str], layout: dict[str, int], text: list[str]
) -> None:
    problems = list(layout_fits_cluster.launcher_problems(Layout(**layout), {**STEP, **step}))
    assert len(problems) == len(text), problems
    assert all(part in problem for part, problem in zip(text, problems, strict=True))


def test_slurms_step_is_ignored_outside_a_rank() -> None:
    environment = {name: value for name, value in STEP.items() if name != "RANK"}
    assert not list(layout_fits_cluster.launcher_problems(Layout(), environment))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20", 20),
        ("1:20", 80),
        ("2:00:03", 7203),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_slurms_times_are_parsed(text: str, seconds: float | None) -> None:
    assert layout_fits_cluster._seconds(text) == seconds
