# SPDX-License-Identifier: Apache-2.0
"""Word problems from the templates of GSM-Symbolic, as reasoning-gym has them. The result is in this package."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.progress import Progress

__all__ = ["OPTIONS", "build", "option_problems"]

OPTIONS = ()

_MODULE = "reasoning_gym.arithmetic.gsm_symbolic"
_SPLITS = {"train": 60, "validation": 4, "test": 12}
"""Questions of each template."""
_HELD_OUT = 17
"""So many templates are only in test_new_templates."""
_TRIES = 5
"""A template draws numbers until its answer is whole: so often for each question."""


def option_problems(key: str, options: Mapping[str, Any]) -> Iterator[str]:
    """There are no options."""
    yield from ()


def build(options: Mapping[str, Any], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(records, what they were made of).

    Raises:
        ConfigError: reasoning-gym is not installed.
    """
    try:
        known = importlib.import_module(f"{_MODULE}.gsm_symbolic").tasks_ok
        parts = [vars(importlib.import_module(f"{_MODULE}.generators_{part}")) for part in ("00_49", "50_99")]
    except ImportError as error:
        raise ConfigError([f"needs reasoning-gym ({error}): pip install reasoning-gym==0.1.25"]) from None
    templates = {**parts[0], **parts[1]}
    records = list(_records([(number, templates[f"generate_{number}"]) for number in known]))
    return records, {"reasoning-gym": importlib.metadata.version("reasoning-gym")}


def _records(templates: list[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
    """Yields each question once, with its worked solution."""
    held_out = set(Random(3).sample([number for number, _ in templates], _HELD_OUT))
    seen = set()
    for name, count in _SPLITS.items():
        for number, template in Progress(templates, desc=f"questions: {name}", unit="templates"):
            split = name if number not in held_out else "test_new_templates"
            if number in held_out and name != "test":
                continue
            draw, made = Random(f"{name}{number}"), 0
            for _ in range(count * _TRIES):
                question = _drawn(template, draw)
                if question is None or question["question"] in seen:
                    continue
                seen.add(question["question"])
                yield {"split": split, "template": number, **question}
                made += 1
                if made == count:
                    break


def _drawn(template: Any, draw: Random) -> dict[str, Any] | None:
    """A question with new names and numbers. None: this draw fails, or has no worked solution."""
    try:
        made = template(draw, 1.0)
    except Exception:  # a template gives up in many ways, such as an empty range or a division by zero
        return None
    solution = made.get("metadata", {}).get("answer_cot") or made.get("answer_cot")
    return {"question": made["question"], "answer": str(made["answer"]), "cot": solution} if solution else None
