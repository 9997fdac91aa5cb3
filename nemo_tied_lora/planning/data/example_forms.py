# SPDX-License-Identifier: Apache-2.0
"""What one line of data must hold: fields of a prompt template, or one of NeMo's conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_tied_lora.planning.data.prompt_template import fill

__all__ = ["Conversations", "Form", "Number", "PromptExamples", "named", "read_example", "with_texts"]


class Number(str):
    """A number of a JSON file, as it is written there."""


class _Constant(str):
    """NaN, Infinity or -Infinity: Python writes them, but they are not JSON. They do no harm in a field that is not used."""


_EXACT = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=_Constant)


def read_example(line: str) -> Any:
    """Parses one line of a JSONL file. Numbers stay as they are written: 1e3 is a `Number`, the text "1e3".

    Raises:
        ValueError: the line is not JSON. `json.JSONDecodeError` has the place.
        RecursionError: it is nested too deeply.
    """
    return _EXACT.decode(line.strip().removeprefix("\ufeff"))


def with_texts(line: str, fields: Iterable[str]) -> dict[str, Any]:
    """Parses one line of a JSONL file that has been checked. In the named fields a number becomes its text."""
    example: dict[str, Any] = _PLAIN.decode(line.strip().removeprefix("\ufeff"))
    numbers = [name for name in fields if isinstance(example.get(name), (int, float))]
    if numbers:
        exact = read_example(line)
        example |= {name: str(exact[name]) for name in numbers}
    return example


def _whole_number(text: str) -> int | Number:
    try:
        return int(text)
    except ValueError:  # Python's limit of 4300 digits
        return Number(text)


_PLAIN = json.JSONDecoder(parse_int=_whole_number)


@dataclass(frozen=True, kw_only=True)
class PromptExamples:
    """Lines with the fields of a prompt template. Values are texts, or numbers, which are taken as their text."""

    template: str
    fields: tuple[str, ...]
    """The fields of the template, each once."""
    label: str | None = None
    """The field of the answer. None: the lines are prompts without answers."""
    label_is_optional: bool = False
    """Whether a line may lack the answer: it is answered, but not rated."""
    needs_prompt: bool = False
    """Whether answers are generated from the prompts, so that none may be empty."""

    def check(self, example: Mapping[str, Any], counts: dict[str, int]) -> str | None:
        """Returns what is wrong with an example. Counts what is done with it under the words of the note."""
        absent = [name for name in self.fields if name not in example and not self._may_lack(name)]
        if absent:
            names = ", ".join(f'"{name}"' for name in absent)
            return f"has no {names}, which prompt_template names{self._hint(absent, example)}"
        number = False
        for name in self.fields:
            value = example.get(name, "")
            if type(value) is str:
                continue
            if type(value) is not Number:
                return f'"{name}" is {named(value)}: must be a text or a number{_remedy(value)}'
            number = True
        if number:
            _count(counts, "with a number that is taken as its text")
        return self._check_emptiness(example, counts)

    def _check_emptiness(self, example: Mapping[str, Any], counts: dict[str, int]) -> str | None:
        if self.label is None:
            return None
        answer = str(example.get(self.label, "")).strip(" ")
        if answer and not self.needs_prompt:
            return None
        prompt = fill(self.template, {**dict.fromkeys(self.fields, ""), **example, self.label: ""}).strip(" ")
        if not answer and not prompt:
            return "has neither a prompt nor an answer; leave it out"
        if self.needs_prompt and not prompt:
            return "has an empty prompt, from which validation cannot generate; leave it out, or set metric.name=loss"
        if self.label not in example:
            _count(counts, f'without "{self.label}", which count as wrongly answered')
        elif not answer:
            _count(counts, "with an empty answer")
        return None

    def _may_lack(self, name: str) -> bool:
        return self.label_is_optional and name == self.label

    @staticmethod
    def _hint(absent: list[str], example: Mapping[str, Any]) -> str:
        if any(":" in name or "!" in name for name in absent):
            return "; formats such as {x:.2f} are not supported, write {x}"
        return (
            f"; its fields are {', '.join(list(example)[:6])}; change prompt_template or the line" if example else ""
        )


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """NeMo's conversations, as `GPTSFTChatDataset` reads them: system, conversations (from, value, label), mask, type."""

    def check(self, example: Mapping[str, Any], counts: dict[str, int]) -> str | None:
        """Returns what is wrong with an example."""
        if "conversations" not in example:
            return f'has no "conversations"{_fields(example)}; for prompts and answers, set model.data.chat=false'
        if type(example.get("system")) is not str:
            return _field("system", example, "must be a text; it may be empty")
        turns = example.get("conversations")
        if not isinstance(turns, list) or not turns:
            return _field("conversations", example, "must be a list of turns with from and value")
        for number, turn in enumerate(turns, 1):
            wrong = _turn_problem(turn)
            if wrong is not None:
                return f"turn {number}: {wrong}"
        if example.get("type") not in (None, "TEXT_TO_VALUE", "VALUE_TO_TEXT"):
            return f'"type" is {named(example["type"])}: must be TEXT_TO_VALUE, VALUE_TO_TEXT or null'
        return self._mask_problem(example, turns)

    @staticmethod
    def _mask_problem(example: Mapping[str, Any], turns: list[Mapping[str, Any]]) -> str | None:
        mask = example.get("mask", "User")
        if type(mask) is not str:
            return f'"mask" is {named(mask)}: must be the speaker that is not trained on'
        speakers = [turn["from"] for turn in turns]
        unknown = [name for name in mask.split(",") if name not in speakers]
        if unknown:
            there = ", ".join(dict.fromkeys(speakers))
            default = "" if "mask" in example else ', and a missing "mask" means User'
            return f'no turn is from {", ".join(unknown)}, whom "mask" names (its speakers: {there}{default})'
        if example.get("type") == "TEXT_TO_VALUE":
            first, left_out = 0, "the turns"
        else:
            first, left_out = 1, "the first turn and those"
        if all(speaker in mask for speaker in speakers[first:]):
            return f"has no turn to train on: NeMo leaves out {left_out} of the speakers in mask"
        return None


Form = PromptExamples | Conversations


def _turn_problem(turn: Any) -> str | None:
    if not isinstance(turn, Mapping):
        return f"is {named(turn)}: must be an object with from and value"
    for name in ("from", "value"):
        if type(turn.get(name)) is not str:
            return _field(name, turn, "must be a text")
    if type(turn.get("label")) not in (str, type(None)):
        return f'"label" is {named(turn["label"])}: must be a text or null'
    return None


def _fields(example: Mapping[str, Any]) -> str:
    return f"; its fields are {', '.join(list(example)[:6])}" if example else ""


def _field(name: str, example: Mapping[str, Any], need: str) -> str:
    found = f'"{name}" is {named(example[name])}' if name in example else f'has no "{name}"'
    return f"{found}: {need}"


def _count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


def _remedy(value: object) -> str:
    if value is None:
        return '; write "" for an empty text, or leave the line out'
    return f'; write "{json.dumps(value)}"' if isinstance(value, bool) else ""


def named(value: object) -> str:
    """A value in a message: its kind, or itself if it is short."""
    if isinstance(value, Number):
        return f"the number {value[:20]}"
    if value is None or isinstance(value, bool):
        return str(json.dumps(value))
    if isinstance(value, _Constant):
        return str(value)
    if isinstance(value, str):
        return repr(value[:20])
    return "a list" if isinstance(value, list) else "an object"
