# SPDX-License-Identifier: Apache-2.0
"""Reads the `key=value` words of a training script on Bridge, and finds the mistakes in them that Bridge's overrides let pass.

Bridge writes an override into its dataclasses without a look at the field: one that is not there is ignored, and a text
is taken for a number. It leaves out the PEFT method too. This module imports neither torch nor Bridge, so most mistakes
are found in a moment.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_tied_lora.config import PRESETS, TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, Problems, did_you_mean
from nemo_tied_lora.planning.composing.override_lines import Line, read_lines

__all__ = ["Overrides"]

_PRESETS = [name for name in PRESETS if name != "adalora"]
"""adalora has a rank budget, and Bridge's checkpoints would not hold what it prunes."""


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The overrides of one command line."""

    preset: str | None
    """None: the defaults, or the fields of the file of `peft.restore_from_path`."""
    adapter: dict[str, Any]
    """The fields of `peft.FIELD=VALUE`, for `TiedLoRA.preset(preset, **adapter)`."""
    lines: list[Line]
    """All others."""

    @classmethod
    def read(cls, words: Sequence[str], preset: str | None) -> tuple[Overrides, Problems]:
        """Returns (the overrides that can be read, one problem for each mistake that shows without Bridge)."""
        options = [word for word in words if word.startswith("-")]
        lines, unread = read_lines([word for word in words if not word.startswith("-")])
        problems = Problems(
            f"{word}: not an option; see --help. A key has no dashes, as in {_KEY}" for word in options
        )
        problems += [problem.replace(" (tied-lora launch does)", "") for problem in unread]
        ours = [line for line in lines if line.key.partition(".")[0] == "peft"]
        others = [line for line in lines if line not in ours]
        problems += [
            f"{line.text}: a field can only be changed; write {line.key}=VALUE" for line in lines if line.deletes
        ]
        adapter: dict[str, Any] = {}
        for line in ours:
            if not line.deletes:
                _add_field(adapter, line, problems)
        problems += _adapter_problems(preset, adapter)
        return cls(preset=preset, adapter=adapter, lines=others), problems

    def value(self, key: str, default: Any = None) -> Any:
        """The last value that was given for this key; the default if there is none."""
        return next((line.value for line in reversed(self.lines) if line.key == key), default)

    def problems(self, config: Any) -> Iterator[str]:
        """Compares each override with the fields of Bridge's configuration.

        Args:
            config: a dataclass of dataclasses, as Bridge's `ConfigContainer`.

        Yields:
            one line for each override of a field that is not there, or with a value that is no number, or neither true
            nor false, where the field's type needs one.
        """
        for line in self.lines:
            yield from _problems(config, line.key.split("."), _Given(line.key, line.value, line.adds))

    @property
    def words(self) -> list[str]:
        """What to pass to Bridge, once `problems` has found none. A plus is allowed, and changes nothing."""
        return ["++" + line.text.lstrip("+") for line in self.lines]


_KEY = "train.train_iters=500"


@dataclass(frozen=True)
class _Given:
    """A key of Bridge, and its new value."""

    key: str
    value: Any
    adds: bool

    def __str__(self) -> str:
        return f"{self.key}={self.value!r}"

    def below(self, name: str, value: Any) -> _Given:
        """The value of one key of a value that is a mapping."""
        return _Given(f"{self.key}.{name}", value, self.adds)


def _add_field(adapter: dict[str, Any], line: Line, problems: Problems) -> None:
    _, _, name = line.key.partition(".")
    if name and name != "preset" and not line.has_package:
        adapter[name] = line.value
        return
    known = line.value in _PRESETS
    problems.append(
        f"{line.text}: write --preset={line.value}"
        if known
        else f"{line.text}: write --preset=NAME ({', '.join(_PRESETS)}), and peft.FIELD=VALUE for a field"
    )


def _adapter_problems(preset: str | None, fields: Mapping[str, Any]) -> Iterator[str]:
    if preset not in (None, *_PRESETS):
        yield f"--preset={preset}: unknown; choose one of {', '.join(_PRESETS)}"
        preset = None
    given = dict(fields)
    if given.pop("rank_budget", None):
        yield "peft.rank_budget: not with Bridge, whose checkpoints would not hold what is pruned; leave it out"
    problems, path = Problems(), given.pop("restore_from_path", None)
    if path is not None:
        problems.file("peft.restore_from_path", Path(str(path)), "name an adapter's .nemo file")
    problems.flag("peft.allow_other_base", given.pop("allow_other_base", False))
    yield from problems
    try:
        TiedLoraConfig.from_mapping({"preset": preset, **given})
    except ConfigError as error:
        for problem in error.problems:
            shown = problem.replace("not a key of tied_lora; write ", "not a field of the adapter; write peft.")
            yield f"peft.{shown.replace('the keys are preset, ', 'the fields are restore_from_path, allow_other_base, ')}"


def _problems(owner: Any, path: Sequence[str], given: _Given) -> Iterator[str]:
    """What is wrong with an override of `owner`'s field `path`."""
    name, rest = path[0], path[1:]
    above = given.key.split(".")[: -len(path)]
    where = ".".join(above) or "Bridge's configuration"
    if isinstance(owner, Mapping):
        if name in owner and rest:
            yield from _problems(owner[name], rest, given)
        elif name not in owner and not given.adds:
            yield f"{given}: {where} has no {name}; to add it, write +{given.key}=VALUE"
        return
    if not dataclasses.is_dataclass(owner):
        found = "is not set" if owner is None else f"is a {type(owner).__name__}"
        yield f"{given}: {where} {found}, so it has no {name}; set it in the script"
        return
    names = [field.name for field in dataclasses.fields(owner)]
    if name not in names:
        yield f"{given}: {where} has no {name}{did_you_mean(name, names, cutoff=0.75)}"
        return
    current = getattr(owner, name)
    if not rest:
        yield from _value_problems(owner, name, given)
    elif current is not None or not any(map(_is_dictionary, _kinds(type(owner), name))):
        yield from _problems(current, rest, given)


def _value_problems(owner: Any, name: str, given: _Given) -> Iterator[str]:
    current, kinds, value = getattr(owner, name), _kinds(type(owner), name), given.value
    if dataclasses.is_dataclass(current):
        if isinstance(value, Mapping):
            for key, each in value.items() if "_target_" not in value else ():
                yield from _problems(current, [key], given.below(key, each))
        elif str not in kinds and (value is not None or type(None) not in kinds):
            names = [field.name for field in dataclasses.fields(current)]
            yield f"{given}: a section; set a key of it, as {given.key}.{names[0]}=VALUE"
    elif _is_function(current, kinds) and name != _NAMED_FUNCTION and value is not None:
        yield f"{given}: a function, which no override can replace; set it in the script"
    elif value is not None and kinds - {type(None)} and all(map(_is_dictionary, kinds - {type(None)})):
        if not isinstance(value, Mapping):
            yield f"{given}: must be a dictionary; write {given.key}={{key: value}}"
    elif kinds <= _NUMBERS and value is not None and "${" not in str(value):
        yield from _number_problems(given, kinds | {type(current)})


_NAMED_FUNCTION = "activation_func"
"""The one function that Bridge takes by its name."""
_NUMBERS = {int, float, bool, type(None)}


def _is_dictionary(kind: Any) -> bool:
    return (typing.get_origin(kind) or kind) is dict


def _is_function(current: Any, kinds: set[Any]) -> bool:
    if callable(current):
        return not isinstance(current, type)
    return str not in kinds and any(typing.get_origin(kind) is collections.abc.Callable for kind in kinds)


def _number_problems(given: _Given, kinds: set[Any]) -> Iterator[str]:
    value = given.value
    if type(value) in kinds or (type(value) is int and (float in kinds or (bool in kinds and value in (0, 1)))):
        return
    if type(value) is float and int in kinds and value.is_integer():
        yield f"{given}: must be a whole number; write {given.key}={value:.0f}"
        return
    wanted = "a number" if float in kinds else "a whole number" if int in kinds else "true or false"
    yield f"{given}: must be {wanted}"


def _kinds(owner: type, name: str) -> set[Any]:
    """The types that a field may have, by its annotation. {None}: it cannot be read."""
    hint = _hints(owner).get(name)
    return set(typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint])


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(owner)
    except (AttributeError, NameError, TypeError):  # an annotation with a name that only a type checker imports
        return {}
