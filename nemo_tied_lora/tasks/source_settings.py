# SPDX-License-Identifier: Apache-2.0
"""Where a task's records come from: the section `task.source`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from nemo_tied_lora.errors import Problems

__all__ = ["SPLITS", "Source"]

SPLITS = ("train", "validation", "test")

_KINDS = {
    "files": "{train: train.jsonl, test: test.jsonl}, a JSONL file for each split",
    "packaged": "a file of this package",
    "builder": "a program of this package that makes the records",
    "hub": "the name of a data set on the Hugging Face hub, or a folder in its form",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Exactly one of files, packaged, builder and hub is set."""

    files: Mapping[str, tuple[str, ...]] | None = None
    """For each split, JSONL files. Names that end in .gz are gzip."""
    packaged: str | None = None
    """A JSONL file in `nemo_tied_lora/tasks/data`, whose records name their split."""
    builder: str | None = None
    """A module in `nemo_tied_lora/tasks/builders`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The builder's arguments."""
    folder: str | None = None
    """A folder that holds what the builder would make, NAME.jsonl.gz or NAME.jsonl. None: it is built."""
    hub: str | None = None
    """A data set's name on the hub, or a local folder in the same form."""
    config: str | None = None
    """The hub's configuration of the data set, such as a pair of languages."""
    revision: str | None = None
    """The hub's commit, branch or tag."""
    data_dir: str | None = None
    """A folder inside the data set."""
    splits: Mapping[str, Mapping[str, str] | str | None] = field(
        default_factory=lambda: {name: name for name in SPLITS}
    )
    """For each of our splits, the source's. A mapping of group to split makes groups; None: held out of train."""

    @classmethod
    def from_config(cls, section: object, key: str = "task.source") -> Source:
        """Reads the section.

        Raises:
            ConfigError: with all problems.
        """
        problems = Problems()
        given = problems.known_keys(key, problems.section(key, section), [one.name for one in fields(cls)])
        values = {name: value for name, value in given.items() if value is not None}
        if isinstance(files := values.get("files"), Mapping) and not any(files.values()):
            del values["files"]  # the shared YAML lists the splits without files
        chosen = [name for name in _KINDS if name in values]
        if len(chosen) != 1:
            found = f"{' and '.join(chosen)} are set; set one" if chosen else "names no source; set one"
            problems.append(f"{key}: {found} of {'; '.join(f'{name}: {what}' for name, what in _KINDS.items())}")
        for name in ("packaged", "builder", "folder", "hub", "config", "revision", "data_dir"):
            if name in values and (not isinstance(values[name], str) or not values[name]):
                problems.append(f"{key}.{name}={values[name]!r}: must be a text")
        if "folder" in values and "builder" not in chosen:
            problems.append(f"{key}.folder={values['folder']}: only a builder's task reads it; leave it out")
        values["options"] = problems.section(f"{key}.options", values.get("options"))
        if "files" in chosen:
            values["files"] = _files(f"{key}.files", values["files"], problems)
        values["splits"] = _splits(f"{key}.splits", values.get("splits"), problems)
        if values.get("files"):
            of_files = {name: name if name in values["files"] else None for name in SPLITS}
            if values["splits"] not in ({name: name for name in SPLITS}, of_files):
                problems.append(
                    f"{key}.splits={given['splits']!r}: leave it out: with files, each file is a split; for a split "
                    "that is held out of train, leave its file out; for groups, set task.group to a field"
                )
            values["splits"] = of_files
        problems.raise_if_any()
        return cls(**values)

    @property
    def held_out(self) -> tuple[str, ...]:
        """The splits that are taken out of train."""
        return tuple(name for name in SPLITS if self.splits.get(name) is None)


def _files(key: str, value: object, problems: Problems) -> dict[str, tuple[str, ...]]:
    section = problems.known_keys(key, problems.section(key, value), SPLITS)
    found = {}
    for name, files in section.items():
        if files is None:
            continue
        names = [files] if isinstance(files, str) else files
        if not isinstance(names, list) or not names or not all(isinstance(one, str) and one for one in names):
            problems.append(f"{key}.{name}={files!r}: must be a JSONL file, or a list of them")
        else:
            found[name] = tuple(names)
    problems += [f"{key}.{name}: missing; name a JSONL file" for name in ("train", "test") if not section.get(name)]
    return found


def _splits(key: str, value: object, problems: Problems) -> dict[str, Any]:
    section = {name: name for name in SPLITS} | problems.known_keys(key, problems.section(key, value), SPLITS)
    named = [one for split in section.values() for one in (split.values() if isinstance(split, Mapping) else [split])]
    for one in sorted({str(one) for one in named if one is not None and named.count(one) > 1}):
        problems.append(f"{key}: {one} is there twice; an item belongs to one split")
    for name, split in section.items():
        if split is None and name == "train":
            problems.append(f"{key}.train=null: must name the source's split to train on")
        groups = list(split.values()) if isinstance(split, Mapping) else [split]
        if split is not None and not (groups and all(isinstance(one, str) and one for one in groups)):
            problems.append(
                f"{key}.{name}={split!r}: must be a split of the source, or group: split for several groups"
            )
    return section
