# SPDX-License-Identifier: Apache-2.0
"""What a study compares: the YAML as checked values. `configs/study/paper_claim.yaml` explains each key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from nemo_tied_lora.config import PRESETS, TARGETS
from nemo_tied_lora.errors import Problems, is_number, is_whole_number
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization

__all__ = ["BASE", "Base", "Claim", "Method", "Study", "StudyTask", "Sweep", "Training", "left_out_pairs"]

BASE = "base"
"""The name of the base without an adapter, beside the names of methods."""
_MOST_HEADROOM = "most_headroom"
_TITLES = {"lora": "LoRA", "vera": "VeRA", "tl5": "TL5", "tl6": "TL6", "adalora": "AdaLoRA"}


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that all methods adapt."""

    path: str  # its .nemo
    name: str  # as the page calls it; a part of each run's key
    fingerprint: str | None  # of its weights, as adapters record it; None: any
    remedy: str  # what to do if the file is missing


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all runs share."""

    batch: int
    micro_batch: int
    precision: str
    warmup_steps: int
    weight_decay: float
    checkpoints: int  # how many a run writes, so that a killed run does not start again
    validation_batches: int  # of the validation before a checkpoint; nothing is chosen by it
    overrides: tuple[str, ...]  # more overrides of `tied-lora finetune`


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How the learning rate of a method on a task is chosen: by the answers' loss on validation data."""

    steps: int
    items: int | None  # of the validation data; None: all
    seed: int
    growth: int  # how many times the grid grows at an edge that is best


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is compared with what, and how far apart is comparable."""

    candidate: str
    reference: str
    rival: str | None  # the reference's form with about the candidate's parameters
    points: float
    share_of_gain: float
    headroom_tasks: int  # how many tasks `most_headroom` means
    also: Mapping[str, str]  # more comparisons, shown beside the claim: a method, and what it is compared with
    pairs: Mapping[str, str]  # more comparisons, shown with each task; a quantised base is called base_nf4


@dataclass(frozen=True, kw_only=True)
class Method:
    """One form of adapter."""

    name: str
    preset: str
    rank: int
    targets: tuple[str, ...] | None  # None: all four
    seeds: int
    rates: tuple[float, ...]  # one: no sweep
    rates_of: str | None  # the method whose chosen rates this one uses
    tasks: tuple[str, ...] | None  # None: all; ("most_headroom",): those with most to gain
    wave: int  # the wave in which its first seed runs
    base_quantization: str | None  # as model.base_quantization, of training and evaluation; None: the base as it is

    @property
    def title(self) -> str:
        """As the page calls it: "TL6 r=8", "LoRA r=8, linear_qkv", "TL6 r=8, nf4"."""
        parts = [f"{_TITLES[self.preset]} r={self.rank}", " ".join(self.targets or ()), _short(self.base_quantization)]
        return ", ".join(part for part in parts if part)

    @property
    def wants_headroom(self) -> bool:
        """Whether its tasks are known only after the sweep."""
        return self.tasks == (_MOST_HEADROOM,)


@dataclass(frozen=True, kw_only=True)
class StudyTask:
    """One task of the study."""

    name: str
    family: str  # as the page calls it
    primary: str  # the metric that decides
    also: tuple[str, ...]  # metrics that the page shows too
    steps: int
    max_seq_length: int
    max_chars: int | None  # training items with longer input and output together are left out
    items: int | None  # of the test data; None: all
    beyond_below: float  # if the reference scores less, this base cannot do the task


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study, checked."""

    name: str
    title: str
    about: tuple[str, ...]
    limits: tuple[str, ...]
    folder: str
    results: str
    base: Base
    training: Training
    sweep: Sweep
    claim: Claim
    methods: tuple[Method, ...]
    tasks: tuple[StudyTask, ...]
    resamples: int

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Study:
        """Reads the values of `configs/compare.yaml` with a study.

        Raises:
            ConfigError: with all problems.
        """
        problems = Problems()
        for key in ("name", "title"):
            if not isinstance(cfg.get(key), str):
                problems.append(f"{key}={cfg.get(key)!r}: must be a text")
        for key in ("folder", "results"):  # that they are paths is checked where they are typed
            if cfg.get(key) is None:
                problems.append(f"{key}: missing; name a folder")
        problems.whole_number("resamples", cfg.get("resamples"), least=100)
        parts: dict[str, Any] = {
            name: _read(problems, name, kind, cfg.get(name))
            for name, kind in (("base", Base), ("training", Training), ("sweep", Sweep), ("claim", Claim))
        }
        methods = _each(problems, "methods", cfg.get("methods"), _method)
        tasks = _each(problems, "tasks", cfg.get("tasks"), _task)
        texts: dict[str, Any] = {key: _texts(problems, key, cfg.get(key)) for key in ("about", "limits")}
        problems += _names(methods, tasks, parts["claim"], set(problems.section("methods", cfg.get("methods"))))
        problems.raise_if_any()
        values = {key: cfg[key] for key in ("name", "title", "folder", "results", "resamples")}
        return cls(**values, **parts, **texts, methods=tuple(methods), tasks=tuple(tasks))

    def method(self, name: str) -> Method:
        """The method of this name."""
        return next(method for method in self.methods if method.name == name)

    @property
    def bases(self) -> dict[str, str | None]:
        """Name to `model.base_quantization`: the base, and as "base_nf4" each way in which a method holds it."""
        settings = [method.base_quantization for method in self.methods if method.base_quantization is not None]
        named = {f"{BASE}_{re.sub('[^a-z0-9]+', '_', _short(one))}": one for one in settings}
        return {BASE: None, **named}

    def title_of(self, name: str) -> str:
        """The title of a method, or of the base, quantised or not."""
        if name in self.bases:
            return ", ".join(part for part in (BASE, _short(self.bases[name])) if part)
        return self.method(name).title

    def task(self, name: str) -> StudyTask:
        """The task of this name."""
        return next(task for task in self.tasks if task.name == name)


def left_out_pairs(study: Study) -> list[str]:
    """One line for each comparison whose method the study has not: an override has left it out, or its name is misspelt."""
    known = [*study.bases, *(method.name for method in study.methods)]
    return [
        f"{_unknown(f'claim.{key}.{method}', other, name, known)}; this comparison is left out"
        for key, pairs in (("also", study.claim.also), ("pairs", study.claim.pairs))
        for method, other in pairs.items()
        for name in [one for one in (method, other) if one not in known][:1]
    ]


def _each(problems: Problems, key: str, value: object, read: Callable[[Problems, str, Any], Any]) -> list[Any]:
    if not isinstance(value, Mapping) or not value:
        problems.append(f"{key}={value!r}: must be a section with at least one name")
        return []
    found = [read(problems, str(name), given) for name, given in value.items()]
    return [one for one in found if one is not None]


def _method(problems: Problems, name: str, given: Any) -> Method | None:
    where = f"methods.{name}"
    if name == BASE or name.startswith(f"{BASE}_"):
        problems.append(f"{where}: the base is always compared; use another name")
    values = {
        "base_quantization": None,
        "targets": None,
        "rates": None,
        "rates_of": None,
        "tasks": None,
        "wave": 1,
        **problems.section(where, given),
    }
    problems.one_of(f"{where}.preset", values.get("preset"), PRESETS)
    for key, value in (("targets", values["targets"]), ("tasks", values["tasks"])):
        values[key] = (
            None if value is None else _texts(problems, f"{where}.{key}", [value] if isinstance(value, str) else value)
        )
    problems += [
        f"{where}.targets: {target!r} is unknown; choose from {', '.join(TARGETS)}"
        for target in values["targets"] or ()
        if target not in TARGETS
    ]
    rates = values["rates"]
    if (values["rates"] is None) == (values["rates_of"] is None):
        problems.append(f"{where}: needs rates, or rates_of with the name of another method, and not both")
    elif values["rates"] is not None:
        problems += _rate_problems(f"{where}.rates", rates)
    values["rates"] = tuple(rates) if isinstance(rates, Sequence) else ()
    values["base_quantization"] = _quantization(problems, where, values["base_quantization"])
    return _built(problems, where, Method, values, name=name)


def _quantization(problems: Problems, where: str, value: object) -> str | None:
    """The setting in its shortest form, so that one way to hold the base has one key."""
    found = Problems()
    quantization = found.attempt(BaseQuantization.from_setting, value)
    problems += [line.replace("model.", f"{where}.", 1) for line in found]
    return None if quantization is None else quantization.setting


def _short(setting: str | None) -> str:
    """How the base is held, in a word or two: "nf4", "nf4/64 double", or nothing."""
    if setting is None:
        return ""
    quantization = BaseQuantization.from_setting(yaml.safe_load(setting))
    assert quantization is not None
    return setting if setting == quantization.kind else quantization.precision


def _rate_problems(key: str, rates: object) -> list[str]:
    if not isinstance(rates, list) or not rates or not all(is_number(rate) and rate > 0 for rate in rates):
        return [f"{key}={rates!r}: must be a list of positive numbers"]
    if rates != sorted(set(rates)):
        return [f"{key}={rates!r}: must ascend"]
    odd = [rate for rate in rates if not _is_step(rate)]
    return [f"{key}: {rate!r} is not 1, 2 or 5 times a power of ten; the grid grows in these steps" for rate in odd]


def _is_step(rate: float) -> bool:
    digit = rate / 10 ** math.floor(math.log10(rate) + 1e-9)
    return any(abs(digit - step) < 1e-6 for step in (1, 2, 5))


def _task(problems: Problems, name: str, given: Any) -> StudyTask | None:
    where = f"tasks.{name}"
    values = {"also": [], "max_chars": None, "items": None, **problems.section(where, given)}
    values["also"] = _texts(problems, f"{where}.also", values["also"])
    return _built(problems, where, StudyTask, values, name=name)


def _read(problems: Problems, name: str, kind: Any, given: object) -> Any:
    values = problems.section(name, given)
    if kind is Claim:
        values = {"also": {}, **values}
    if "overrides" in values:
        values["overrides"] = _texts(problems, f"{name}.overrides", values["overrides"])
    return _built(problems, name, kind, values)


def _built(problems: Problems, where: str, kind: Any, values: Mapping[str, Any], **fixed: str) -> Any:
    """Builds the dataclass. Collects unknown keys, missing keys and values of another type.

    Args:
        fixed: fields that are no keys.
    """
    known = {field.name: str(field.type) for field in fields(kind) if field.name not in fixed}
    before = len(problems)
    kept = problems.known_keys(where, values, known)
    problems += [f"{where}.{key}: missing" for key in known if key not in kept]
    for key, value in kept.items():
        _check_type(problems, f"{where}.{key}", value, known[key])
    return None if len(problems) > before else kind(**kept, **fixed)


def _check_type(problems: Problems, key: str, value: Any, kind: str) -> None:
    if value is None and "None" in kind:
        return
    if kind.startswith("int"):
        problems.whole_number(
            key, value, least=0 if key.endswith((".growth", ".headroom_tasks", ".warmup_steps")) else 1
        )
    elif kind.startswith("float"):
        if not is_number(value) or value < 0:
            problems.append(f"{key}={value!r}: must be a number of at least 0")
    elif kind.startswith("Mapping"):
        if not isinstance(value, Mapping) or not all(isinstance(one, str) for one in value.values()):
            problems.append(f"{key}={value!r}: must be a section of names")
    elif kind.startswith("str") and not (
        isinstance(value, str) or (key.endswith(".precision") and is_whole_number(value))
    ):
        problems.append(f"{key}={value!r}: must be a text")


def _texts(problems: Problems, key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        problems.append(f"{key}={value!r}: must be a list of texts")
        return ()
    return tuple(value)


def _names(
    methods: Sequence[Method], tasks: Sequence[StudyTask], claim: Claim | None, given: Collection[str]
) -> list[str]:
    """Problems of names that must be those of a method or a task of the study.

    Args:
        given: the names of all methods, those too that have problems of their own.
    """
    known = list(given)
    named = [(f"methods.{m.name}.rates_of", m.rates_of) for m in methods if m.rates_of is not None]
    if claim is not None:
        named += [("claim.candidate", claim.candidate), ("claim.reference", claim.reference)]
        named += [("claim.rival", claim.rival)] if claim.rival is not None else []
    found = [_unknown(key, name, name, known) for key, name in named if name not in known]
    by_name = {method.name: method for method in methods}
    found += [
        f"methods.{m.name}.rates_of={m.rates_of}: that method has no rates of its own"
        for m in methods
        if m.rates_of in by_name and not by_name[m.rates_of].rates
    ]
    places = [task.name for task in tasks]
    for method in methods:
        if method.tasks is not None and not method.wants_headroom:
            found += [
                _unknown(f"methods.{method.name}.tasks", t, t, places, "task") for t in method.tasks if t not in places
            ]
    return found


def _unknown(key: str, value: str, name: str, known: Sequence[str], what: str = "method") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
    return f"{key}={value}: no {what} of this study has {'this name' if value == name else f'the name {name}'}; {hint}"
