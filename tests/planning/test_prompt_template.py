# SPDX-License-Identifier: Apache-2.0
"""Templates mean what they mean in NeMo, and mistakes in them are named. Pure Python."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_tied_lora.planning.data.prompt_template import (
    fill,
    template_fields,
    template_problems,
    training_template_problems,
    unescaped,
)

RIGHT = {"prompt_template": "{input} {output}", "label_key": "output", "truncation_field": "input"}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no template": ({"prompt_template": None}, "prompt_template=None: must be a text"),
    "an open brace": ({"prompt_template": "{input {output}"}, "a brace without a field"),
    "empty braces": ({"prompt_template": "{} {output}"}, "a brace without a field"),
    "double braces": ({"prompt_template": "{{input}} {output}"}, "a brace without a field"),
    "no field": ({"prompt_template": "hello"}, "names no field"),
    "a backslash at the end": ({"prompt_template": "{input} {output}\\"}, "incomplete escape"),
    "text after the answer": ({"prompt_template": "{input} {output}."}, "must end in {output}"),
    "another label": (
        {"label_key": "answer"},
        "must end in {answer}, because label_key=answer is the answer; or write",
    ),
    "the answer twice": ({"prompt_template": "{output} {input} {output}"}, "more than once"),
    "an unknown truncation field": ({"truncation_field": "question"}, "choose from input, output"),
    "a blank in truncation_field": ({"truncation_field": "input, output"}, " output is not a field"),
    "a truncation field twice": ({"truncation_field": "input,input"}, "a field comes twice"),
    "a field twice that is truncated": ({"prompt_template": "{input} {input} {output}"}, "a field comes twice"),
    "a list in truncation_field": ({"truncation_field": ["input"]}, "joined by commas"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_a_section_is_named(name: str) -> None:
    changed, says = WRONG[name]
    problems = list(training_template_problems("model.data.train_ds", {**RIGHT, **changed}))
    assert len(problems) == 1
    assert problems[0].startswith("model.data.train_ds.")
    assert says in problems[0]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"truncation_field": None},
        {"truncation_field": "input,output"},
        {"truncation_field": "context"},  # NeMo's own word of older checkpoints for input
        {"prompt_template": "Größe: {a.b} {my field}\\n\\n答: {output}", "truncation_field": "a.b"},
        {"prompt_template": "{q}{answer}", "label_key": "answer", "truncation_field": "q"},
    ],
    ids=["plain", "no truncation", "two fields", "context", "names with dots and blanks", "another label"],
)
def test_what_nemo_accepts_is_accepted(changed: dict) -> None:
    assert list(training_template_problems("", {**RIGHT, **changed})) == []


def test_escapes_are_replaced_and_other_characters_stay() -> None:
    assert unescaped("Größe:\\n\\t答 \\u00e9 😀") == "Größe:\n\t答 é 😀"
    assert unescaped("plain: {x}\\n") == b"plain: {x}\\n".decode("unicode_escape")


def test_a_name_in_braces_is_the_whole_field() -> None:
    template = "Q: {a.b}\\nA: {0}"
    assert template_fields(template) == ["a.b", "0"]
    assert fill(template, {"a.b": "{x}", "0": "y"}) == "Q: {x}\nA: y"
    assert list(template_problems("prompt_template", template)) == []
