# SPDX-License-Identifier: Apache-2.0
"""The quickstart: gets a base, fine-tunes it on a task, evaluates base and adapter, and prints a report.

Every stage is a `tied-lora` command, and keeps its result: the same quickstart, typed again after a kill, continues.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.demo.report import report
from nemo_tied_lora.commands.demo.stages import MemoryMeter, run_command
from nemo_tied_lora.files import write_atomically, write_json
from nemo_tied_lora.planning.base_config import base_model_config
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.composing.dotted_keys import flat
from nemo_tied_lora.planning.composing.override_lines import read_lines
from nemo_tied_lora.tasks.prepare import prepare
from nemo_tied_lora.tasks.task import Task
from nemo_tied_lora.tasks.training_order import file_lines, training_items

__all__ = ["Model", "check_overrides", "run", "settings_key", "task_changes"]

Config = Mapping[str, Any]
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


@dataclass(frozen=True)
class Model:
    """A base of the quickstart."""

    recipe: str  # of `tied-lora finetune`
    check: Callable[[Config], None]  # raises ConfigError before anything is downloaded or made
    sizes: Callable[[Config], Mapping[str, Any] | None]  # of its layers; None: not known yet
    base: Callable[[Config], Path]  # returns the base's .nemo, and makes it if it is missing
    task_words: Callable[[Config], list[str]]  # the overrides that name its task


def run(model: Model, cfg: Config) -> None:
    """Runs the stages, and writes and prints the report.

    Raises:
        StageError: a stage failed.
        ConfigError: the model cannot be had.
    """
    folder, preset = Path(cfg["folder"]), cfg["model"]["peft"]["tied_lora"]["preset"]
    seconds: dict[str, float] = {}
    with MemoryMeter() as memory:
        base = _timed(seconds, "model", lambda: model.base(cfg))
        task, task_words = _task(model, cfg)
        finetune = _finetune_arguments(model, cfg, base, task_words, _ordered(model, cfg, task))
        training = folder / f"{preset}-{_layout(cfg)}-{settings_key(finetune)}"
        trained, adapter, continued = training / "adapter.nemo", folder / f"{preset}.nemo", training.exists()
        finetune += [f"output={trained}", f"exp_manager.explicit_log_dir={training}"]
        _timed(seconds, "finetuning", lambda: run_command(finetune))
        shutil.copyfile(training / "loss.png", folder / "loss.png")
        write_atomically(adapter, trained.read_bytes())
        evaluation = folder / "evaluation" / task.name
        evaluate = _evaluate_arguments(cfg, base, adapter, task_words, evaluation)
        _timed(seconds, "evaluation", lambda: run_command(evaluate))
    shutil.rmtree(training / "checkpoints", ignore_errors=True)
    metrics = {
        **json.loads((training / "metrics.json").read_text()),
        "layout": _layout(cfg),
        "preset": preset,
        "seed": cfg["seed"],
        "seconds": seconds,
        "continued": continued,
        "peak_memory_bytes": memory.peak_bytes,
        "base": dict(base_model_config(str(base), key="base").get("huggingface") or {}),
        "evaluation": json.loads((evaluation / "results.json").read_text()),
    }
    write_json(folder / "metrics.json", metrics)
    text = report(task, metrics, folder, adapter, evaluation)
    write_atomically(folder / "report.md", text.encode())
    print(text)


_OWN = {
    "output": "folder=",
    "exp_manager.explicit_log_dir": "folder=",
    "model.restore_from_path": "base=",
    "preset": "preset=",
    "model.peft.tied_lora.preset": "preset=",
    "task": "task=",
    "layout": "layout=",
    "trainer.devices": "layout=",
    "model.tensor_model_parallel_size": "layout=",
    "model.pipeline_model_parallel_size": "layout=",
}
"""Keys of finetune that decide about other stages too: key -> the quickstart's own."""


def check_overrides(model: Model, cfg: Config) -> None:
    """Checks the overrides for finetune, which would be read only after the base has been made.

    Raises:
        ConfigError: with all problems.
    """
    lines, problems = read_lines(cfg["overrides"])
    for line in lines:
        own = _OWN.get("task" if line.key.startswith("task.") else line.key)
        if own is not None:
            problems.append(f"overrides: {line.text}: other stages must know it too; use the quickstart's own {own}")
    if not problems:
        words = [f"recipe={model.recipe}", *model.task_words(cfg)]
        problems.attempt(lambda: plain(compose_config("finetune", [*words, *cfg["overrides"]])))
    problems.raise_if_any()


def task_changes(task: Mapping[str, Any]) -> list[str]:
    """The overrides that make the shipped task of this name the given one."""
    shipped = flat(plain(compose_config("finetune", [f"task={task['name']}"]))["task"])
    return [
        f"task.{key}={_hydra(value)}"
        for key, value in flat(task).items()
        if key != "folder" and value != shipped.get(key)
    ]


def _hydra(value: Any) -> str:
    """A plain value as Hydra reads it."""
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_./][\w./-]*", value) else "'" + value.replace("'", r"\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    return json.dumps(value)


def _task(model: Model, cfg: Config) -> tuple[Task, list[str]]:
    """The task, and the overrides by which a command uses it."""
    given = model.task_words(cfg)
    name = next(word.partition("=")[2] for word in given if word.startswith("task="))
    words = [*given, f"task.folder={Path(cfg['folder']) / 'task' / name}"]
    return Task.from_config(plain(compose_config("finetune", words))["task"]), words


def _ordered(model: Model, cfg: Config, task: Task) -> Path:
    """Writes the training items in batches of similar length, so that less is padded. Returns the file."""
    batch = int(plain(compose_config("finetune", [f"recipe={model.recipe}"]))["model"]["global_batch_size"])
    lines = file_lines(prepare(task).files["train"])
    path = Path(cfg["folder"], "task", f"{task.name}_in_batches_of_{batch}_seed_{cfg['seed']}.jsonl")
    content = b"".join(training_items(lines, -(-len(lines) // batch), batch, cfg["seed"]))
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)
    return path


def _layout_arguments(cfg: Config) -> list[str]:
    return [f"trainer.devices={cfg['trainer']['devices']}", *(f"model.{key}={cfg['model'][key]}" for key in _SIZES)]


def _layout(cfg: Config) -> str:
    return "tp{}pp{}".format(*(cfg["model"][key] for key in _SIZES))


def _finetune_arguments(model: Model, cfg: Config, base: Path, task_words: Sequence[str], items: Path) -> list[str]:
    return [
        "finetune",
        f"recipe={model.recipe}",
        *task_words,
        f"model.data.train_ds.file_names=[{items}]",
        "model.data.train_ds.shuffle=false",
        f"preset={cfg['model']['peft']['tied_lora']['preset']}",
        *_layout_arguments(cfg),
        f"model.restore_from_path={base}",
        f"model.seed={cfg['seed']}",
        f"model.peft.tied_lora.seed={cfg['seed']}",
        *cfg["overrides"],
    ]


def _evaluate_arguments(cfg: Config, base: Path, adapter: Path, task_words: Sequence[str], output: Path) -> list[str]:
    return [
        "evaluate",
        f"base={base}",
        f"adapter=[null,{adapter}]",
        *task_words,
        *_layout_arguments(cfg),
        f"output={output}",
    ]


def settings_key(settings: object) -> str:
    """Names a folder: a run with other settings must not resume from this one's checkpoints."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]


def _timed(seconds: dict[str, float], stage: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    seconds[stage] = time.perf_counter() - started
    return result
