# SPDX-License-Identifier: Apache-2.0
"""The stages of the quickstart: data, base, fine-tuning, evaluation. Training stages are `tied-lora` commands."""

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
from nemo_tied_lora.launching.local_ranks import exit_code
from nemo_tied_lora.planning.rank_variables import STARTED_BY

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
    """A stage's command failed; the message names the command. `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_stages(command: str, run: Callable[[Mapping[str, Any]], None], cfg: Mapping[str, Any]) -> int:
    """Runs a command that consists of stages. Returns 0, or the exit code of the stage that failed."""
    try:
        run(cfg)
    except StageError as error:
        print(f"tied-lora {command}: {error}", file=sys.stderr)
        return error.code
    return 0


def run_command(arguments: Sequence[str], log: Path | None = None, threads: int | None = None) -> float:
    """Runs `tied-lora arguments` and returns the seconds it took.

    Args:
        log: the file for its output. None: output goes to the terminal, after the command as a user would type it.
        threads: threads per rank. None: the cores divided by the ranks. Commands that run side by side must share the
            cores: with more threads than cores a step took ten times as long.

    Raises:
        StageError: the command failed.
    """
    if log is None:
        print(f"$ tied-lora {shlex.join(arguments)}", flush=True)
    return _run([sys.executable, "-m", "nemo_tied_lora.commands.main", *arguments], log, threads)


def make_data(folder: Path) -> Path:
    """Makes the JSONL files and the tokenizer if they are missing; returns their folder."""
    data = folder / "data"
    if not (data / "tokenizer.model").exists():
        print(f"making the data: {data}", flush=True)
        write_quickstart_data(data)
    return data


def make_base(folder: Path) -> Path:
    """Pre-trains the base model if it is missing; returns its path. An interrupted pre-training resumes."""
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
    """The arguments of `tied-lora finetune` on the quickstart's task."""
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
    """Exact match of the base and the adapters on the test numbers, which are in no training or validation file.

    Raises:
        StageError: the evaluation failed.
    """
    print(f"evaluating {1 + len(adapters)} models on {data / 'finetune_test.jsonl'}", flush=True)
    module = "nemo_tied_lora.commands.demo.evaluation"
    files = [str(path) for path in (base, data / "finetune_test.jsonl", output, *adapters)]
    _run([sys.executable, "-m", module, *files], output.with_suffix(".log"))
    return json.loads(output.read_text())


class MemoryMeter:
    """Measures the peak of the memory of this process and all its children. Samples until the context ends.

    A page that several processes share is divided among them (proportional set size) if the system reports it, else
    it counts in each process.
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
    except psutil.Error:  # the process has ended since it was listed
        return 0


def _run(command: Sequence[str], log: Path | None, threads: int | None = None) -> float:
    started = time.perf_counter()
    environment = {**os.environ, STARTED_BY: str(os.getpid())}
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    if log is None:
        code = subprocess.run(command, check=False, env=environment).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            code = subprocess.run(
                command, check=False, env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
    code = exit_code(code)
    if code != 0:
        where = "" if log is None else f"; its output is in {log}"
        raise StageError(f"{shlex.join(command[1:4])} ... failed with exit code {code}{where}", code)
    return time.perf_counter() - started
