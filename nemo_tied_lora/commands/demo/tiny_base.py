# SPDX-License-Identifier: Apache-2.0
"""The quickstart's tiny model, which it pre-trains itself on data that it makes: numbers in words."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.demo.run import Model
from nemo_tied_lora.commands.demo.stages import run_command
from nemo_tied_lora.commands.demo.tasks import write_quickstart_data

__all__ = ["TINY"]


def _check(cfg: Mapping[str, Any]) -> None:
    """There is nothing to check: data, base and task are made here."""


def _base(cfg: Mapping[str, Any]) -> Path:
    """Makes the data and pre-trains the base if they are missing. An interrupted pre-training resumes."""
    folder = Path(cfg["folder"])
    base, data = folder / "base.nemo", folder / "data"
    if not (data / "tokenizer.model").exists():
        print(f"making the data: {data}", flush=True)
        write_quickstart_data(data)
    if not base.exists():
        training = folder / "pretraining"
        arguments = ["pretrain", "recipe=quickstart_base", f"output={training / 'base.nemo'}"]
        arguments += [f"exp_manager.explicit_log_dir={training}", f"model.tokenizer.model={data / 'tokenizer.model'}"]
        arguments += [
            f"model.data.{name}_ds.file_names=[{data / f'pretrain_{name}.jsonl'}]" for name in ("train", "validation")
        ]
        run_command(arguments)
        (training / "base.nemo").rename(base)
        shutil.rmtree(training / "checkpoints", ignore_errors=True)
    return base


def _task_words(cfg: Mapping[str, Any]) -> list[str]:
    data = Path(cfg["folder"], "data")
    splits = ("train", "validation", "test")
    return [
        "task=german_numbers",
        *(f"task.source.files.{split}={data / f'finetune_{split}.jsonl'}" for split in splits),
    ]


TINY = Model("quickstart", _check, _base, _task_words)
