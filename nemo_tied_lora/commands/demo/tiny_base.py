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
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.tasks.source_settings import SPLITS

__all__ = ["TINY"]


_TASK = "german_numbers"
_DEFAULT_TASK = "translate_home_assistant_en_de"  # of configs/quickstart.yaml, so it was not chosen


def _check(cfg: Mapping[str, Any]) -> None:
    """Data, base and task are made here, so others cannot be chosen.

    Raises:
        ConfigError: they are.
    """
    problems, task = Problems(), cfg.get("task") or {}
    if cfg["base"] != "wheel":
        problems.append(
            f"base={cfg['base']}: the tiny model makes its own base; leave it out, or choose model=smollm2"
        )
    if task.get("name") not in (_DEFAULT_TASK, _TASK):
        problems.append(
            f"task={task.get('name')}: the tiny model has only {_TASK}; leave it out, or choose model=smollm2"
        )
    problems.raise_if_any()


def _sizes(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    return dict(cfg["model"])


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
    return [
        f"task={_TASK}",
        *(f"task.source.files.{split}={data / f'finetune_{split}.jsonl'}" for split in SPLITS),
        *(f"task.limits.{split}={limit}" for split in SPLITS if (limit := cfg["task"]["limits"][split]) is not None),
    ]


TINY = Model("quickstart", _check, _sizes, _base, _task_words)
