# SPDX-License-Identifier: Apache-2.0
"""The quickstart's stages, each a command of its own that a user can type: data, base, fine-tuning, evaluation."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from nemo_tied_lora.commands.demo.tasks import write_quickstart_data

__all__ = [
    "MemoryMeter",
    "StageError",
    "evaluate",
    "finetune_arguments",
    "make_base",
    "make_data",
    "run_command",
    "run_stages",
]


class StageError(RuntimeError):
    """A stage's command failed; the message names it."""


def run_stages(command: str, run: Callable[[Mapping[str, Any]], None], cfg: Mapping[str, Any]) -> int:
    """Runs a command made of stages; returns 0, or 1 where one failed, with the reason on stderr."""
    try:
        run(cfg)
    except StageError as error:
        print(f"tied-lora {command}: {error}", file=sys.stderr)
        return 1
    return 0


def run_command(arguments: Sequence[str], log: Path | None = None, threads: int | None = None) -> float:
    """Runs `tied-lora arguments`, shown as a user would type it; returns its seconds.

    Args:
        log: where its output goes; None: to the terminal, and the command is shown there.
        threads: of each rank; None: the cores divided by the ranks. Commands that run side by side must share the
            cores: with more threads than cores a step took ten times as long.

    Raises:
        StageError: it failed.
    """
    if log is None:
        print(f"$ tied-lora {shlex.join(arguments)}", flush=True)
    return _run([sys.executable, "-m", "nemo_tied_lora.commands.main", *arguments], log, threads)


def make_data(folder: Path) -> Path:
    """The JSONL files and the tokenizer, once; returns their folder."""
    data = folder / "data"
    if not (data / "tokenizer.model").exists():
        print(f"making the data: {data}", flush=True)
        write_quickstart_data(data)
    return data


def make_base(folder: Path) -> Path:
    """The base model, pre-trained once and kept; an interrupted pre-training goes on where it was."""
    base, data = folder / "base.nemo", make_data(folder)
    if not base.exists():
        arguments = ["pretrain", "recipe=quickstart_base", f"output={folder / 'pretraining' / 'base.nemo'}"]
        arguments += [f"exp_manager.explicit_log_dir={folder / 'pretraining'}"]
        arguments += [f"model.tokenizer.model={data / 'tokenizer.model'}"]
        arguments += [f"model.data.{ds}.file_names=[{data / f'pretrain_{name}.jsonl'}]" for ds, name in _SPLITS]
        run_command(arguments)
        (folder / "pretraining" / "base.nemo").rename(base)
        shutil.rmtree(folder / "pretraining" / "checkpoints", ignore_errors=True)
    return base


def finetune_arguments(base: Path, data: Path, output: Path, seed: int) -> list[str]:
    """`tied-lora finetune` on the quickstart's task."""
    return [
        "finetune",
        "recipe=quickstart",
        f"output={output}",
        f"model.restore_from_path={base}",
        f"model.seed={seed}",
        f"model.peft.tied_lora.seed={seed}",
        *(f"model.data.{ds}.file_names=[{data / f'finetune_{name}.jsonl'}]" for ds, name in _SPLITS),
    ]


def evaluate(base: Path, data: Path, output: Path, adapters: Sequence[Path]) -> dict[str, Any]:
    """Exact match of the base and the adapters on the test numbers, which no training and no validation has seen.

    Raises:
        StageError: it failed.
    """
    print(f"evaluating {1 + len(adapters)} models on {data / 'finetune_test.jsonl'}", flush=True)
    module = "nemo_tied_lora.commands.demo.evaluation"
    files = [str(path) for path in (base, data / "finetune_test.jsonl", output, *adapters)]
    _run([sys.executable, "-m", module, *files], output.with_suffix(".log"))
    return json.loads(output.read_text())


class MemoryMeter:
    """The highest sum of memory of this process and all its children, sampled while in use.

    A page that several processes share is divided among them (proportional set size) where the system tells, and
    counted in each elsewhere.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self.peak_bytes = 0
        self._seconds, self._done = seconds, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._done.wait(self._seconds):
            self.peak_bytes = max(self.peak_bytes, sum(map(_resident, [me, *me.children(recursive=True)])))


_SPLITS = (("train_ds", "train"), ("validation_ds", "validation"))


def _resident(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except psutil.Error:  # it has ended meanwhile
        return 0


def _run(command: Sequence[str], log: Path | None, threads: int | None = None) -> float:
    started = time.perf_counter()
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    if log is None:
        code = subprocess.run(command, check=False, env=environment).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            code = subprocess.run(
                command, check=False, env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
    if code != 0:
        where = "" if log is None else f"; its output is in {log}"
        raise StageError(f"{shlex.join(command[1:4])} ... failed with exit code {code}{where}")
    return time.perf_counter() - started
