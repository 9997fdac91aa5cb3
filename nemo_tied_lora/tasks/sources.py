# SPDX-License-Identifier: Apache-2.0
"""Reads the records of a task's source. Every kind of source yields the same: (split, place, record).

`place` says where a record is, for messages. In place of a record there may be a text, which says what is wrong there.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.data.data_files import unreadable
from nemo_tied_lora.planning.data.example_forms import read_example
from nemo_tied_lora.tasks.source_settings import Source

__all__ = ["Found", "JsonlFiles", "Packaged", "Reader", "SplitFile", "packaged_folder", "packaged_names"]

Found = tuple[str, str, "Mapping[str, Any] | str"]
"""(split, place, record or problem)."""


def packaged_folder() -> Path:
    """The folder with the data that this package holds."""
    return Path(__file__).with_name("data")


def packaged_names() -> list[str]:
    """The names of the packaged files."""
    return sorted(path.name for path in packaged_folder().glob("*.jsonl.gz"))


class Reader(ABC):
    """One kind of source."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the records depend on, as JSON values: prepared files are used again while it stays the same.

        Raises:
            ConfigError: the source cannot be there.
        """

    @abstractmethod
    def records(self, splits: Collection[str]) -> Iterator[Found]:
        """Yields the records of these splits, in an order that does not change.

        Raises:
            ConfigError: the source cannot be read, or has no such split.
        """

    def origin(self) -> dict[str, Any]:
        """What was found when the records were read, such as the versions of packages, as JSON values. For the record."""
        return {}


class JsonlFiles(Reader):
    """JSONL files of each split."""

    def __init__(self, source: Source) -> None:
        assert source.files is not None
        self._files = {split: [Path(name) for name in names] for split, names in source.files.items()}

    def identity(self) -> dict[str, Any]:
        problems = Problems()
        for split, paths in self._files.items():
            for path in paths:
                problems += unreadable(f"task.source.files.{split}", path)
        problems.raise_if_any()
        return {split: [stamp(path) for path in paths] for split, paths in self._files.items()}

    def records(self, splits: Collection[str]) -> Iterator[Found]:
        for split in splits:
            for path in self._files[split]:
                for place, record in jsonl(path):
                    yield split, place, record


class SplitFile(Reader):
    """One JSONL file, whose records name their split in the field "split"."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key

    def identity(self) -> dict[str, Any]:
        problems = Problems(unreadable(self._key, self._path))
        problems.raise_if_any()
        return stamp(self._path)

    def records(self, splits: Collection[str]) -> Iterator[Found]:
        seen: dict[str, None] = {}
        for place, record in jsonl(self._path):
            if isinstance(record, str):
                yield next(iter(splits)), place, record
                continue
            split = str(record.get("split"))
            seen[split] = None
            if split in splits:
                yield split, place, record
        missing = [split for split in splits if split not in seen]
        if missing:
            raise ConfigError(
                [
                    f"{self._key}: {self._path} has no split {', '.join(missing)}; its splits are {', '.join(seen) or 'none'}"
                ]
            )


class Packaged(SplitFile):
    """A file of this package."""

    def __init__(self, source: Source) -> None:
        assert source.packaged is not None
        names = packaged_names()
        if source.packaged not in names:
            problem = f"task.source.packaged={source.packaged}: no such file; choose from {', '.join(names)}"
            raise ConfigError([problem])
        super().__init__(packaged_folder() / source.packaged, "task.source.packaged")

    def identity(self) -> dict[str, Any]:
        """An installation's times and paths mean nothing: the content counts."""
        return {"file": self._path.name, "sha256": hashlib.sha256(self._path.read_bytes()).hexdigest()}


def stamp(path: Path) -> dict[str, Any]:
    """A file's path, size and time of change."""
    found = path.stat()
    return {"file": str(path), "bytes": found.st_size, "changed_ns": found.st_mtime_ns}


def jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Yields (place, record or problem) for each line of a JSONL file that is not blank.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}: line {number}", _record(line)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError([f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _record(line: bytes) -> Mapping[str, Any] | str:
    try:
        record = read_example(line.decode())
    except UnicodeDecodeError:
        return "is not UTF-8"
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at character {error.pos + 1}"
    except RecursionError:
        return "is nested too deeply"
    return record if isinstance(record, Mapping) else "is not a JSON object"
