# SPDX-License-Identifier: Apache-2.0
"""The source of a task that a program of this package builds: once, into the user's cache, or found in a folder."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.files import write_atomically
from nemo_tied_lora.tasks.builders import debian_descriptions, gsm_symbolic, home_assistant, wesnoth, wordnet_senses
from nemo_tied_lora.tasks.locked import alone
from nemo_tied_lora.tasks.sources import Found, Reader, SplitFile
from nemo_tied_lora.tasks.task import Task

__all__ = ["BUILDERS", "Built", "in_folder"]

_VERSION = 1
"""Raise it when a builder makes other records of the same source."""

BUILDERS = {
    "debian_descriptions": debian_descriptions,
    "gsm_symbolic": gsm_symbolic,
    "home_assistant": home_assistant,
    "wesnoth": wesnoth,
    "wordnet_senses": wordnet_senses,
}
"""Name to module. Each has OPTIONS, `option_problems` and `build`."""


def in_folder(task: Task) -> SplitFile:
    """Reads NAME.jsonl.gz or NAME.jsonl in the folder that the user names.

    Raises:
        ConfigError: there is no such file.
    """
    folder = Path(str(task.source.folder))
    places = [folder / f"{task.name}{ending}" for ending in (".jsonl.gz", ".jsonl")]
    there = next((place for place in places if place.is_file()), None)
    if there is None:
        raise ConfigError([f"task.source.folder={folder}: holds neither {places[0].name} nor {places[1].name}"])
    return SplitFile(there, "task.source.folder")


class Built(Reader):
    """What a builder makes. It is kept in `$XDG_CACHE_HOME/tied-lora` or `~/.cache/tied-lora`."""

    def __init__(self, task: Task) -> None:
        source, problems = task.source, Problems()
        self._task, self._name = task.name, str(source.builder)
        problems.one_of("task.source.builder", source.builder, BUILDERS)
        problems.raise_if_any()
        key, names = "task.source.options", BUILDERS[self._name].OPTIONS
        self._options = dict.fromkeys(names) | problems.known_keys(key, source.options, names)
        problems.raise_if_any()
        problems += BUILDERS[self._name].option_problems(key, self._options)
        problems.raise_if_any()
        self._origin: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        return {"builder": self._name, "version": _VERSION, "options": self._options}

    def origin(self) -> dict[str, Any]:
        return self._origin

    def records(self, splits: Collection[str]) -> Iterator[Found]:
        path = self._place()
        if not path.is_file():
            self._make(path)
        reader = SplitFile(path, f"task.source.builder={self._name}")
        self._origin = json.loads(path.with_suffix(".origin").read_bytes())
        yield from reader.records(splits)

    def _place(self) -> Path:
        key = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]
        try:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:
            raise ConfigError(["XDG_CACHE_HOME: not set, and there is no home; name a folder for downloads"]) from None
        return Path(cache) / "tied-lora" / f"{self._name}-{key}.jsonl.gz"

    def _make(self, path: Path) -> None:
        """Builds the file, unless another process has just done it."""
        try:
            with alone(path.with_suffix(".lock")):
                if not path.is_file():
                    print(f"task {self._task}: building its data with {self._name}, once", file=sys.stderr, flush=True)
                    self._build(path)
        except OSError as error:
            problem = (
                f"{path.parent}: cannot be written: {error.strerror or error}; set XDG_CACHE_HOME to another folder"
            )
            raise ConfigError([problem]) from None
        except ConfigError as error:
            remedy = f"or build elsewhere, and name the folder with {self._task}.jsonl.gz: task.source.folder=FOLDER"
            raise ConfigError(
                [f"task.source.builder={self._name}: {line}; {remedy}" for line in error.problems]
            ) from None

    def _build(self, path: Path) -> None:
        """What the file was made of is written first, so that it is never missing."""
        folder = path.with_suffix(".building")
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        try:
            records, origin = BUILDERS[self._name].build(self._options, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(path.with_suffix(".origin"), json.dumps(origin).encode())
        write_atomically(path, gzip.compress(lines.encode(), mtime=0))
