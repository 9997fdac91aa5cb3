# SPDX-License-Identifier: Apache-2.0
"""Chooses the items of each split: without what two splits share, and within the task's limits.

A choice depends on the items' ids alone, so that it is the same on every machine, whatever the order of the records.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.progress import Progress
from nemo_tied_lora.tasks.items import Item, item_of
from nemo_tied_lora.tasks.source_settings import SPLITS
from nemo_tied_lora.tasks.sources import Reader
from nemo_tied_lora.tasks.task import Task
from nemo_tied_lora.tasks.templates import FieldError

__all__ = ["Selection", "chosen", "select"]

_MOST_LISTED = 20


@dataclass
class Selection:
    """The items of each split, and what was left out of it."""

    items: dict[str, list[Item]]
    left_out: Counter[str] = field(default_factory=Counter)
    """Split to the number of its items whose prompt a later split has too."""
    repeated: Counter[str] = field(default_factory=Counter)
    """Split to the number of its items that are there more than once."""

    @property
    def notes(self) -> Iterator[str]:
        """One line for each thing that the user should know."""
        for split, count in self.left_out.items():
            later = " or ".join(SPLITS[SPLITS.index(split) + 1 :])
            yield f"{count:,} {split} items have a prompt that is in {later} too; they are left out of {split}"
        for split, count in self.repeated.items():
            yield f"{count:,} {split} items repeat another one, prompt and answer; they are left out"

    def groups(self, split: str) -> dict[str, int]:
        """The number of items of each group."""
        found = Counter(item.group for item in self.items[split] if item.group is not None)
        return {str(group): count for group, count in sorted(found.items())}


def select(task: Task, reader: Reader) -> Selection:
    """Reads the source and chooses the items of each split.

    Raises:
        ConfigError: with all problems of the records, or the splits without an item.
    """
    found = Selection(_read(task, reader))
    _keep_once(found)
    taken: set[str] = set()
    for split in task.source.held_out:
        found.items[split] = chosen(found.items["train"], int(task.limits[split] or 0))
        taken = {item.id for item in found.items[split]}
        found.items["train"] = [item for item in found.items["train"] if item.id not in taken]
    _keep_apart(found)
    problems = Problems()
    for split in SPLITS:
        limit = task.limits[split]
        found.items[split] = found.items[split] if limit is None else chosen(found.items[split], limit)
        if not found.items[split]:
            problems.append(_empty(task, split, found.left_out[split], bool(taken)))
    problems.raise_if_any()
    return found


def chosen(items: list[Item], count: int) -> list[Item]:
    """At most `count` of the items, in their order: those whose ids have the lowest checksums."""
    if len(items) <= count:
        return items
    kept = {item.id for item in sorted(items, key=lambda one: hashlib.sha256(one.id.encode()).digest())[:count]}
    return [item for item in items if item.id in kept]


def _read(task: Task, reader: Reader) -> dict[str, list[Item]]:
    """All items of each split that the source has. Identical ids of different items are a problem."""
    wanted = {source: (split, group) for split, source, group in _splits(task)}
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    wrong: dict[str, list[str]] = {}
    places: dict[tuple[str, str], tuple[str, Item]] = {}
    with Progress(desc=f"task {task.name}", unit="records") as bar:
        for source, place, record in reader.records(list(wanted)):
            bar.update()
            split, group = wanted[source]
            try:
                if isinstance(record, str):
                    raise FieldError(record)
                item = item_of(task, record, group)
                first, same = places.setdefault((split, item.id), (place, item))
                if same != item:
                    raise FieldError(_same_id(task, item, same, first))
            except FieldError as error:
                wrong.setdefault(str(error), []).append(place)
                continue
            items[split].append(item)
    _raise(task, wrong)
    return items


def _same_id(task: Task, item: Item, other: Item, place: str) -> str:
    """Why two different items of a split cannot have one id."""
    if task.id is not None:
        return f'"{task.id}" is {item.id!r}, as in {place}: ids must differ'
    differ = " and ".join(key for key in ("references", "label", "group") if getattr(item, key) != getattr(other, key))
    return (
        f"prompt and answer are those of {place}, but not the {differ}; leave one out, or set task.id to a field "
        "whose values differ"
    )


def _splits(task: Task) -> Iterator[tuple[str, str, str | None]]:
    """(our split, the source's, the group) for each split of the source."""
    for split, source in task.source.splits.items():
        if isinstance(source, Mapping):
            yield from ((split, str(name), str(group)) for group, name in source.items())
        elif source is not None:
            yield split, source, None


def _raise(task: Task, wrong: Mapping[str, list[str]]) -> None:
    problems = Problems()
    for text, places in wrong.items():
        more = f", and in the same way {len(places) - 1:,} more" if len(places) > 1 else ""
        problems.append(f"task {task.name}: {places[0]}{more}: {text}")
    if len(problems) > _MOST_LISTED:
        problems[_MOST_LISTED:] = [f"task {task.name}: and {len(problems) - _MOST_LISTED:,} more kinds of mistakes"]
    problems.raise_if_any()


def _keep_once(found: Selection) -> None:
    for split, items in found.items.items():
        once = list({replace(item, id=""): item for item in reversed(items)}.values())[::-1]
        if len(once) < len(items):
            found.repeated[split] = len(items) - len(once)
            found.items[split] = once


def _keep_apart(found: Selection) -> None:
    """Leaves out of train what validation or test has too, and out of validation what test has too: by the prompt."""
    for number, split in enumerate(SPLITS[:-1]):
        later = {item.input for other in SPLITS[number + 1 :] for item in found.items[other]}
        kept = [item for item in found.items[split] if item.input not in later]
        if len(kept) < len(found.items[split]):
            found.left_out[split] = len(found.items[split]) - len(kept)
            found.items[split] = kept


def _empty(task: Task, split: str, left_out: int, held_out: bool) -> str:
    why = f": all {left_out:,} have a prompt that another split has too" if left_out else ""
    remedy = "give it records"
    if split == "train" and held_out:
        limits = " or ".join(f"task.limits.{one}={task.limits[one]}" for one in task.source.held_out)
        remedy += f", or lower {limits}, which are held out of it"
    elif split == "validation" and split not in task.source.held_out:
        key = "task.source.files.validation" if task.source.files else "task.source.splits.validation"
        remedy += f", or hold some out of train: {key}=null task.limits.validation=100"
    return f"task {task.name}: no {split} item{why}; {remedy}"
