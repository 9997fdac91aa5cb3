# SPDX-License-Identifier: Apache-2.0
"""Short fine-tuning runs in one process that check NeMo's checkpoint options. `main` prints a JSON object last.

That dropout masks after a resume are those of the uninterrupted run is checked by test_resume.py, on two ranks.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from tests.nemo.checkpoint_runs import (
    BUDGET,
    PARAMS,
    SHARDED,
    At,
    adapter_in,
    checkpoint,
    nemo,
    refusal,
    run,
    same,
    state,
    stopped,
    tensors_in,
)

__all__ = ["SCENARIOS", "main"]


class Preempted(Callback):
    """Adds NeMo's preemption callback, as exp_manager does on a machine with a GPU."""

    def on_fit_start(self, trainer: Any, *_: Any) -> None:
        from nemo.utils.callbacks.preemption import PreemptionCallback

        trainer.callbacks.append(PreemptionCallback(trainer.checkpoint_callback))


@functools.cache
def straight(steps: int = 4) -> dict[str, Any]:
    """The uninterrupted run without any option, in the folder straight_STEPS. Scenarios share it."""
    return run(f"straight_{steps}", f"trainer.max_steps={steps}")


def at_the_end() -> dict[str, bool]:
    """save_nemo_on_train_end: writes the last adapter's .nemo into the checkpoints' folder."""
    run("at_the_end", f"{PARAMS}.save_nemo_on_train_end=true")
    return {"the last": same(state(nemo("at_the_end")), state(Path("at_the_end/adapter.nemo")))}


def never() -> dict[str, bool]:
    """No option: there is no .nemo in the checkpoints' folder, and a run without resume_if_exists starts again.

    Its rank budget leaves open when to prune: the first run's length decides that, and the longer run keeps it.
    """
    budget = [f"{BUDGET}.target_rank=2.5", f"{BUDGET}.every=1"]
    first = run("never", *budget)
    second = run("never", *budget, "exp_manager.resume_if_exists=false")
    again = run("never", *budget, "trainer.max_steps=6")
    losses = [step["loss"] for step in first["steps"]]
    return {
        "no .nemo": not list(Path("never/checkpoints").glob("*.nemo")),
        "starts again": [step["loss"] for step in second["steps"]] == losses and second["steps"][0]["step"] == 1,
        "resumed": [step["step"] for step in again["steps"]] == [1, 2, 3, 4, 5, 6],
        **_budgets(first, again),
        "the rate of a longer run": again["steps"][4]["lr"] == pytest.approx(3.4549e-3, rel=1e-3),
    }


def _budgets(first: dict[str, Any], again: dict[str, Any]) -> dict[str, bool]:
    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter

    found, kept = (each["rank_budget"] for each in (first, again))
    stored = read_adapter(Path("never/adapter.nemo"))
    return {
        "decided by the first run": kept["schedule"] == found["schedule"] and kept["schedule"]["final"] == 3,
        "the target": (kept["mean_rank"], kept["steps_observed"], found["steps_observed"]) == (2.5, 6, 4),
        "fixed since step 3": kept["ranks"] == found["ranks"] == stored.ranks(),
        "in TensorBoard": _logged(Path("never"))
        == {"rank/mean": 2.5} | {f"rank/{n}": r for n, r in found["ranks"].items()},
    }


def _logged(folder: Path) -> dict[str, float]:
    """The last value of each rank in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, float] = {}
    for file in sorted(folder.rglob("events.out.tfevents*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file)).Reload()
        names = [name for name in events.Tags()["scalars"] if name.startswith("rank/")]
        found |= {name: events.Scalars(name)[-1].value for name in names}
    return found


def always() -> dict[str, bool]:
    """always_save_nemo: writes the .nemo with every checkpoint."""
    early = At(3, lambda _: state(nemo("always")))
    run("always", f"{PARAMS}.always_save_nemo=true", callbacks=(early,))
    return {
        "with the first": same(early.result, adapter_in(checkpoint("always", 2))),
        "with the last": same(state(nemo("always")), adapter_in(checkpoint("always", 4))),
        "they differ": not same(early.result, state(nemo("always"))),
    }


FIRST_IS_BEST = (f"{PARAMS}.monitor=global_step", f"{PARAMS}.mode=min")


def best() -> dict[str, bool]:
    """save_best_model with save_nemo_on_train_end: writes the best checkpoint's adapter; the monitor makes it the first."""
    result = run("best", f"{PARAMS}.save_nemo_on_train_end=true", f"{PARAMS}.save_best_model=true", *FIRST_IS_BEST)
    first = adapter_in(checkpoint("best", 2))
    return {
        "the best": same(state(nemo("best")), first),
        "output": same(state(Path("best/adapter.nemo")), first),
        "not the last": not same(first, adapter_in(checkpoint("best", 4))),
        "whole record": [step["step"] for step in result["steps"]] == [1, 2, 3, 4],
    }


def always_best() -> dict[str, bool]:
    """always_save_nemo with save_best_model: writes the best adapter so far, and the run itself is unchanged."""
    early = At(6, lambda _: state(nemo("always_best")))
    best_so_far = [f"{PARAMS}.always_save_nemo=true", f"{PARAMS}.save_best_model=true", *FIRST_IS_BEST]
    run("always_best", "trainer.max_steps=6", *best_so_far, callbacks=(early,))
    straight(6)
    first = adapter_in(checkpoint("always_best", 2))
    return {
        "the best so far": same(early.result, first),
        "the best": same(state(nemo("always_best")), first),
        "not the last": not same(first, adapter_in(checkpoint("always_best", 6))),
        "the run": same(*(adapter_in(checkpoint(name, 6)) for name in ("always_best", "straight_6"))),
    }


def preempted() -> dict[str, bool]:
    """The preemption callback: SIGTERM ends the run after the step with a "-last" checkpoint. The run resumes from it."""
    want = straight(6)
    signalled = At(3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    code = None
    try:
        run("preempted", "trainer.max_steps=6", callbacks=(Preempted(), signalled))
    except SystemExit as exit_:
        code = exit_.code
    left = [p.name for p in Path("preempted/checkpoints").glob("*-last")]
    got = run("preempted", "trainer.max_steps=6")
    return {
        "exit code": code == 0,
        "after the step": len(left) == 1 and "-step=3-" in left[0],
        "resumes": [s["loss"] for s in got["steps"]] == [s["loss"] for s in want["steps"]],
        "same validations": got["validations"] == want["validations"],
        "same adapter": same(state(Path("preempted/adapter.nemo")), state(Path("straight_6/adapter.nemo"))),
    }


def resumed_and_tested() -> dict[str, bool]:
    """A resumed run with a test set saves the trained adapter, not the one that it resumed from."""
    tested = ["model.data.test_ds.file_names=[validation.jsonl]", "model.data.test_ds.metric.name=loss"]
    straight()
    stopped("tested")
    run("tested", *tested)
    return {"trained": same(state(Path("tested/adapter.nemo")), state(Path("straight_4/adapter.nemo")))}


def rates_of(step: dict[str, Any]) -> dict[str, float]:
    return {name: rate for name, rate in step.items() if name.startswith("lr")}


def resumes(name: str, *arguments: str, copy: str | None = None) -> dict[str, bool]:
    """Compares a stopped and resumed run with an uninterrupted one: the last checkpoint's contents, and the metrics.

    Args:
        copy: a folder that gets a copy of the stopped run's folder.
    """
    want = run(f"{name}_straight", *arguments)
    stopped(name, *arguments)
    if copy is not None:
        shutil.copytree(name, copy)
    got = run(name, *arguments)
    ours, theirs = (checkpoint(n, 4) for n in (name, f"{name}_straight"))
    kinds = sorted({key.split("/")[0] for key in tensors_in(theirs)})
    return {
        "losses": [s["loss"] for s in got["steps"]] == [s["loss"] for s in want["steps"]],
        "rates": [rates_of(step) for step in got["steps"]] == [rates_of(step) for step in want["steps"]],
        "a rate for each factor": [len(rates_of(step)) for step in got["steps"]] == [5] * 4,
        "steps": [s["step"] for s in got["steps"]] == [1, 2, 3, 4],
        "output": same(state(Path(name, "adapter.nemo")), state(Path(f"{name}_straight", "adapter.nemo"))),
        **{kind: same(tensors_in(ours, f"{kind}/"), tensors_in(theirs, f"{kind}/")) for kind in kinds},
        "moments": {"exp_avg", "exp_avg_sq"} <= set(kinds),
    }


def plain_torch() -> dict[str, bool]:
    """torch's own Adam, which counts steps per parameter, as NeMo's does with apex."""
    from nemo.core.optim import optimizers

    ours = optimizers.AVAILABLE_OPTIMIZERS["adamw"]
    optimizers.AVAILABLE_OPTIMIZERS["adamw"] = torch.optim.AdamW
    try:
        return resumes("plain_torch", "model.optim.name=adamw")
    finally:
        optimizers.AVAILABLE_OPTIMIZERS["adamw"] = ours


def o2() -> dict[str, bool]:
    """bfloat16 with float32 main parameters."""
    result = resumes("o2", "trainer.precision=bf16", "model.megatron_amp_O2=true")
    return {**result, "masters": "master" in result}


def distributed_optimizer() -> dict[str, bool]:
    """megatron-core's distributed optimizer; `spread_scenarios` resumes from the copy."""
    return resumes("distributed", *SHARDED, copy="spread")


def pruned() -> dict[str, bool]:
    """save_top_k: a run killed between a checkpoint and its "-last" keeps as many checkpoints as an uninterrupted run."""
    two = ["trainer.max_steps=8", f"{PARAMS}.save_top_k=2"]
    run("pruned_straight", *two)
    aside = Path("aside")
    stopped("pruned", *two, step=5)
    [last] = Path("pruned/checkpoints").glob("*-last")
    shutil.copytree(last, aside)
    stopped("pruned", *two, step=7)
    [later] = Path("pruned/checkpoints").glob("*-last")
    shutil.rmtree(later)
    aside.rename(last)
    run("pruned", *two)
    left, wanted = (sorted(p.name for p in Path(n, "checkpoints").iterdir()) for n in ("pruned", "pruned_straight"))
    return {"the same": left == wanted, "two and the last": len([name for name in left if "-step=" in name]) == 3}


def full_disk() -> dict[str, bool]:
    """A failed save ends the run with the reason. Earlier checkpoints are unchanged, and the run resumes from them."""
    from nemo_tied_lora.checkpoint.training_checkpoint import CheckpointWriter

    add, message = CheckpointWriter.add, None

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    straight()
    try:
        run("full_disk", callbacks=(At(3, lambda _: setattr(CheckpointWriter, "add", no_space)),))
    except OSError as error:
        message = str(error)
    finally:
        CheckpointWriter.add = add  # type: ignore[method-assign]
    left = sorted(p.name.split("-step=")[1][0] for p in Path("full_disk/checkpoints").iterdir() if p.is_dir())
    run("full_disk")
    return {
        "reason": "No space left" in (message or ""),
        "earlier checkpoints": left == ["2", "2"],
        "resumes": same(state(Path("full_disk/adapter.nemo")), state(Path("straight_4/adapter.nemo"))),
    }


def unwritable() -> dict[str, bool]:
    """If the adapter cannot be written, the error reports it. The same command then writes it without another step."""
    place = Path("unwritable_place")
    place.write_text("a file where a folder should be")
    message = refusal("unwritable", f"output={place}/adapter.nemo")
    place.unlink()
    result = run("unwritable", f"output={place}/adapter.nemo")
    return {
        "reported": f"output={place}/adapter.nemo: cannot be written" in message
        and "type the command again" in message,
        "written": same(state(place / "adapter.nemo"), adapter_in(checkpoint("unwritable", 4))),
        "no more steps": [step["step"] for step in result["steps"]] == [1, 2, 3, 4],
    }


def refused() -> dict[str, bool]:
    """Another learning rate, data, adapter or base is refused; more steps or other workers are allowed."""
    stopped("refused")
    settings, saved = Path("refused/checkpoints/settings.json"), "in the checkpoint"
    Path("refused/adapter.nemo").write_text("of the run before")
    rate = refusal("refused", "model.optim.lr=1e-3")
    factor = refusal("refused", "model.optim.lr_multipliers.B=4")
    default = refusal("refused", "model.optim.lr_multipliers.A=null")
    data = refusal("refused", "model.data.train_ds.max_seq_length=24")
    precision = refusal("refused", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0.5")
    rank = refusal("refused", "model.peft.tied_lora.rank=2")
    settings.rename("settings.json")
    rank_by_itself = refusal("refused", "model.peft.tied_lora.rank=2")
    Path("settings.json").rename(settings)
    [last] = Path("refused/checkpoints").glob("*-last")
    description = (last / "checkpoint.json").read_text()
    other = json.loads(description)
    other["facts"]["base"]["architecture"]["num_layers"] = 5
    other["facts"]["base"]["fingerprint"]["sha256"] = "0123"
    (last / "checkpoint.json").write_text(json.dumps(other))
    base = refusal("refused")
    kept = Path("refused/adapter.nemo").exists() and not list(Path("refused").glob("run_*"))
    (last / "checkpoint.json").write_text(description)
    shutil.copy("base.nemo", "moved.nemo")
    allowed = ["model.restore_from_path=moved.nemo", "model.data.train_ds.memmap_workers=1", "trainer.max_steps=5"]
    result = run("refused", *allowed)
    return {
        "learning rate": "model.optim.lr=0.001: the checkpoints in" in rate and "were made with 0.01" in rate,
        "multiplier": "model.optim.lr_multipliers.B=4.0: the checkpoints in" in factor and "made with 2.0" in factor,
        "multiplier left out": "model.optim.lr_multipliers.A=4.0: the checkpoints in" in default,
        "data": "model.data.train_ds.max_seq_length=24" in data,
        "precision": "trainer.precision='bf16-mixed'" in precision and "gradient_clip_val=0.5" in precision,
        "adapter": "model.peft.tied_lora.rank=2" in rank,
        "the adapter of the run before": kept,
        "adapter, by the checkpoint": f"model.peft.tied_lora.rank: 4 {saved}, 2 in this run" in rank_by_itself,
        "base": f"num_layers: 5 {saved}, 4 in this run" in base and f": '0123' {saved}" in base,
        "allowed": [step["step"] for step in result["steps"]] == [1, 2, 3, 4, 5],
    }


SCENARIOS: dict[str, Callable[[], dict[str, bool]]] = {
    function.__name__: function
    for function in (
        at_the_end,
        never,
        always,
        best,
        always_best,
        preempted,
        resumed_and_tested,
        plain_torch,
        o2,
        distributed_optimizer,
        refused,
        pruned,
        full_disk,
        unwritable,
    )
}


def main(argv: list[str], scenarios: dict[str, Callable[[], dict[str, bool]]] = SCENARIOS) -> None:
    """Runs the scenarios in the folder `argv[0]`. The result of a scenario that raises is its traceback."""
    import traceback

    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_tied_lora.platform import prepare
    from tests.harness.forks import free_port

    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # other scenarios run at the same time
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **place}
    os.environ.update({key: value for key, value in alone.items() if key not in os.environ})
    prepare(nemo=True)
    os.chdir(argv[0])
    results: dict[str, Any] = {}
    for name in argv[1:] or scenarios:
        destroy_num_microbatches_calculator()  # NeMo allows one microbatch size per process
        try:
            results[name] = scenarios[name]()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    if os.environ["RANK"] == "0":
        print(json.dumps(results), flush=True)
