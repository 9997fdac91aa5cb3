# SPDX-License-Identifier: Apache-2.0
"""The data of a study: each task's files, within the study's limits, and their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_tied_lora.commands.study.plan import Study, StudyTask
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.files import write_atomically
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.tasks.prepare import prepare
from nemo_tied_lora.tasks.task import Task
from nemo_tied_lora.tasks.training_order import line_length

__all__ = ["TaskFiles", "check_tasks", "prepare_task", "prepare_tasks", "task_words"]

_SHOWN = 16


@dataclass(frozen=True)
class TaskFiles:
    """A task's files."""

    words: tuple[str, ...]  # the overrides by which a command uses these files
    train: Path  # without the items that are too long
    items: Mapping[str, Path]  # validation and test
    marker: str | None  # the text before the final answer
    checksums: dict[str, str]  # of train, validation and test
    left_out: int  # training items that are too long


def task_words(study: Study, task: StudyTask) -> list[str]:
    """The overrides that make a command use the study's files of a task."""
    limits = {"validation": study.sweep.items, "test": task.items}
    return [
        f"task={task.name}",
        f"task.folder={Path(study.folder, 'tasks', task.name)}",
        f"task.max_seq_length={task.max_seq_length}",
        *(f"task.limits.{split}={limit}" for split, limit in limits.items() if limit is not None),
    ]


def prepare_tasks(study: Study) -> dict[str, TaskFiles]:
    """Makes the files of all tasks, unless they are there.

    Raises:
        ConfigError: with the problems of all tasks.
    """
    problems = Problems()
    found = {task.name: problems.attempt(prepare_task, study, task) for task in study.tasks}
    problems.raise_if_any()
    return {name: files for name, files in found.items() if files is not None}


def check_tasks(study: Study) -> None:
    """Checks that the tasks exist and have the metrics, without making their files.

    Raises:
        ConfigError: with all problems.
    """
    problems = Problems()
    for task in study.tasks:
        problems.attempt(_task, study, task)
    problems.raise_if_any()


def _task(study: Study, task: StudyTask) -> Task:
    found = Task.from_config(plain(compose_config("finetune", task_words(study, task)))["task"])
    wrong = [name for name in (task.primary, *task.also) if name not in found.metrics]
    if wrong:
        choices = ", ".join(found.metrics)
        raise ConfigError(
            [f"tasks.{task.name}: {name} is not a metric of this task; choose from {choices}" for name in wrong]
        )
    return found


def prepare_task(study: Study, task: StudyTask) -> TaskFiles:
    """Makes the files of one task, unless they are there.

    Raises:
        ConfigError: with all problems.
    """
    found = _task(study, task)
    prepared = prepare(found)
    train, left_out = prepared.files["train"], 0
    content = train.read_bytes()
    if task.max_chars is not None:
        lines = content.splitlines(keepends=True)
        kept = [line for line in lines if line_length(line) <= task.max_chars]
        if not kept:
            raise ConfigError([f"tasks.{task.name}.max_chars={task.max_chars}: leaves no training item; raise it"])
        left_out, content = len(lines) - len(kept), b"".join(kept)
        train = train.with_name(f"train_{task.max_chars}_chars.jsonl")
        if not train.exists() or train.read_bytes() != content:
            write_atomically(train, content)
    checksums = {name: prepared.record["splits"][name]["sha256"][:_SHOWN] for name in ("validation", "test")}
    checksums["train"] = hashlib.sha256(content).hexdigest()[:_SHOWN]
    return TaskFiles(tuple(task_words(study, task)), train, prepared.files, found.marker, checksums, left_out)
