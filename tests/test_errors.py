# SPDX-License-Identifier: Apache-2.0
"""Problems are collected and raised together. Pure maths: no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.errors import ConfigError, Problems


def refuse() -> int:
    raise ConfigError(["b: bad", "c: bad"])


def test_all_problems_are_raised_together_and_none_raises_nothing() -> None:
    problems = Problems()
    problems.raise_if_any()
    problems.append("a: bad")
    assert problems.attempt(refuse) is None
    assert problems.attempt(lambda: 7) == 7
    with pytest.raises(ConfigError, match="a: bad\nb: bad\nc: bad"):
        problems.raise_if_any()


def test_build_returns_the_result_or_raises_what_was_found_before_too() -> None:
    assert Problems().build(dict, rank=8) == {"rank": 8}
    for build in (refuse, lambda: 7):
        with pytest.raises(ConfigError, match=r"^a: bad"):
            Problems(["a: bad"]).build(build)


@pytest.mark.parametrize(
    ("method", "good", "bad", "message"),
    [
        ("whole_number", (1, 7), (0, True, 1.0, "1", None), "must be a whole number of at least 1"),
        ("flag", (True, False), ("true", None, 2), "must be true or false"),
        ("section", ({}, {"a": 1}, None), ([], "a", 0), "must be a section of keys"),
        ("file", (__file__, Path(__file__)), (None, "/nowhere", "/"), "no such file"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(
    method: str, good: tuple[Any, ...], bad: tuple[Any, ...], message: str
) -> None:
    for value in good:
        problems = Problems()
        getattr(problems, method)("model.key", value)
        assert problems == []
    for value in bad:
        problems = Problems()
        getattr(problems, method)("model.key", value)
        (problem,) = problems
        assert problem.startswith("model.key=")
        assert str(value) in problem
        assert message in problem


def test_choices_are_shown_as_yaml_writes_them() -> None:
    problems = Problems()
    for value in ("a", None, True, "b"):
        problems.one_of("kind", value, ("a", None, True))
    assert problems == ["kind='b': unknown; choose one of a, null, true"]


def test_unknown_keys_are_named_and_left_out() -> None:
    problems = Problems()
    assert problems.known_keys("guards", {"a": 1, "z": 2}, ["a", "b"]) == {"a": 1}
    assert problems == ["guards.z: not a key of guards; choose from a, b"]
