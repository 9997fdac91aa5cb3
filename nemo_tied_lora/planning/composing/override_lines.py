# SPDX-License-Identifier: Apache-2.0
"""Reads the `key=value` words of a command line, and tells how to write a value that Hydra cannot read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_tied_lora.errors import Problems

__all__ = ["Line", "not_an_override", "read_lines"]


@dataclass(frozen=True)
class Line:
    """One override."""

    text: str
    """As it was typed."""
    key: str
    value: Any
    adds: bool
    """Typed with + or ++."""
    deletes: bool
    """Typed with ~."""
    has_package: bool
    """Typed as GROUP@PACKAGE."""


def read_lines(arguments: Sequence[str]) -> tuple[list[Line], Problems]:
    """Returns (the overrides, one problem for each argument that is none)."""
    lines, problems = [], Problems()
    for argument in arguments:
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            problems.append(not_an_override(argument, str(error).partition("\n")[0]))
            continue
        if not parsed.key_or_group:
            problems.append(f"{argument!r}: has no key; write key=value")
            continue
        if parsed.is_sweep_override():
            quoted = _with_quotes(argument)
            comma = f"; if the comma belongs to the value: {quoted}" if quoted and "," in argument else ""
            problems.append(
                f"{argument!r}: a sweep; give one value, and run the command once for each (tied-lora launch does){comma}"
            )
            continue
        adds = parsed.is_add() or parsed.is_force_add()
        package = parsed.package is not None
        lines.append(Line(argument, parsed.key_or_group, parsed.value(), adds, parsed.is_delete(), package))
    return lines, problems


def not_an_override(argument: str, reason: str) -> str:
    """Returns what is wrong with an argument that Hydra cannot parse, and what to write."""
    if "=" not in argument and argument.endswith((".yaml", ".yml")):
        path = Path(argument)
        return f"{argument!r}: name a YAML of your own with --config-path={path.parent} --config-name={path.stem}"
    if "=" not in argument:
        return f"{argument!r}: not an override; write key=value ({reason})"
    tight = re.sub(r"^\s*([^\s=]+)\s+=\s*|^\s*([^\s=]+)\s*=\s+", r"\1\2=", argument)
    if tight != argument and _parses(tight):
        return f"{argument!r}: has blanks around =; write {_for_a_shell(tight)}"
    shorter = argument.rstrip(", \\")
    if shorter != argument and _parses(shorter):
        return f"{argument!r}: ends in a comma or a backslash; write {_for_a_shell(shorter)}"
    words = argument.split()
    if len(words) > 1 and all("=" in word and _parses(word) for word in words):
        return f"{argument!r}: several overrides in one word; take the quotes around them away"
    value = argument.partition("=")[2]
    if any(value.count(left) != value.count(right) for left, right in ("[]", "{}")):
        return f"{argument!r}: not an override; a bracket of the value is not closed ({reason})"
    quoted = None if re.fullmatch(r"\w+\(.*\)", value) else _with_quotes(argument)  # glob(*), choice(a,b)
    if quoted is None:
        return f"{argument!r}: not an override; write key=value, a value with special characters in quotes ({reason})"
    return f"{argument!r}: Hydra cannot read this value; write it in quotes: {quoted}"


def _with_quotes(argument: str) -> str | None:
    """Returns the override with its value, or each value of its list, in quotes, as a shell takes it."""
    key, _, value = argument.partition("=")
    for text in _quoted_values(value.strip()):
        if _parses(f"{key}={text}"):
            return _for_a_shell(f"{key}={text}")
    return None


def _quoted_values(value: str) -> Iterator[str]:
    if value.startswith("[") and value.endswith("]"):
        parts = re.findall(r"""\s*('[^']*'|"[^"]*"|[^,]+)\s*(?:,|$)""", value[1:-1])
        yield f"[{','.join(part if _parses(f'k=[{part}]') else _quoted(part) for part in parts)}]"
    yield _quoted(value)


def _quoted(text: str) -> str:
    bare = text.strip().strip("'\"")
    if bare.startswith("~/"):
        bare = str(Path(bare).expanduser())
    mark = '"' if "'" in bare else "'"
    return f"{mark}{bare}{mark}"


def _for_a_shell(override: str) -> str:
    if not any(sign in override for sign in '"$`\\!'):
        return f'"{override}"'
    return shlex.quote(override)


def _parses(override: str) -> bool:
    try:
        return not OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False
