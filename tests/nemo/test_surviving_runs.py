# SPDX-License-Identifier: Apache-2.0
"""The whole command, disturbed: real NeMo on two tensor-parallel ranks, which start one by one, as srun starts them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from nemo_tied_lora.checkpoint.training_checkpoint import read_description
from nemo_tied_lora.commands import main
from nemo_tied_lora.nemo.stop_callback import answer_alone
from nemo_tied_lora.resilience.dead_rank_watchdog import EXIT_CODE
from nemo_tied_lora.resilience.status_file import read_status
from tests.harness.command_runs import SHORT, TIMEOUT, tied_lora, user_environment
from tests.harness.forks import Forked, fork_module, free_port

STEPS = 30
TIMEOUT_S = 15
LONGER = [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=15", f"watchdog.timeout_s={TIMEOUT_S}"]


def arguments(name: str) -> list[str]:
    """Arguments of `finetune` in the folder `name`."""
    files = [
        f"model.data.{ds}.file_names=[{n}.jsonl]" for ds, n in (("train_ds", "train"), ("validation_ds", "validation"))
    ]
    place = [
        "model.restore_from_path=base.nemo",
        f"exp_manager.explicit_log_dir={name}",
        f"output={name}/adapter.nemo",
    ]
    rank = ["model.peft.tied_lora.rank=4", "model.optim.lr=1e-2", "layout=tp2"]
    return [*SHORT, *LONGER, *files, *place, *rank]


def start(folder: Path, name: str, *command: str) -> list[Forked]:
    """Starts one process per rank, as a plain srun does, with its log in `folder`. The default command is `finetune` in `name`.

    Only SLURM's variables say which rank a process is.
    """
    step = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_JOB_END_TIME": str(int(time.time()) + 36000)}
    sizes = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    variables = {
        **step,
        **sizes,
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_port()),
    }
    return [
        Forked(
            late_rank_0,
            command or ("finetune", *arguments(name)),
            cwd=folder,
            env=user_environment({**variables, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}),
            stdout=folder / f"{name}-{rank}.log",
        )
        for rank in range(2)
    ]


def late_rank_0(command: tuple[str, ...]) -> int:
    """The command, with a rank 0 that needs a second longer for the run's folder than the other ranks."""
    from nemo_tied_lora.nemo import training_runs

    exp_manager = training_runs.exp_manager

    def slow(*args: Any) -> Any:
        time.sleep(1.0 if os.environ["RANK"] == "0" else 0.0)
        return exp_manager(*args)

    training_runs.exp_manager = slow  # type: ignore[assignment]
    return fork_module(main.__name__, command)


def disturb(folder: Path, name: str, action: Callable[[list[Forked]], None]) -> list[int]:
    """Starts a new run, waits for its first steps, disturbs it, and returns the exit codes."""
    assert read_status(folder / name) is None, f"another test's run is in {folder / name}"
    ranks = start(folder, name)
    try:
        deadline = time.monotonic() + TIMEOUT
        while (read_status(folder / name) or {}).get("step", 0) < 1:
            assert time.monotonic() < deadline
            assert all(rank.poll() is None for rank in ranks), logs(folder, name)
            time.sleep(0.05)
        action(ranks)
        return [rank.wait(TIMEOUT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def logs(folder: Path, name: str) -> list[str]:
    return [(folder / f"{name}-{rank}.log").read_text()[-6000:] for rank in range(2)]


def metrics(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "metrics.json").read_text())
    return found


def without_seconds(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in step.items() if key != "seconds"} for step in steps]


def final(folder: Path, name: str) -> Path:
    [last] = (folder / name / "checkpoints").glob("*-last")
    assert read_description(last)["step"] == STEPS
    return last


@pytest.fixture(scope="module")
def undisturbed(workshop: Path) -> str:
    """The output of an undisturbed run."""
    return tied_lora("finetune", *arguments("undisturbed"), folder=workshop).stdout


def test_a_run_shows_what_it_checked_and_that_it_finished(workshop: Path, undisturbed: str) -> None:
    assert "pre-flight: the same software and configuration on all 2 ranks" in undisturbed
    assert "pre-flight: all-reduce, tensor parallel: 1 group of 2," in undisturbed
    status = read_status(workshop / "undisturbed") or {}
    assert (status["state"], status["step"], status["max_steps"]) == ("finished", STEPS, STEPS)
    assert status["output"].endswith("adapter.nemo")
    assert {"loss", "tokens_per_second", "last_checkpoint", "saved_step"} <= status.keys()


def test_lightning_leaves_signals_to_our_handlers() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    answer_alone(trainer)
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        trainer._signal_connector.register_signal_handlers()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (received, trainer.received_sigterm) == ([signal.SIGTERM], False)
    finally:
        trainer._signal_connector.teardown()
        signal.signal(signal.SIGTERM, before)


def test_a_signal_to_one_rank_stops_all_ranks_at_one_step_and_the_run_resumes_unchanged(
    workshop: Path, undisturbed: str
) -> None:
    codes = disturb(workshop, "stopped", lambda ranks: ranks[1].send_signal(signal.SIGTERM))
    assert codes == [75, 75], logs(workshop, "stopped")
    status = read_status(workshop / "stopped") or {}
    assert status["state"] == "preempted"
    assert 0 < status["saved_step"] < STEPS
    assert f"saved after step {status['saved_step']} of {STEPS}" in logs(workshop, "stopped")[0]
    assert not (workshop / "stopped" / "adapter.nemo").exists()
    [last] = (workshop / "stopped" / "checkpoints").glob("*-last")
    assert read_description(last)["step"] == status["saved_step"]

    again = [rank.wait(TIMEOUT) for rank in start(workshop, "stopped")]
    assert again == [0, 0], logs(workshop, "stopped")
    want, got = metrics(workshop, "undisturbed"), metrics(workshop, "stopped")
    assert [step["step"] for step in got["steps"]] == list(range(1, STEPS + 1))
    assert without_seconds(got["steps"]) == without_seconds(want["steps"])
    assert got["validations"] == want["validations"]
    for file in ("linear_qkv", "linear_fc2", "random_states"):  # the adapter, Adam's moments, each rank's generators
        ours, theirs = (final(workshop, name) / f"{file}.safetensors" for name in ("stopped", "undisturbed"))
        assert ours.read_bytes() == theirs.read_bytes(), file
    assert (read_status(workshop / "stopped") or {})["restarts"] == 1
    files = {path.name for path in (workshop / "stopped").iterdir()}
    assert {f"nemo_log_globalrank-{rank}_localrank-{rank}.txt" for rank in range(2)} <= files, files

    third = tied_lora("finetune", *arguments("stopped"), folder=workshop)
    assert "finished already" in third.stdout
    assert metrics(workshop, "stopped") == got


def test_if_a_rank_is_killed_the_other_ends_in_time_and_names_it(workshop: Path) -> None:
    killed: list[float] = []

    def kill(ranks: list[Forked]) -> None:
        ranks[1].kill()
        killed.append(time.monotonic())

    codes = disturb(workshop, "rank-killed", kill)
    assert codes == [EXIT_CODE, -signal.SIGKILL], logs(workshop, "rank-killed")
    assert time.monotonic() - killed[0] < 4 * TIMEOUT_S
    assert "the run ends: rank 1 (node" in logs(workshop, "rank-killed")[0]
    status = read_status(workshop / "rank-killed") or {}
    assert status["state"] == "failed"
    assert "no sign of life for 15 s" in status["reason"]


def test_generate_runs_on_ranks_that_srun_started(workshop: Path) -> None:
    """Without torchrun, rank 0's store is at MASTER_PORT, the port that Lightning would use too."""
    prompts = ["prompts=['1:','2:']", "tokens_to_generate=3", "trainer.precision=32", "output=answers.jsonl"]
    ranks = start(workshop, "generate", "generate", "base=base.nemo", "layout=tp2", *prompts)
    try:
        assert [rank.wait(TIMEOUT) for rank in ranks] == [0, 0], logs(workshop, "generate")
    finally:
        for rank in ranks:
            rank.kill()
    assert len((workshop / "answers.jsonl").read_text().splitlines()) == 2
