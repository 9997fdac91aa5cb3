# SPDX-License-Identifier: Apache-2.0
"""Writes a task's items as train.jsonl, validation.jsonl and test.jsonl, and task.json beside them.

The files are made once. While the settings and the source stay the same, they are used again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import write_atomically, write_json
from nemo_tied_lora.tasks.items import Item
from nemo_tied_lora.tasks.locked import alone, in_use, use
from nemo_tied_lora.tasks.open_source import open_source
from nemo_tied_lora.tasks.selection import Selection, select
from nemo_tied_lora.tasks.source_settings import SPLITS
from nemo_tied_lora.tasks.task import Task

__all__ = ["Prepared", "prepare"]

_FORM = 1
"""Raise it when items are made differently, so that old files are not used."""
_RECORD = "task.json"


@dataclass(frozen=True)
class Prepared:
    """The files of a task."""

    folder: Path
    record: Mapping[str, Any]
    """task.json: name, licence, settings, source, and for each split its file's items, bytes and sha256."""

    @property
    def files(self) -> dict[str, Path]:
        """Each split's file."""
        return {split: self.folder / f"{split}.jsonl" for split in SPLITS}

    @property
    def counts(self) -> dict[str, int]:
        """The number of items of each split."""
        return {split: int(self.record["splits"][split]["items"]) for split in SPLITS}

    @property
    def checksum(self) -> str:
        """Differs if an item of any split differs."""
        parts = [self.record["splits"][split]["sha256"] for split in SPLITS]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def items(self, split: str) -> Iterator[dict[str, Any]]:
        """Reads the items of a split: `Item.as_json`."""
        with self.files[split].open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def prepare(task: Task, folder: Path | str | None = None) -> Prepared:
    """Makes the task's files in `folder`, by default the task's own, unless they are there. Says on stderr what it made.

    They stay as they are until this process ends: another one that needs them otherwise is refused.

    Raises:
        ConfigError: with all problems: records that do not fit the task, an empty split, no room on disk, a folder that
            cannot be written, or whose files another process uses.
    """
    folder = Path(task.folder if folder is None else folder)
    reader = open_source(task)
    made_of = json.loads(json.dumps({"form": _FORM, "task": task.settings(), "source": reader.identity()}))
    if (found := _used(folder, made_of)) is not None:
        return found  # the folder may be read-only
    with contextlib.ExitStack() as held:
        with _as_problem(folder):
            held.enter_context(alone(folder / ".lock"))
        if (found := _used(folder, made_of)) is not None:
            return found
        _refuse_others_files(folder)
        changed = _changed(folder, made_of)
        if in_use(folder) and changed:
            problem = f"another run uses its files, which were made with other settings ({changed})"
            raise ConfigError([f"task.folder={folder}: {problem}; wait for it, or name another folder"])
        if changed:
            print(
                f"task {task.name}: {changed} changed; makes the files in {folder} again", file=sys.stderr, flush=True
            )
        selection = select(task, reader)
        with _as_problem(folder):
            record = _written(task, folder, made_of, selection, reader.origin())
        use(folder)
    counts = ", ".join(f"{record['splits'][split]['items']:,} {split}" for split in SPLITS)
    print(f"task {task.name}: {counts} items in {folder}", file=sys.stderr, flush=True)
    for note in selection.notes:
        print(f"task {task.name}: {note}", file=sys.stderr, flush=True)
    return Prepared(folder, record)


@contextlib.contextmanager
def _as_problem(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"task.folder={folder}: cannot be written: {error.strerror or error}; name another folder"
        raise ConfigError([problem]) from None


def _used(folder: Path, made_of: Mapping[str, Any]) -> Prepared | None:
    """`_found`, and marked as used, so that no other process changes them."""
    if _found(folder, made_of) is None:
        return None
    use(folder)
    return _found(folder, made_of)  # again: they may have changed before the mark


def _found(folder: Path, made_of: Mapping[str, Any]) -> Prepared | None:
    """The files that are there, if they are whole and were made in the same way."""
    try:
        record = json.loads((folder / _RECORD).read_bytes())
        same = record["made_of"] == made_of and all(
            hashlib.sha256((folder / f"{split}.jsonl").read_bytes()).hexdigest() == record["splits"][split]["sha256"]
            for split in SPLITS
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Prepared(folder, record) if same else None


def _changed(folder: Path, made_of: Mapping[str, Any]) -> str:
    """What differs from the files that are there, in words. Empty: there are none, or they are damaged."""
    try:
        before = json.loads((folder / _RECORD).read_bytes())["made_of"]
        settings = [f"task.{key}" for key, value in made_of["task"].items() if before["task"].get(key) != value]
        return ", ".join(settings + ["the source's files"] * (before["source"] != made_of["source"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def _refuse_others_files(folder: Path) -> None:
    """Files that this command has not written are not replaced."""
    there = [f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").exists()]
    if there and not (folder / _RECORD).exists():
        raise ConfigError(
            [
                f"task.folder={folder}: holds {', '.join(there)} without a {_RECORD}, so another program's; name another folder"
            ]
        )


def _written(
    task: Task, folder: Path, made_of: Mapping[str, Any], selection: Selection, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the files, and the record last: without it they are made anew."""
    contents = {split: _lines(items) for split, items in selection.items.items()}
    record = {
        "name": task.name,
        "family": task.family,
        "licence": task.licence,
        "weakness": task.weakness,
        "splits": {
            split: {
                "items": len(selection.items[split]),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                **({"groups": groups} if (groups := selection.groups(split)) else {}),
            }
            for split, content in contents.items()
        },
        "left_out": dict(selection.left_out),
        "made_of": made_of,
        "origin": origin,
    }
    _check_room(folder, sum(map(len, contents.values())))
    (folder / _RECORD).unlink(missing_ok=True)
    for split, content in contents.items():
        write_atomically(folder / f"{split}.jsonl", content)
    write_json(folder / _RECORD, record)
    return record


def _lines(items: list[Item]) -> bytes:
    return b"".join((json.dumps(item.as_json(), ensure_ascii=False) + "\n").encode() for item in items)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        room = f"{needed:,} bytes are needed, and {free:,} are free"
        raise ConfigError([f"task.folder={folder}: no room on disk: {room}; name another folder"])
