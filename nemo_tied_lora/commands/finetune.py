# SPDX-License-Identifier: Apache-2.0
"""`tied-lora finetune`: fine-tunes a NeMo GPT with Tied-LoRA, on one or several ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from nemo_tied_lora.commands.distributed_command import run_command
from nemo_tied_lora.commands.program import run_program
from nemo_tied_lora.commands.task_data import check_task, make_task_files
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.data.data_files import check_training_files
from nemo_tied_lora.planning.preflight import check_finetuning
from nemo_tied_lora.resilience.rank import Rank

__all__ = ["SUMMARY", "main"]

SUMMARY = "fine-tune a NeMo GPT with Tied-LoRA and write the adapter as one .nemo file"

_EXAMPLES = """  tied-lora finetune recipe=quickstart layout=tp2
  tied-lora finetune model.restore_from_path=llama2_7b.nemo layout=tp8 preset=tl6 model.peft.tied_lora.rank=8 \\
      "model.data.train_ds.file_names=[train.jsonl]" "model.data.validation_ds.file_names=[validation.jsonl]"
  tied-lora finetune task=nli_wordnet_senses model.restore_from_path=base.nemo layout=pp2 trainer.max_steps=150
  torchrun --nproc-per-node 8 -m nemo_tied_lora.commands.finetune layout=tp8 ...
"""


def main(argv: list[str]) -> int:
    """The command; see `run_command` for what it returns."""
    return run_command(
        "finetune",
        argv,
        summary=SUMMARY,
        examples=_EXAMPLES,
        groups=("data", "task", "optim", "preset", "layout", "recipe"),
        check=_check,
        check_files=check_training_files,
        make_files=make_task_files,
        run=_run,
    )


def _check(values: Mapping[str, Any]) -> list[str]:
    """Checks the task and the rest.

    Raises:
        ConfigError: with all problems.
    """
    problems = Problems()
    problems.attempt(check_task, values)
    lines = problems.attempt(check_finetuning, values)
    problems.raise_if_any()
    return lines or []


def _run(cfg: DictConfig, rank: Rank) -> Any:
    from nemo_tied_lora.nemo.training_runs import finetune

    return finetune(cfg, rank)


if __name__ == "__main__":
    run_program(main, sys.argv[1:], "finetune")
