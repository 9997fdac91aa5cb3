# SPDX-License-Identifier: Apache-2.0
"""`tied-lora pretrain`: trains a small base model from scratch."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from nemo_tied_lora.commands.distributed_command import run_command
from nemo_tied_lora.planning.data.data_files import check_training_files
from nemo_tied_lora.planning.preflight import check_pretraining
from nemo_tied_lora.resilience.rank import Rank

__all__ = ["SUMMARY", "main"]

SUMMARY = "train a small NeMo GPT from scratch and write it as a base .nemo file"

_EXAMPLES = """  tied-lora pretrain recipe=quickstart_base
  tied-lora pretrain model=tiny model.tokenizer.model=tokenizer.model output=base.nemo \\
      "model.data.train_ds.file_names=[train.jsonl]" "model.data.validation_ds.file_names=[validation.jsonl]"
"""


def main(argv: list[str]) -> int:
    """The command; see `run_command` for what it returns."""
    return run_command(
        "pretrain",
        argv,
        summary=SUMMARY,
        examples=_EXAMPLES,
        groups=("model", "data", "optim", "layout", "recipe"),
        check=check_pretraining,
        check_files=check_training_files,
        run=_run,
    )


def _run(cfg: DictConfig, rank: Rank) -> Any:
    from nemo_tied_lora.nemo.training_runs import pretrain

    return pretrain(cfg, rank)
