# SPDX-License-Identifier: Apache-2.0
"""Keeps predictions on disk as they come, so that a killed evaluation continues where it stopped.

An output folder belongs to one base, one task and one set of settings; `evaluation.json` in it names them. Each adapter
has a file `NAME.jsonl` with a line for each item, in the order of the test set. Until all items are there, the lines are
in `NAME.part.jsonl`, in the order in which they came.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import write_atomically, write_json
from nemo_tied_lora.planning.composing.dotted_keys import flat

__all__ = ["SETTINGS_FILE", "Predictions", "alone_in", "check_settings", "write_settings"]

SETTINGS_FILE = "evaluation.json"


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Compares what a folder's predictions were made with.

    Raises:
        ConfigError: the folder belongs to an evaluation of another base, task or settings, or is no folder for this.
    """
    try:
        known = json.loads((folder / SETTINGS_FILE).read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        problem = f"output={folder}: its {SETTINGS_FILE} cannot be read: {error}; name another folder, or delete it"
        raise ConfigError([problem]) from None
    before, now = (flat(json.loads(json.dumps(one))) for one in (known, settings))
    differ = [
        f"{key} {before.get(key)}, here {now.get(key)}"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key)
    ]
    if differ:
        what = f"output={folder}: holds an evaluation with other settings ({'; '.join(differ)})"
        raise ConfigError([f"{what}; name another folder, or delete it"])


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder that of this evaluation, if it is not yet.

    Raises:
        ConfigError: as `check_settings`.
        OSError: it cannot be written.
    """
    check_settings(folder, settings)
    if not (folder / SETTINGS_FILE).exists():
        write_json(folder / SETTINGS_FILE, settings)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other evaluations out of the folder. On a file system without locks it does not.

    Raises:
        ConfigError: another evaluation writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"output={folder}: another evaluation writes there now; wait for it, or name another folder"
            raise ConfigError([problem]) from None
        except OSError:
            pass  # a file system without locks
        yield


class Predictions:
    """One adapter's predictions for a list of items.

    Args:
        folder: the output folder.
        name: the file's, without an ending.
        items: lines of the test set.
        needs: the keys that every item's prediction must have.
    """

    def __init__(self, folder: Path, name: str, items: Sequence[Mapping[str, Any]], needs: Iterable[str]) -> None:
        self.path, self._part = folder / f"{name}.jsonl", folder / f"{name}.part.jsonl"
        self._items, self._needs = items, tuple(needs)
        self._found: list[dict[str, Any]] = [{} for _ in items]
        self._file: IO[bytes] | None = None
        self._read()

    @property
    def finished(self) -> bool:
        """Whether the file is complete."""
        return self.path.exists()

    def missing(self, key: str) -> list[int]:
        """The numbers of the items whose prediction lacks a key."""
        return [number for number, found in enumerate(self._found) if key not in found]

    def add(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Adds values to predictions by the item's number, and appends them to the file.

        Raises:
            OSError: the file cannot be written.
        """
        if self._file is None:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("ab")
        lines = [{"item": number, **values} for number, values in predictions.items()]
        self._file.write(b"".join(_line(line) for line in lines))
        self._file.flush()
        for number, values in predictions.items():
            self._found[number].update(values)

    def finish(self) -> list[dict[str, Any]]:
        """Writes the whole file if every item is there. Returns the predictions in the order of the items.

        Raises:
            OSError: the file cannot be written.
        """
        lacking = [key for key in self._needs if self.missing(key)]
        if lacking:
            raise ValueError(f"{self.path}: items without {', '.join(lacking)}")
        if not self.finished:
            lines = [
                {"id": item["id"], **({"group": item["group"]} if "group" in item else {}), **found}
                | {"references": item["references"]}
                for item, found in zip(self._items, self._found, strict=True)
            ]
            write_atomically(self.path, b"".join(map(_line, lines)))
        self.close()
        self._part.unlink(missing_ok=True)
        return self._found

    def close(self) -> None:
        """Closes the file; what was added is kept."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> None:
        """Reads the finished file, or what there is of an unfinished one."""
        if self.finished:
            self._found = self._read_finished()
            return
        if self._part.exists():
            for line in _whole_lines(self._part):
                number = line.pop("item")
                if 0 <= number < len(self._items):
                    self._found[number].update(line)

    def _read_finished(self) -> list[dict[str, Any]]:
        try:
            lines = [json.loads(line) for line in self.path.read_bytes().splitlines()]
            if [line["id"] for line in lines] == [item["id"] for item in self._items]:
                return [{key: line[key] for key in self._needs} for line in lines]
        except (ValueError, KeyError, TypeError):
            pass  # another program's file, or a damaged one
        problem = f"{self.path}: does not hold the predictions of this test set; delete it, or name another output"
        raise ConfigError([problem])


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file up to the first that is not whole; the rest is cut off, so that lines can be appended."""
    content = path.read_bytes()
    lines: list[dict[str, Any]] = []
    end = 0
    for line in content.splitlines(keepends=True):
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(value, dict) or not isinstance(value.get("item"), int):
            break
        lines.append(value)
        end += len(line)
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return lines


def _line(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False) + "\n").encode()
