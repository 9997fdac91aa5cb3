# SPDX-License-Identifier: Apache-2.0
"""Checks every line of the data and prompt files of a run. One process of a run does it: see `run_command`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.data.data_verdicts import known_notes, remember
from nemo_tied_lora.planning.data.example_forms import Conversations, Form, PromptExamples
from nemo_tied_lora.planning.data.jsonl_lines import check_file
from nemo_tied_lora.planning.data.packed_files import packed_problem
from nemo_tied_lora.planning.data.prompt_template import template_fields, template_problems, training_template_problems

__all__ = [
    "SECTIONS",
    "check_prompts_file",
    "check_training_files",
    "checked_already",
    "made_by_task",
    "mark_checked",
    "unreadable",
]

SECTIONS = ("train_ds", "validation_ds", "test_ds")

_CHECKED = "TIED_LORA_CHECKED_DATA"
"""The environment variable with which a process tells the ranks that it starts which files it has checked."""


def check_training_files(cfg: Mapping[str, Any]) -> None:
    """Reads every line of the files of train_ds, validation_ds and test_ds. Prints one note for what is done with them.

    Raises:
        ConfigError: with all problems. The configuration itself is checked by `data_checks`; files of a wrong section
            are left out.
    """
    problems, done = Problems(), set()
    for key, path, form in _files(cfg):
        if (path, form) not in done:
            done.add((path, form))
            problems += _problems(key, path, form)
    problems.raise_if_any()


def check_prompts_file(cfg: Mapping[str, Any]) -> None:
    """Reads every line of `prompts_file`, as `check_training_files` does.

    Raises:
        ConfigError: with all problems.
    """
    template, file = cfg.get("prompt_template"), cfg.get("prompts_file")
    if file is None or list(template_problems("prompt_template", template)):
        return
    form = PromptExamples(template=str(template), fields=tuple(dict.fromkeys(template_fields(str(template)))))
    problems = Problems(_problems("prompts_file", Path(str(file)), form))
    problems.raise_if_any()


def unreadable(key: str, path: Path) -> Iterator[str]:
    """Yields why a data file cannot be opened, if it cannot."""
    try:
        if path.is_dir():
            yield f"{key}: {path}: is a folder; name the files in it"
        elif not path.exists():
            home = "; a shell has not replaced ~: write the whole path" if str(path).startswith("~") else ""
            yield f"{key}: {path}: no such file{home}"
        elif not path.is_file():
            yield f"{key}: {path}: is not a regular file, which is needed: data are read more than once"
        else:
            path.open("rb").close()
    except OSError as error:
        yield f"{key}: {path}: cannot be read: {error.strerror}"


def made_by_task(cfg: Mapping[str, Any], path: Path) -> bool:
    """Whether the file need not be there yet: `task=NAME` makes it before it is read."""
    task = cfg.get("task")
    return isinstance(task, Mapping) and path.parent == Path(str(task.get("folder"))) and not path.exists()


def mark_checked(cfg: Mapping[str, Any]) -> None:
    """Tells the ranks that this process will start that the files are checked."""
    os.environ[_CHECKED] = _stamp(cfg)


def checked_already(cfg: Mapping[str, Any]) -> bool:
    """Whether the process that started this one has checked the same files, and they have not changed since."""
    return os.environ.get(_CHECKED) == _stamp(cfg)


def _stamp(cfg: Mapping[str, Any]) -> str:
    files = [(key, str(path), repr(form)) for key, path, form in _files(cfg)]
    files.append(("prompts_file", str(cfg.get("prompts_file")), str(cfg.get("prompt_template"))))
    times: list[list[int]] = []
    for _, path, _ in files:
        try:
            found = os.stat(path)
        except OSError:
            continue
        times.append([found.st_size, found.st_mtime_ns])
    return hashlib.sha256(json.dumps([files, times]).encode()).hexdigest()[:16]


def _files(cfg: Mapping[str, Any]) -> Iterator[tuple[str, Path, Form | None]]:
    """Yields (key, file, form) for each file; form None: packed sequences."""
    data = cfg["model"].get("data")
    for name in SECTIONS if isinstance(data, Mapping) else ():
        section = data.get(name)
        files = section.get("file_names") if isinstance(section, Mapping) else None
        if not isinstance(files, list):
            continue
        for file in dict.fromkeys(map(str, files)):
            if section.get("packed_sequence"):
                yield f"model.data.{name}.file_names", Path(file), None
            elif (form := _form(name, section, bool(data.get("chat")))) is not None:
                yield f"model.data.{name}.file_names", Path(file), form


def _form(name: str, section: Mapping[str, Any], chat: bool) -> Form | None:
    """The form of a section's lines. None: its template or label is wrong, which `data_checks` reports."""
    if chat:
        return Conversations()
    template, label = section.get("prompt_template"), section.get("label_key")
    if list(training_template_problems("", section)):
        return None
    evaluated = name != "train_ds"
    generates = evaluated and (section.get("metric") or {}).get("name") != "loss"
    return PromptExamples(
        template=str(template),
        fields=tuple(dict.fromkeys(template_fields(str(template)))),
        label=str(label),
        label_is_optional=evaluated and bool(section.get("write_predictions_to_file")),
        needs_prompt=(generates or bool(section.get("write_predictions_to_file") and evaluated))
        and not section.get("add_bos"),
    )


def _problems(key: str, path: Path, form: Form | None) -> Iterator[str]:
    """Yields the problems of one file; prints its notes if it has none."""
    closed = list(unreadable(key, path))
    if closed:
        return  # `data_checks` reports it
    try:
        if form is None:
            found = packed_problem(path)
            yield from () if found is None else (f"{key}: {path}: {found}",)
            return
        notes = known_notes(path, form)
        if notes is None:
            report = check_file(path, form)
            problems = list(report.problems())
            yield from (f"{key}: {path}: {problem}" for problem in problems)
            if problems:
                return
            notes = list(report.notes())
            remember(path, form, notes)
    except OSError as error:
        yield f"{key}: {path}: cannot be read: {error.strerror}"
        return
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr, flush=True)
