# SPDX-License-Identifier: Apache-2.0
"""Real runs on the private SLURM, started by `tied-lora launch`, and what they leave."""

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
"""The watchdog's: a loaded machine's rank is silent for seconds."""
_NODES = ["cluster=slurm", "cluster.gpus_per_node=1", "cluster.gpu_request=null", "cluster.exclusive=false"]
_TIMES = ["cluster.time=10", "cluster.save_seconds=110", f"watchdog.timeout_s={TIMEOUT_S}"]
_LENGTH = [f"trainer.max_steps={STEPS}", "model.data.validation_ds.metric.name=loss"]
PP2 = ["cluster.nodes=2", "layout=pp2"]


def rank_arguments(name: str) -> list[str]:
    """Of a run in `runs/NAME` of the workshop: what `tied-lora finetune` is given."""
    short = [word for word in finetune_arguments(name) if not re.match(r"output|exp_manager|model\.peft", word)]
    return [*short, *_LENGTH, f"name={name}"]


def launch(slurm: PrivateCluster, workshop: Path, name: str, *arguments: str, **variables: str) -> str:
    """`tied-lora launch`, as typed, in the workshop; returns the job's number."""
    command = ["launch", *_NODES, *_TIMES, *rank_arguments(name), *arguments]
    printed = console_script(*command, folder=workshop, planted={**slurm.environment, **variables}).stdout
    match = re.search(r"submitted: job (\d+)", printed)
    assert match is not None, printed
    return match[1]


class Run:
    """A run's folder."""

    def __init__(self, slurm: PrivateCluster, folder: Path, job: str) -> None:
        self.slurm, self.folder, self.job = slurm, folder, job

    def finish(self, seconds: float = 600) -> dict[str, str]:
        """Waits for the job's end, which is to be a good one."""
        found = self.slurm.wait_for_state(self.job, seconds=seconds)
        assert found["JobState"] == "COMPLETED", f"{found['JobState']}\n{self.said()}\n{self.log()}"
        return found

    def said(self, job: str | None = None) -> str:
        """What the script itself says of a job."""
        return (self.folder / "logs" / f"{job or self.job}.log").read_text()

    def log(self, start: int = 0, node: int = 0, job: str | None = None) -> str:
        """What the ranks on a node say after so many restarts; empty where none started."""
        path = self.folder / "logs" / f"{job or self.job}-{start}" / f"node-{node}.log"
        return path.read_text() if path.exists() else ""

    @property
    def status(self) -> dict[str, Any]:
        """status.json; empty where there is none yet."""
        return read_status(self.folder) or {}

    @property
    def metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text())
        return found

    @property
    def curves(self) -> list[dict[str, Any]]:
        """Every step's numbers but its seconds."""
        return [{key: value for key, value in step.items() if key != "seconds"} for step in self.metrics["steps"]]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return read_adapter(self.folder / "adapter.nemo").state

    @property
    def last_checkpoint(self) -> Path:
        """That of the last step."""
        [last] = (self.folder / "checkpoints").glob("*-last")
        assert read_description(last)["step"] == STEPS
        return last

    def shown(self) -> str:
        """What `tied-lora status` prints."""
        done: subprocess.CompletedProcess[str] = console_script("status", f"run={self.folder}", folder=self.folder)
        return done.stdout
