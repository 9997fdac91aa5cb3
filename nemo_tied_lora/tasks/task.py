# SPDX-License-Identifier: Apache-2.0
"""What a task is: the section `task` of `configs/task/NAME.yaml`, checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nemo_tied_lora.errors import Problems, is_whole_number
from nemo_tied_lora.tasks.metrics import METRICS
from nemo_tied_lora.tasks.source_settings import SPLITS, Source
from nemo_tied_lora.tasks.templates import fields_of, template_problems

__all__ = ["Task"]

_SEPARATORS = (" ", "")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. Templates put fields of a record into a text; see `templates`."""

    name: str
    """Letters, digits, `_`, `-` and `.`."""
    family: str | None = None
    """What is asked for, in words, such as "translation"."""
    licence: str | None = None
    """Of the data."""
    weakness: str | None = None
    """What the data do not show."""
    folder: str
    """Where the prepared files go."""
    source: Source
    id: str | None = None
    """A field whose values differ. None: an id is made of the prompt and the answer."""
    prompt: str
    """A template."""
    separator: str = " "
    """What stands between prompt and answer: a blank, or nothing where the prompt ends with a line end."""
    answer: str | None = None
    """A template. None, for a choice task: the right ending."""
    references: str | None = None
    """What a generated text is compared with: a template, or a field with a list of texts. None: the answer."""
    marker: str | None = None
    """The final answer follows this text; references are cut to what follows its first occurrence. None: "####", uncut."""
    endings: str | tuple[str, ...] | None = None
    """A choice task: a field with a list of at least 2 texts, or the texts themselves, the same for every item. One of
    them is the answer."""
    label: str | None = None
    """A choice task: a field with the number of the right ending, from 0."""
    group: str | None = None
    """A field: results are also reported for each of its values."""
    metrics: tuple[str, ...] = ("answer_loss",)
    """Names of `metrics.METRICS`. The first is the primary one."""
    limits: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(SPLITS))
    """The largest number of items of each split. None: all."""
    max_new_tokens: int = 64
    """Tokens that are generated at most."""
    stop: tuple[str, ...] = ()
    """Texts at which generation ends. The end-of-text token ends it in any case."""
    max_seq_length: int = 512
    """Tokens of prompt and answer together, in training."""

    @classmethod
    def from_config(cls, section: object, key: str = "task") -> Task:
        """Reads the section `task` of a composed configuration.

        Raises:
            ConfigError: with all problems.
        """
        problems = Problems()
        if isinstance(section, Mapping) and "task" in section:
            problems.append(f"{key}.{key}: the task's YAML must begin with the line # @package _global_")
            problems.raise_if_any()
        known = [one.name for one in fields(cls) if one.name not in _GENERATION] + ["generation"]
        given = problems.known_keys(key, problems.section(key, section), known)
        values = {name: value for name, value in given.items() if value is not None}
        generation = problems.known_keys(
            f"{key}.generation", problems.section(f"{key}.generation", values.pop("generation", None)), _GENERATION
        )
        values |= {name: value for name, value in generation.items() if value is not None}
        problems += [
            *_required(key, given, values),
            *_texts(key, values),
            *_form_problems(key, values),
            *_metric_problems(key, values),
        ]
        values["source"] = problems.attempt(Source.from_config, values.get("source"), f"{key}.source")
        values["limits"] = _limits(f"{key}.limits", values.get("limits"), values["source"], problems)
        problems.whole_number(f"{key}.generation.max_new_tokens", values.get("max_new_tokens", 1))
        problems.whole_number(f"{key}.max_seq_length", values.get("max_seq_length", 2), least=2)
        if (separator := values.get("separator", " ")) not in _SEPARATORS:
            problems.append(f"{key}.separator={separator!r}: must be a blank, ' ', or nothing, ''")
        stop = values.get("stop", [])
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            problems.append(f"{key}.generation.stop={stop!r}: must be a list of texts that are not empty")
        problems.raise_if_any()
        if isinstance(values.get("endings"), list):
            values["endings"] = tuple(values["endings"])
        values |= {"stop": tuple(stop), "metrics": tuple(values.get("metrics", ("answer_loss",)))}
        return cls(**values)

    @property
    def is_choice(self) -> bool:
        """Whether one of several endings is right."""
        return self.endings is not None

    @property
    def needs(self) -> frozenset[str]:
        """What its metrics need: "generation", "endings", "loss"."""
        return frozenset(METRICS[name].needs for name in self.metrics)

    def settings(self) -> dict[str, Any]:
        """Everything that the prepared files depend on, as JSON values."""
        values = asdict(self)
        for name in ("folder", "family", "licence", "weakness", "metrics", "max_seq_length", *_GENERATION):
            values.pop(name)
        return values


_GENERATION = ("max_new_tokens", "stop")


def _required(key: str, given: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """The keys without a default.

    Args:
        given: with keys that are null too.
    """
    if "folder" not in given or not values.keys() & {"name", "prompt", "answer", "endings"}:
        # base is missing, or is named behind _self_ and so wins
        yield f"{key}: what all tasks share must come from base: the task's YAML needs defaults: [base, _self_]"
    for name, example in (("name", "my_task"), ("folder", "runs/tasks/my_task"), ("prompt", "'Question: {question}'")):
        if values.get(name) in (None, "") and (name in given or name != "folder"):
            yield f"{key}.{name}: missing; set it, as {key}.{name}={example}"
    if values.get("answer") is None and values.get("endings") is None:
        yield f"{key}.answer: missing; set it, as {key}.answer='{{answer}}', or set endings and label for a choice task"
    if values.get("metrics") in (None, []):
        yield f"{key}.metrics: missing; choose one or more of {', '.join(METRICS)}"


def _texts(key: str, values: Mapping[str, Any]) -> Iterator[str]:
    for name in (
        "name",
        "family",
        "licence",
        "weakness",
        "folder",
        "id",
        "label",
        "group",
        "references",
        "marker",
    ):
        if name in values and (not isinstance(values[name], str) or not values[name]):
            yield f"{key}.{name}={values[name]!r}: must be a text"
    if isinstance(values.get("name"), str) and not re.fullmatch(r"(?!\.)[\w.-]*", values["name"]):
        yield f"{key}.name={values['name']!r}: letters, digits and _ - . only, no . first: files are named after it"


def _form_problems(key: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Templates, and the keys of a choice task that belong together."""
    for name in ("prompt", "answer"):
        if values.get(name) not in (None, ""):
            yield from template_problems(f"{key}.{name}", values[name])
    choice = [name for name in ("endings", "label") if values.get(name) is not None]
    if len(choice) == 1:
        other = "label" if choice == ["endings"] else "endings"
        yield f"{key}.{other}: missing; {key}.{choice[0]} is set, and a choice task has both"
    if choice and values.get("answer") is not None:
        yield f"{key}.answer={values['answer']!r}: leave it out; in a choice task the right ending is the answer"
    yield from _ending_problems(f"{key}.endings", values.get("endings"))
    for name in ("id", "endings", "label", "group"):
        if isinstance(values.get(name), str) and fields_of(values[name]):
            yield f"{key}.{name}={values[name]!r}: must be a field's name, without braces"


def _ending_problems(key: str, endings: object) -> Iterator[str]:
    if isinstance(endings, list):
        texts = [one.strip() for one in endings if isinstance(one, str)]
        if len(texts) != len(endings) or not all(texts) or len(set(texts)) < max(2, len(endings)):
            yield f"{key}={endings!r}: must be at least 2 different texts, or the name of a field with a list; quote numbers"
    elif endings is not None and (not isinstance(endings, str) or not endings):
        yield f"{key}={endings!r}: must be the name of a field with a list, or a list of texts"


def _metric_problems(key: str, values: Mapping[str, Any]) -> Iterator[str]:
    metrics = values.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(name, str) for name in metrics):
        yield f"{key}.metrics={metrics!r}: must be a list of metrics; choose from {', '.join(METRICS)}"
        return
    for name in dict.fromkeys(metrics):
        need = METRICS[name].needs if name in METRICS else None
        if need is None:
            yield f"{key}.metrics: {name}: unknown; choose from {', '.join(METRICS)}"
        elif need == "endings" and values.get("endings") is None:
            others = ", ".join(one for one, its in METRICS.items() if its.needs != "endings")
            yield f"{key}.metrics: {name} compares endings, and the task has none; set endings and label, or choose from {others}"
        elif need == "generation" and values.get("endings") is not None:
            yield f"{key}.metrics: {name} compares generated texts, and a choice task generates none; use accuracy, answer_loss"
        elif need == "generation" and name != "maths_exact_match" and values.get("marker") is not None:
            what = f"compares the whole answer, but of references only what follows task.marker={values['marker']} is left"
            yield f"{key}.metrics: {name} {what}; use maths_exact_match, or set {key}.marker=null"
        if metrics.count(name) > 1:
            yield f"{key}.metrics: {name} is there {metrics.count(name)} times"


def _limits(key: str, value: object, source: Source | None, problems: Problems) -> dict[str, int | None]:
    limits = dict.fromkeys(SPLITS) | problems.known_keys(key, problems.section(key, value), SPLITS)
    for name, limit in limits.items():
        if limit is not None and not is_whole_number(limit):
            problems.append(f"{key}.{name}={limit!r}: must be a whole number of at least 1, or null for all items")
    for name in source.held_out if source is not None else ():
        if limits[name] is None:
            problems.append(
                f"{key}.{name}: missing; {name} items are held out of train, because the source has no such split; set how many"
            )
    return limits
