# SPDX-License-Identifier: Apache-2.0
"""What is compared: the YAMLs of this folder as checked values. `forms.yaml` and `rates.yaml` explain each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nemo_tied_lora.errors import ConfigError, Problems

from .sizes import Sizes

__all__ = [
    "BEST",
    "FORMS",
    "PLAIN",
    "RATES",
    "Candidate",
    "Plan",
    "Rule",
    "Stage",
    "Sweep",
    "Task",
    "Training",
    "read_plan",
]

FORMS = Path(__file__).with_name("forms.yaml")
RATES = Path(__file__).with_name("rates.yaml")
PLAIN, BEST = "plain", "best"
"""Rules that every plan has: one rate for all factors; and the best rule of the stages before."""
_Part = TypeVar("_Part")

Rule = Mapping[str, tuple[float, float]]
"""Factor to (c, p): its learning rate is multiplied with c (rank / 8)^p."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all runs share."""

    batch: int
    warmup_steps: int
    weight_decay: float
    clip: float
    start_batches: int


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How a learning rate is chosen: on validation data."""

    steps: int
    items: int
    seed: int
    growth: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task."""

    name: str
    family: str
    steps: int
    max_seq_length: int
    max_chars: int
    items: int
    choice: bool = False


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A form that is compared at equal counts, or a preset of the rates' sweep."""

    name: str
    title: str
    form: Mapping[str, Any]
    rates: tuple[float, ...] = ()
    rule: str = PLAIN
    reference: bool = False
    largest: int | None = None
    prunes: float | None = None
    """AdaLoRA: the rank at the start, times the one that is kept."""
    idea: str = ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Runs of the rates' sweep that belong together."""

    presets: tuple[str, ...]
    ranks: tuple[int, ...]
    rule: str
    rates: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Check:
    """A change of the recipe that is tried with each preset's best rate of the plain rule."""

    presets: tuple[str, ...]
    ranks: tuple[int, ...]
    changes: tuple[Mapping[str, float], ...]
    """Fields of `Training` to another value, each tried alone."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan, checked."""

    base: str
    sizes: Sizes
    training: Training
    sweep: Sweep
    tasks: tuple[Task, ...]
    rules: Mapping[str, Rule]
    candidates: tuple[Candidate, ...]
    budgets: Mapping[str, int]
    keep: tuple[int, ...]
    seeds: int
    resamples: int
    stages: tuple[Stage, ...]
    one_rate: float
    tolerance: float
    checks: tuple[Check, ...]

    def candidate(self, name: str) -> Candidate:
        """The form of this name."""
        return next(one for one in self.candidates if one.name == name)

    def multipliers(self, rule: str, rank: int) -> dict[str, float]:
        """Factor to what its learning rate is multiplied with at a rank."""
        return {factor: c * (rank / 8) ** p for factor, (c, p) in self.rules[rule].items()}


def read_plan(path: Path) -> Plan:
    """Reads a plan.

    Raises:
        ConfigError: with all problems.
    """
    given = yaml.safe_load(path.read_text())
    problems = Problems()
    problems += [f"{path.name}: {key} is not a key" for key in given if key not in {f.name for f in fields(Plan)}]
    rules: dict[str, Rule] = {PLAIN: {}}
    for name, rule in (given.get("rules") or {}).items():
        rules[name] = {str(factor): (float(c), float(p)) for factor, (c, p) in rule.items()}
    candidates = [
        _part(problems, f"candidates.{name}", Candidate, {"title": name, **values, "name": name})
        for name, values in given["candidates"].items()
    ]
    stages = [
        _part(problems, f"stages[{number}]", Stage, values) for number, values in enumerate(given.get("stages") or [])
    ]
    checks = [_part(problems, f"checks[{n}]", Check, values) for n, values in enumerate(given.get("checks") or [])]
    tasks = [_part(problems, f"tasks.{name}", Task, {**v, "name": name}) for name, v in given["tasks"].items()]
    training = _part(problems, "training", Training, given["training"])
    sizes = _part(problems, "sizes", Sizes, given["sizes"])
    sweep = _part(problems, "sweep", Sweep, given["sweep"])
    names = [one.name for one in candidates if one is not None]
    for one in [*candidates, *stages]:
        if one is not None and one.rule not in (*rules, *([BEST] if isinstance(one, Stage) else [])):
            problems.append(f"rule={one.rule}: no such rule; choose from {', '.join(rules)}")
    problems += [
        f"stages: {name} is no candidate"
        for stage in (*stages, *checks)
        if stage
        for name in stage.presets
        if name not in names
    ]
    recipe = [field.name for field in fields(Training)]
    problems += [
        f"checks: {name} is not a key of training"
        for check in checks
        if check
        for change in check.changes
        for name in change
        if name not in recipe
    ]
    problems.raise_if_any()
    return Plan(
        base=given["base"],
        sizes=_there(sizes),
        training=_there(training),
        sweep=_there(sweep),
        tasks=tuple(map(_there, tasks)),
        rules=rules,
        candidates=tuple(map(_there, candidates)),
        budgets=dict(given.get("budgets") or {}),
        keep=tuple(given.get("keep") or ()),
        seeds=given.get("seeds", 0),
        resamples=given.get("resamples", 1000),
        stages=tuple(map(_there, stages)),
        one_rate=given.get("one_rate", 0.0),
        tolerance=given.get("tolerance", 0.0),
        checks=tuple(map(_there, checks)),
    )


def _part(problems: Problems, where: str, kind: type[_Part], values: Mapping[str, Any]) -> _Part | None:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    kept = problems.known_keys(where, values, known)
    try:
        return kind(**{key: _frozen(value) for key, value in kept.items()})
    except TypeError as error:
        problems.append(f"{where}: {error}")
        return None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _there(value: _Part | None) -> _Part:
    if value is None:  # the problems were raised before
        raise ConfigError(["a part of the plan is missing"])
    return value
