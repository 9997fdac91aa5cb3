# SPDX-License-Identifier: Apache-2.0
"""Templates such as "{question}": fields of a record, nested ones too, put into a text.

A name in braces is a field. Dots lead into an object, numbers into a list: `{translation.en}`, `{answers.text.0}`. A
field whose own name holds dots is found first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_tied_lora.planning.data.example_forms import Number

__all__ = ["FieldError", "fields_of", "filled", "look_up", "template_problems", "text_of", "whole_number"]

_FIELD = re.compile(r"{([^{}\n]+)}")


class FieldError(ValueError):
    """A record lacks a field, or its value has the wrong kind. The message begins with what is wrong."""


def fields_of(template: str) -> list[str]:
    """The names in braces, in order."""
    return _FIELD.findall(template)


def template_problems(key: str, template: object) -> Iterator[str]:
    """Yields what is wrong with a template."""
    if not isinstance(template, str):
        yield f"{key}={template!r}: must be a text with fields of the records in braces, such as '{{question}}'"
    elif "{" in (left := _FIELD.sub("", template)) or "}" in left:
        yield f"{key}={template!r}: a brace without a field; write each field as {{name}}, and no other braces"
    elif not _FIELD.search(template):
        yield f"{key}={template!r}: names no field of the records; write fields in braces, such as {{question}}"


def filled(template: str, record: Mapping[str, Any]) -> str:
    """The template with each field's text in its place.

    Raises:
        FieldError: a field is missing, or is not a text or a number.
    """
    return _FIELD.sub(lambda name: text_of(look_up(record, name[1]), name[1]), template)


def text_of(value: object, field: str) -> str:
    """The text of a field's value: itself, or a number as it is written.

    Raises:
        FieldError: it is neither.
    """
    if isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return str(value)
    kind = (
        "a list"
        if isinstance(value, (list, tuple))
        else "an object"
        if isinstance(value, Mapping)
        else json.dumps(value)
    )
    inner = f"; name one of its elements, such as {field}.{_first(value)}" if _first(value) is not None else ""
    raise FieldError(f'"{field}" is {kind}: must be a text or a number{inner}')


def look_up(record: Mapping[str, Any], field: str) -> Any:
    """The value of a field; `field` is a name, or a path with dots.

    Raises:
        FieldError: the record has no such field.
    """
    if field in record:
        return record[field]
    value: Any = record
    for depth, name in enumerate(path := field.split(".")):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, (list, tuple)) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise FieldError(f'no field "{field}"; {_known(value, ".".join(path[:depth]))}')
    return value


def whole_number(value: object) -> int | None:
    """A whole number, or the text of one: hub data sets hold labels as texts. Else None."""
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        text = str(value).strip()
        return int(text) if re.fullmatch(r"-?\d{1,9}", text) else None
    return None


def _known(value: object, place: str) -> str:
    where = f'"{place}"' if place else "it"
    if isinstance(value, Mapping):
        names = ", ".join(map(str, list(value)[:12])) or "none"
        return f"the fields of {where} are {names}" if place else f"its fields are {names}"
    if isinstance(value, (list, tuple)):
        return f"{where} is a list of {len(value)}: elements are numbered from 0"
    return f"{where} is {'a number' if isinstance(value, Number) else 'a text' if isinstance(value, str) else 'no object'}"


def _first(value: object) -> object:
    if isinstance(value, Mapping):
        return next(iter(value), None)
    return 0 if isinstance(value, (list, tuple)) and value else None
