# SPDX-License-Identifier: Apache-2.0
"""Makes items of a task's records: prompt, answer, references, endings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nemo_tied_lora.tasks.task import Task
from nemo_tied_lora.tasks.templates import FieldError, filled, look_up, text_of, whole_number

__all__ = ["Item", "item_of"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt with its answer. `output` and `endings` begin with the task's separator."""

    id: str
    input: str
    output: str
    references: tuple[str, ...]
    endings: tuple[str, ...] | None = None
    label: int | None = None
    group: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The line of the prepared file. What an item does not have is left out."""
        values: dict[str, Any] = {
            "id": self.id,
            "input": self.input,
            "output": self.output,
            "references": list(self.references),
        }
        if self.endings is not None:
            values |= {"endings": list(self.endings), "label": self.label}
        return values if self.group is None else {**values, "group": self.group}


def item_of(task: Task, record: Mapping[str, Any], group: str | None = None) -> Item:
    """Makes the item of one record.

    NeMo removes blanks at both ends of prompt and answer, so they are removed here too: what is evaluated is what was
    trained.

    Args:
        group: the item's group, where the source's splits decide it.

    Raises:
        FieldError: a field is missing or has the wrong kind.
    """
    with _named("prompt"):
        prompt = filled(task.prompt, record).strip(" ")
        if not prompt:
            raise FieldError("makes an empty prompt")
    endings, label = _choice(task, record)
    if endings is not None and label is not None:
        answer = endings[label]
    else:
        with _named("answer"):
            answer = filled(str(task.answer), record).strip()
            if not answer:
                raise FieldError("makes an empty answer")
    if task.group is not None:
        with _named("group"):
            group = text_of(look_up(record, task.group), task.group)
    output = task.separator + answer
    references = _references(task, record, answer)
    _check_unicode(prompt, output, *(endings or ()), *references, group or "")
    return Item(
        id=_id(task, record, prompt, output, *(endings or ())),
        input=prompt,
        output=output,
        references=references,
        endings=None if endings is None else tuple(task.separator + ending for ending in endings),
        label=label,
        group=group,
    )


def _choice(task: Task, record: Mapping[str, Any]) -> tuple[list[str] | None, int | None]:
    if task.endings is None or task.label is None:
        return None, None
    with _named("endings"):
        texts = _listed(record, task.endings) if isinstance(task.endings, str) else [e.strip() for e in task.endings]
    with _named("label"):
        value = look_up(record, task.label)
        label = whole_number(value)
        if label is None or not 0 <= label < len(texts):
            raise FieldError(
                f'"{task.label}" is {str(value)[:20]!r}: must be a whole number from 0 to {len(texts) - 1}'
            )
    return texts, label


def _listed(record: Mapping[str, Any], field: str) -> list[str]:
    """The texts of a record's field with a list."""
    endings = look_up(record, field)
    if not isinstance(endings, (list, tuple)) or len(endings) < 2:
        raise FieldError(f'"{field}" must be a list of at least 2 texts')
    texts = [text_of(ending, f"{field}.{number}").strip() for number, ending in enumerate(endings)]
    if not all(texts):
        raise FieldError(f'"{field}" holds an empty text')
    return texts


def _references(task: Task, record: Mapping[str, Any], answer: str) -> tuple[str, ...]:
    with _named("references"):
        if task.references is None:
            found = [answer]
        elif "{" in task.references:
            found = [filled(task.references, record)]
        else:
            value = look_up(record, task.references)
            found = [text_of(one, task.references) for one in (value if isinstance(value, (list, tuple)) else [value])]
        if task.marker is not None:
            found = [after if marked else text for text in found for _, marked, after in [text.partition(task.marker)]]
        references = tuple(dict.fromkeys(text.strip() for text in found if text.strip()))
        if not references:
            raise FieldError("makes no reference" + (f": nothing comes after {task.marker!r}" if task.marker else ""))
        return references


def _id(task: Task, record: Mapping[str, Any], *texts: str) -> str:
    if task.id is not None:
        with _named("id"):
            found = text_of(look_up(record, task.id), task.id)
            _check_unicode(found)
            return found
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Puts the key of the task in front of what is wrong."""
    try:
        yield
    except FieldError as error:
        raise FieldError(f"task.{key}: {error}") from None


def _check_unicode(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise FieldError("holds half of a surrogate pair, which is not valid Unicode") from None
