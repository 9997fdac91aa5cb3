# SPDX-License-Identifier: Apache-2.0
"""The whole command: a killed run resumes bit for bit, on real ranks, with real SIGKILLs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from tests.harness.command_runs import TIMEOUT, finetune_arguments, tied_lora, user_environment
from tests.harness.forks import fork_module, fork_on_ranks, run_forked
from tests.nemo import checkpoint_scenarios, spread_scenarios

# 10 steps of 16 samples from 64, which are three passes, each with another shuffle.
RUN = [
    "trainer.max_steps=10",
    "model.global_batch_size=16",
    "model.micro_batch_size=8",
    "model.data.validation_ds.metric.name=loss",
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
    "model.optim.lr_multipliers={A: 0.5, B: 2, u: 1, v: 4}",
]
# Two ranks with different masks.
DROPOUT = ["layout=tp2", "model.peft.tied_lora.dropout=0.1", "model.hidden_dropout=0.1", "model.attention_dropout=0.1"]

# Kills rank 0, like a power cut: after the checkpoint of that step has its name, and before NeMo removes the previous one;
# or between two files of a checkpoint.
_PLANT = """
import os, signal
kind, _, step = os.environ.get("KILL", "").partition(":")
rename, fsync, seen = os.rename, os.fsync, []

def named(path):
    return f"-step={step}-" in str(path) and "-last" in str(path)

def killing_rename(source, target, **more):
    rename(source, target, **more)
    if kind == "after" and named(target):
        os.kill(os.getpid(), signal.SIGKILL)

def killing_fsync(handle):
    fsync(handle)
    path = os.readlink(f"/proc/self/fd/{handle}")
    seen.extend([path] if ".safetensors" in path and named(path) else [])
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

if kind:
    os.rename = killing_rename
if kind == "during":
    os.fsync = killing_fsync
"""


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "sitecustomize.py").write_text(_PLANT)
    return str(folder)


def run(workshop: Path, name: str, *arguments: str, plant: str | None = None, kill: str = "") -> Any:
    """Runs the command. With `kill`, checks that it was killed."""
    planted = {"PYTHONPATH": plant, "KILL": kill} if plant else {}
    done = tied_lora(
        "finetune", *finetune_arguments(name), *RUN, *arguments, folder=workshop, ok=not kill, planted=planted
    )
    assert (done.returncode != 0) == bool(kill), done.stderr[-4000:]
    return done


def record(workshop: Path, name: str) -> dict[str, Any]:
    return json.loads((workshop / name / "metrics.json").read_text())


def checkpoint(workshop: Path, name: str, step: int, last: bool = True) -> Path:
    pattern = f"*-step={step}-*" + ("-last" if last else "")
    found = [p for p in (workshop / name / "checkpoints").glob(pattern) if last or not p.name.endswith("-last")]
    assert len(found) == 1, [p.name for p in (workshop / name / "checkpoints").iterdir()]
    return found[0]


def curves(metrics: dict[str, Any]) -> list[dict[str, float]]:
    """The metrics that must not depend on how often a run was stopped."""
    return [{k: v for k, v in step.items() if k != "seconds"} for step in metrics["steps"]]


def without_times_and_places(description: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's JSON without seconds and without paths, which contain the run's folder."""
    text = json.dumps(description)
    found = json.loads(text)
    recorder = next(state for key, state in found["lightning"]["callbacks"].items() if "RunRecorder" in key)
    recorder.pop("wall_seconds")
    for step in recorder["steps"]:
        step.pop("seconds")
    found["lightning"]["callbacks"] = {
        key: state for key, state in found["lightning"]["callbacks"].items() if "ModelCheckpoint" not in key
    }
    found.pop("files")
    found["facts"].pop("training")
    # Lightning counts the starts of training; nothing reads the count.
    found["lightning"]["loops"]["fit_loop"].pop("epoch_progress")
    return found


def test_a_run_killed_after_a_save_and_during_one_resumes_bit_for_bit(workshop: Path, plant: str) -> None:
    run(workshop, "straight", *DROPOUT)
    run(workshop, "killed", *DROPOUT, plant=plant, kill="after:6")
    left = [p.name.split("-step=")[1][0] for p in (workshop / "killed" / "checkpoints").glob("*-last")]
    assert sorted(left) == ["4", "6"]
    run(workshop, "killed", *DROPOUT, plant=plant, kill="during:8")
    hidden = [p.name for p in (workshop / "killed" / "checkpoints").glob(".*.partial")]
    assert len(hidden) == 1, hidden
    assert "-step=8-" in hidden[0]
    run(workshop, "killed", *DROPOUT)

    want, got = read_adapter(workshop / "straight/adapter.nemo"), read_adapter(workshop / "killed/adapter.nemo")
    assert all(torch.equal(got.state[name], tensor) for name, tensor in want.state.items())
    assert curves(record(workshop, "killed")) == curves(record(workshop, "straight"))
    assert record(workshop, "killed")["validations"] == record(workshop, "straight")["validations"]
    ours, theirs = (checkpoint(workshop, name, 10) for name in ("killed", "straight"))
    files = sorted(file.name for file in theirs.glob("*.safetensors"))
    assert "random_states.safetensors" in files
    for file in files:
        wanted, found = load_file(theirs / file), load_file(ours / file)
        assert wanted.keys() == found.keys()
        assert [key for key, tensor in wanted.items() if not torch.equal(tensor, found[key])] == [], file
    read = [json.loads((folder / "checkpoint.json").read_text()) for folder in (ours, theirs)]
    assert without_times_and_places(read[0]) == without_times_and_places(read[1])
    assert len(list((workshop / "killed" / "checkpoints").glob("*-last"))) == 1
    assert not list((workshop / "killed" / "checkpoints").glob(".*"))
    assert not list((workshop / "killed" / "checkpoints").glob("*-unfinished"))

    _check_convert_checkpoint(workshop)
    size = sum(file.stat().st_size for file in theirs.iterdir())
    trained = record(workshop, "straight")["trained_parameters"]
    # Adapter and two moments, 4 bytes each, and fixed costs (random states, JSON); the base alone has 6 times as much.
    assert size < 3 * 4 * trained + 100_000
    assert {"seconds", "bytes"} <= record(workshop, "straight")["checkpoints"][-1].keys()


def _check_convert_checkpoint(workshop: Path) -> None:
    """The converted checkpoint is the adapter that the run saved."""
    done = tied_lora("convert-checkpoint", "checkpoint=straight", "output=converted.nemo", folder=workshop)
    assert "checked:" in done.stdout
    want, got = read_adapter(workshop / "straight/adapter.nemo"), read_adapter(workshop / "converted.nemo")
    assert (got.config, got.shapes) == (want.config, want.shapes)
    assert all(torch.equal(got.state[name], tensor) for name, tensor in want.state.items())
    assert got.yaml["base"] == want.yaml["base"]
    base = tied_lora("convert-checkpoint", "checkpoint=base.nemo", "output=x.nemo", folder=workshop, ok=False)
    assert base.returncode == 2
    assert "is a checkpoint of tied-lora finetune" in base.stderr


def test_a_run_resumes_on_other_layouts_to_the_rounding_of_sums(workshop: Path, plant: str) -> None:
    run(workshop, "one_layout")
    # From tensor parallel to pipeline parallel to one rank. A start takes longer than all its steps.
    for layout, kill in (("tp2", "after:4"), ("pp2", "after:6"), ("single", "")):
        run(workshop, "layouts", f"layout={layout}", plant=plant, kill=kill)
    wanted, found = record(workshop, "one_layout"), record(workshop, "layouts")
    assert [step["step"] for step in found["steps"]] == list(range(1, 11))
    for want, got in zip(wanted["steps"], found["steps"], strict=True):
        assert got["tokens"] == want["tokens"]
        assert math.isclose(got["loss"], want["loss"], rel_tol=1e-4)
        assert math.isclose(got["grad_norm"], want["grad_norm"], rel_tol=2e-3)
        rates = [{name: rate for name, rate in step.items() if name.startswith("lr")} for step in (got, want)]
        assert rates[0] == rates[1]
        assert len(rates[0]) == 5
    state = read_adapter(workshop / "layouts/adapter.nemo").state
    for name, tensor in read_adapter(workshop / "one_layout/adapter.nemo").state.items():
        # float32; Adam divides by small second moments, so reordered sums show in the last digits.
        assert torch.allclose(state[name], tensor, rtol=5e-3, atol=5e-5), name
    log = "".join(path.read_text() for path in (workshop / "layouts").rglob("nemo_log_globalrank-0*.txt"))
    assert "random states do not fit another layout" in log


def failed_claims(folder: Path, fork: Callable[..., int], *arguments: Any) -> list[str]:
    """Runs a module of scenarios in the folder. Returns one line per claim that does not hold."""
    done = run_forked(fork, *arguments, cwd=folder, env=user_environment(), timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-8000:]
    results = json.loads(done.stdout.splitlines()[-1])
    return [
        f"{name}: {claim}: {result}"
        for name, claims in results.items()
        for claim, result in claims.items()
        if result is not True
    ]


@pytest.fixture(scope="module")
def failed_on_one_rank(workshop: Path) -> list[str]:
    return failed_claims(workshop, fork_module, checkpoint_scenarios.__name__, [str(workshop)])


def test_nemos_options_keep_their_meaning_and_every_optimizer_resumes(failed_on_one_rank: list[str]) -> None:
    assert failed_on_one_rank == [], "\n".join(failed_on_one_rank)


def test_an_optimizers_state_resumes_spread_over_data_parallel_ranks(
    workshop: Path, failed_on_one_rank: list[str]
) -> None:
    assert failed_claims(workshop, fork_on_ranks, spread_scenarios.__name__, [str(workshop)], 2) == []
