# SPDX-License-Identifier: Apache-2.0
"""Checks the base and the data of a run on Bridge, each file before torch and Bridge are imported, which takes seconds.

Bridge finds most of these mistakes when all ranks have started, and ends with a traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nemo_tied_lora.planning.data.data_files import unreadable
from nemo_tied_lora.planning.data.data_verdicts import known_notes, remember
from nemo_tied_lora.planning.data.example_forms import PromptExamples, named
from nemo_tied_lora.planning.data.jsonl_lines import FileReport, check_file

__all__ = ["base_problems", "data_index_folder", "data_problems"]

_FILES = ("training.jsonl", "validation.jsonl")
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*")


def base_problems(folder: Path, *, tokenizer: bool = True) -> Iterator[str]:
    """What is wrong with `--hf-path`, the folder of a Hugging Face model.

    Args:
        tokenizer: whether the tokenizer must be in the folder too.
    """
    key, weights = f"--hf-path={folder}", sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        yield f"{key}: not the folder of a Hugging Face model, with config.json and *.safetensors"
        return
    yield from (f"{key}: config.json {problem}; copy it again" for problem in _config_problems(folder))
    for path in weights:
        try:
            safe_open(path, framework="numpy")
        except (OSError, SafetensorError) as error:
            yield f"{key}: {path.name} cannot be read: {error}; copy it again"
    yield from (f"{key}: {name} is missing; copy it too" for name in _missing_shards(folder))
    if tokenizer and not any(any(folder.glob(name)) for name in _TOKENIZERS):
        names = ", ".join(_TOKENIZERS)
        yield f"{key}: has no tokenizer ({names}); copy it too, or set tokenizer.tokenizer_model=FOLDER"


def _config_problems(folder: Path) -> Iterator[str]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        yield f"cannot be read: {error}"
        return
    if not isinstance(config, dict) or "model_type" not in config or not config.get("architectures"):
        yield "does not name the model: model_type and architectures are needed"


def _missing_shards(folder: Path) -> list[str]:
    """The files that the index of the weights names, and that are not there."""
    try:
        names = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # one file has no index
        return []
    return sorted(name for name in set(map(str, names)) if not (folder / name).is_file())


def data_problems(folder: Path, prompt: str = "input", completion: str = "output") -> Iterator[str]:
    """What is wrong with training.jsonl and validation.jsonl in `--data`. Reads every line, and prints notes on stderr.

    Args:
        prompt: the field of the prompt, Bridge's `dataset.preprocessing.prompt_column`.
        completion: the field of the answer, `dataset.preprocessing.completion_column`.
    """
    row = _Row(template=f"{{{prompt}}} {{{completion}}}", fields=(prompt, completion), label=completion)
    for path in (folder / name for name in _FILES):
        if not path.exists():
            yield f"--data={path}: no such file; one object per line, with the fields {prompt} and {completion}"
            continue
        closed = list(unreadable("--data", path))
        yield from closed or (f"--data={path}: {problem}" for problem in _file_problems(path, row))


def data_index_folder(folder: Path, data: Path) -> str:
    """Where Bridge may keep its index of the data's lines: a folder for these sizes and times of change of the files.

    Bridge's own place is beside the data, and there it would use the index of an older file with the same name.

    Args:
        folder: the run's folder.
        data: the folder of the data.
    """
    found = [path.stat() for path in (data / name for name in _FILES) if path.exists()]
    return str(folder / "data_index" / "_".join(f"{one.st_size}-{one.st_mtime_ns}" for one in found))


@dataclass(frozen=True, kw_only=True)
class _Row(PromptExamples):
    """A row as Bridge reads it: both fields are texts. Rows with prompt and completion always work."""

    def check(self, example: Mapping[str, Any], counts: dict[str, int]) -> str | None:
        absent = [name for name in self.fields if name not in example]
        canonical = bool(absent) and example.keys() >= {"prompt", "completion"}
        if absent and not canonical:
            there, names = ", ".join(list(example)[:6]), " and ".join(f'"{name}"' for name in absent)
            columns = "dataset.preprocessing.prompt_column and completion_column"
            return f"has no {names}; its fields are {there or 'none'}; rename them, or set {columns}"
        for name in ("prompt", "completion") if canonical else self.fields:
            if type(example[name]) is not str:
                return f'"{name}" is {named(example[name])}: must be a text, in double quotes'
        return None if canonical else super().check(example, counts)


def _file_problems(path: Path, row: _Row) -> Iterator[str]:
    notes = known_notes(path, row)
    if notes is None:
        report = check_file(path, row)
        problems = [*report.problems(), *_unread_problems(path, report)]
        if problems:
            yield from (_in_bridges_words(problem, row) for problem in problems)
            return
        notes = list(report.notes())
        remember(path, row, notes)
    for note in notes:
        print(f"{path}: {note}", file=sys.stderr, flush=True)


def _unread_problems(path: Path, report: FileReport) -> Iterator[str]:
    """What NeMo's datasets read here and Bridge's do not. Bridge skips empty lines at the end of a file only."""
    if report.marked:
        yield "begins with a byte order mark, which Bridge cannot read; remove it: sed -i '1s/^\\xEF\\xBB\\xBF//' FILE"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        tail = file.read()
    if report.blank > max(0, len(tail) - len(tail.rstrip(b"\n")) - 1) and report.examples:
        yield f"has {report.blank:,} blank lines, which Bridge cannot read; remove them: sed -i '/^[[:space:]]*$/d' FILE"


def _in_bridges_words(problem: str, row: _Row) -> str:
    if problem.startswith(("holds OpenAI messages", "holds conversations", "holds ShareGPT")):
        fields = " and ".join(row.fields)
        return f"holds conversations, and this recipe trains on {fields}; ChatSFTPreprocessingConfig() in the recipe reads them"
    return problem
