# SPDX-License-Identifier: Apache-2.0
"""Starts real runs on the private SLURM with `tied-lora launch`, and reads the files that they write."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.checkpoint.training_checkpoint import read_description
from nemo_tied_lora.resilience.status_file import read_status
from tests.harness.command_runs import console_script, finetune_arguments
from tests.slurm.private_cluster import PrivateCluster

__all__ = ["PP2", "STEPS", "Run", "launch", "rank_arguments"]

STEPS = 30
TIMEOUT_S = 15
"""The watchdog's time limit. On a busy machine, a healthy rank may be silent for seconds."""
_NODES = ["cluster=slurm", "cluster.gpus_per_node=1", "cluster.gpu_request=null", "cluster.exclusive=false"]
_TIMES = ["cluster.time=10", "cluster.save_seconds=110", f"watchdog.timeout_s={TIMEOUT_S}"]
_LENGTH = [f"trainer.max_steps={STEPS}", "model.data.validation_ds.metric.name=loss"]
PP2 = ["cluster.nodes=2", "layout=pp2"]


def rank_arguments(name: str) -> list[str]:
    """Arguments of `tied-lora finetune` for a run in the workshop's folder `runs/NAME`."""
    short = [word for word in finetune_arguments(name) if not re.match(r"output|exp_manager|model\.peft", word)]
    return [*short, *_LENGTH, f"name={name}"]


def launch(slurm: PrivateCluster, workshop: Path, name: str, *arguments: str, **variables: str) -> str:
    """Runs `tied-lora launch` in the workshop, as a user does. Returns the job's number."""
    command = ["launch", *_NODES, *_TIMES, *rank_arguments(name), *arguments]
    printed = console_script(*command, folder=workshop, planted={**slurm.environment, **variables}).stdout
    match = re.search(r"submitted: job (\d+)", printed)
    assert match is not None, printed
    return match[1]


class Run:
    """A run on the private SLURM: its job and its folder."""

    def __init__(self, slurm: PrivateCluster, folder: Path, job: str) -> None:
        self.slurm, self.folder, self.job = slurm, folder, job

    def finish(self, seconds: float = 600) -> dict[str, str]:
        """Waits for the job's end and checks that it is COMPLETED."""
        found = self.slurm.wait_for_state(self.job, seconds=seconds)
        assert found["JobState"] == "COMPLETED", f"{found['JobState']}\n{self.script_log()}\n{self.log()}"
        return found

    def script_log(self, job: str | None = None) -> str:
        """Returns the log of the batch script."""
        return (self.folder / "logs" / f"{job or self.job}.log").read_text()

    def log(self, start: int = 0, node: int = 0, job: str | None = None) -> str:
        """Returns the log of a node's ranks. `start` counts the job's restarts. Returns "" if no rank started."""
        path = self.folder / "logs" / f"{job or self.job}-{start}" / f"node-{node}.log"
        return path.read_text() if path.exists() else ""

    @property
    def status(self) -> dict[str, Any]:
        """The content of status.json; {} if the file does not exist yet."""
        return read_status(self.folder) or {}

    @property
    def metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return found

    @property
    def curves(self) -> list[dict[str, Any]]:
        """The metrics of each step, without its seconds."""
        return [{key: value for key, value in step.items() if key != "seconds"} for step in self.metrics["steps"]]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return read_adapter(self.folder / "adapter.nemo").state

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of the last step."""
        [last] = (self.folder / "checkpoints").glob("*-last")
        assert read_description(last)["step"] == STEPS
        return last

    def status_output(self) -> str:
        """Returns what `tied-lora status` prints."""
        done: subprocess.CompletedProcess[str] = console_script("status", f"run={self.folder}", folder=self.folder)
        return done.stdout
