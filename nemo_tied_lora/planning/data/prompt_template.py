# SPDX-License-Identifier: Apache-2.0
"""A prompt template such as "Question: {question} Answer: {answer}": its fields, its mistakes, and prompts made with it.

The rules are those of NeMo 2.4's `GPTSFTDataset`. A name in braces is a field of a line of data, whole: `{a.b}` is the
field "a.b". The label's field comes last. Escapes such as a backslash and n are replaced by the character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["fill", "template_fields", "template_problems", "training_template_problems", "unescaped"]

_FIELD = re.compile(r"{([^{}\n]+)}")


def unescaped(template: str) -> str:
    r"""Replaces escapes such as `\n`, which a shell passes on as two characters.

    NeMo decodes the UTF-8 bytes instead, which turns "ö" into "Ã¶". For a template in ASCII the result is the same.

    Raises:
        UnicodeDecodeError: an escape is incomplete.
    """
    return template.encode("latin-1", "backslashreplace").decode("unicode_escape")


def template_fields(template: str) -> list[str]:
    """Returns the names in braces, in order. A name that comes twice is listed twice."""
    return _FIELD.findall(_unescaped_if_possible(template))


def fill(template: str, example: Mapping[str, Any]) -> str:
    """Returns the template with each field's value in its place.

    Raises:
        KeyError: the example lacks a field.
    """
    return _FIELD.sub(lambda name: str(example[name[1]]), unescaped(template))


def template_problems(key: str, template: object) -> Iterator[str]:
    """Yields what is wrong with a template, whether it makes prompts or training examples."""
    if not isinstance(template, str):
        yield f"{key}={template!r}: must be a text with fields in braces, such as '{{input}}'"
        return
    try:
        text = unescaped(template)
    except UnicodeDecodeError as error:
        yield f"{key}={template!r}: a backslash begins an incomplete escape ({error.reason}); double it"
        return
    left = _FIELD.sub("", text)
    if "{" in left or "}" in left:
        yield f"{key}={template!r}: a brace without a field; write each field as {{name}}, and no other braces"
    elif not _FIELD.search(text):
        yield f"{key}={template!r}: names no field of the data; write fields in braces, such as {{input}}"
    elif _is_surrogate(text):
        yield f"{key}={template!r}: holds half of a surrogate pair, which is not valid Unicode"


def training_template_problems(key: str, section: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with `prompt_template`, `label_key` and `truncation_field` of a section.

    Args:
        key: the section's key, such as "model.data.train_ds".
    """
    template, label = section.get("prompt_template"), str(section.get("label_key"))
    wrong = list(template_problems(f"{key}.prompt_template", template))
    yield from wrong
    if wrong or not isinstance(template, str):
        return
    fields = template_fields(template)
    if not unescaped(template).endswith(f"{{{label}}}"):
        last = f"; or write label_key={fields[-1]}" if template.endswith(f"{{{fields[-1]}}}") else ""
        yield (
            f"{key}.prompt_template={template!r}: must end in {{{label}}}, because label_key={label} is the answer{last}"
        )
    elif fields.count(label) > 1:
        yield f"{key}.prompt_template={template!r}: holds the answer {{{label}}} more than once"
    yield from _truncation_field_problems(f"{key}.truncation_field", section.get("truncation_field", "text"), fields)


def _truncation_field_problems(key: str, value: object, fields: list[str]) -> Iterator[str]:
    if value is None:
        return
    names = str(value).split(",")
    if fields[0] == "input" and names[0] == "context":  # NeMo's own rule for its older checkpoints
        names[0] = "input"
    choices = f"choose from {', '.join(dict.fromkeys(fields))}, joined by commas without blanks, or null"
    unknown = [name for name in names if name not in fields]
    if not isinstance(value, str) or unknown:
        yield f"{key}={value!r}: {', '.join(unknown)} is not a field of prompt_template; {choices}"
    elif len(set(names)) < len(names) or any(fields.count(name) > 1 for name in names):
        yield f"{key}={value!r}: a field comes twice, here or in prompt_template, which NeMo cannot truncate; {choices}"


def _unescaped_if_possible(template: str) -> str:
    try:
        return unescaped(template)
    except UnicodeDecodeError:
        return template


def _is_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
