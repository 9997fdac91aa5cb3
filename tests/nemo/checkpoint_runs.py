# SPDX-License-Identifier: Apache-2.0
"""One short fine-tuning run in this process, stopped where a test wants it, and readers of what it wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

__all__ = [
    "BUDGET",
    "COMMON",
    "MULTIPLIERS",
    "PARAMS",
    "SHARDED",
    "At",
    "adapter_in",
    "checkpoint",
    "nemo",
    "refusal",
    "run",
    "same",
    "state",
    "stopped",
    "tensors_in",
]

PARAMS = "exp_manager.checkpoint_callback_params"
BUDGET = "model.peft.tied_lora.rank_budget"
# Microbatches of one sample: each sample has the same weight at every data-parallel size.
SHARDED = ["model.optim.name=mcore_distributed_optim", "model.micro_batch_size=1"]
# Resumed at step 3, between the first choice and the last.
SHARDED += [f"{BUDGET}.target_rank=2", f"{BUDGET}.start_step=1", f"{BUDGET}.final_step=4", f"{BUDGET}.every=1"]
# u has its default, 1.
MULTIPLIERS = "model.optim.lr_multipliers={A: 0.5, B: 2, u: 1, v: 4}"
COMMON = [MULTIPLIERS, "trainer.max_steps=4", "model.data.validation_ds.metric.name=loss", f"{PARAMS}.save_top_k=-1"]


class At(Callback):
    """Calls a function before the given training step, and keeps its result."""

    def __init__(self, step: int, do: Callable[[Any], Any]) -> None:
        self.step, self.do, self.result = step, do, None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            self.result = self.do(trainer)


def run(name: str, *arguments: str, callbacks: tuple[Callback, ...] = ()) -> dict[str, Any]:
    """Runs `tied-lora finetune` in this process, with the test's callbacks."""
    from nemo_tied_lora.nemo import training_runs
    from nemo_tied_lora.nemo.checkpoint_strategy import TiedLoraTrainerBuilder
    from nemo_tied_lora.planning.composing.compose import compose_config
    from tests.harness.command_runs import finetune_arguments

    class Builder(TiedLoraTrainerBuilder):
        def _callbacks(self, ours: Any) -> Any:
            return [*super()._callbacks(ours), *callbacks]

    training_runs.TiedLoraTrainerBuilder = Builder  # type: ignore[misc]
    return training_runs.finetune(compose_config("finetune", [*finetune_arguments(name), *COMMON, *arguments]))


def stopped(name: str, *arguments: str, step: int = 3) -> None:
    """Runs until that step, and ends there without any clean-up, like a power cut."""

    class PowerCut(BaseException):
        pass

    def cut(_: Any) -> None:
        raise PowerCut

    with contextlib.suppress(PowerCut):
        run(name, *arguments, callbacks=(At(step, cut),))


def state(path: Path) -> dict[str, torch.Tensor]:
    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter

    return read_adapter(path).state


def checkpoint(name: str, step: int) -> Path:
    found = [p for p in Path(name, "checkpoints").glob(f"*-step={step}-*") if not p.name.endswith("-last")]
    assert len(found) == 1, found
    return found[0]


def adapter_in(folder: Path) -> dict[str, torch.Tensor]:
    return tensors_in(folder, "adapter/")


def tensors_in(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Reads a folder with safetensors' own reader."""
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    found = {key: tensor for tensors in files for key, tensor in tensors.items()}
    return {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def nemo(name: str) -> Path:
    return Path(name, "checkpoints", "tied_lora.nemo")


def refusal(name: str, *changes: str) -> str:
    """Returns the message of the refusal, or "nothing"."""
    from nemo_tied_lora.errors import ConfigError

    try:
        run(name, *changes)
    except ConfigError as error:
        return str(error)
    return "nothing"
