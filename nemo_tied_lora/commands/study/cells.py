# SPDX-License-Identifier: Apache-2.0
"""The cells of a study: one run each, keyed by the settings that decide its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_tied_lora.commands.study.plan import BASE, Method, Study, StudyTask
from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.tasks.training_order import ORDER

__all__ = ["FINAL", "LOSS", "SWEEP", "Cell", "base_cell", "method_cell", "settings_key"]

SWEEP, FINAL = "sweep", "final"
LOSS = "answer_loss"
"""The metric of the sweep, and one of every run."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: the base or a method, on one task, with one seed and one learning rate."""

    phase: str  # SWEEP: validation data, the answers' loss alone. FINAL: test data, all metrics
    method: str  # one of the study's bases, or the name of a method
    task: str
    seed: int | None
    rate: float | None
    wave: int
    settings: Mapping[str, Any]  # without the data's checksums, which are known only where the data is

    @property
    def key(self) -> str:
        """A hash of the settings."""
        return settings_key(self.settings)

    @property
    def is_base(self) -> bool:
        """Whether nothing is trained."""
        return self.settings["preset"] is None

    @property
    def quantization(self) -> str | None:
        """`model.base_quantization` of training and evaluation."""
        return self.settings.get("base_quantization")

    @property
    def label(self) -> str:
        """What a reader looks for: "nli-tl6-s1", "nli-tl6-lr0.02-s1" in the sweep, "nli-base", "nli-base-validation"."""
        if self.is_base:
            return "-".join([self.task, self.method, *(["validation"] if self.phase == SWEEP else [])])
        rate = [f"lr{self.rate:g}"] if self.phase == SWEEP else []
        return "-".join([self.task, self.method, *rate, f"s{self.seed}"])


def settings_key(settings: Mapping[str, Any]) -> str:
    """A hash of settings, in whatever order they come."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def base_cell(study: Study, task: StudyTask, phase: str, name: str = BASE) -> Cell:
    """One of the study's bases, without an adapter."""
    settings = {**_measured(study, task, phase), **_held(study.bases[name]), "preset": None}
    return Cell(phase=phase, method=name, task=task.name, seed=None, rate=None, wave=1, settings=settings)


def method_cell(study: Study, method: Method, task: StudyTask, phase: str, rate: float, seed: int) -> Cell:
    """A method on a task. Its key does not depend on the method's name, only on what is trained."""
    training = asdict(study.training)
    training["overrides"] = list(study.training.overrides)
    del training["checkpoints"], training["validation_batches"]  # they do not change the result
    settings = {
        **_measured(study, task, phase),
        **training,
        **_held(method.base_quantization),
        "preset": method.preset,
        "rank": method.rank,
        "targets": list(method.targets or TARGETS),
        "seed": seed,
        "order": ORDER,
        "learning_rate": float(rate),
        "steps": study.sweep.steps if phase == SWEEP else task.steps,
        "max_seq_length": task.max_seq_length,
        "max_chars": task.max_chars,
    }
    return Cell(
        phase=phase,
        method=method.name,
        task=task.name,
        seed=seed,
        rate=float(rate),
        wave=method.wave + (seed - 1 if phase == FINAL else 0),
        settings=settings,
    )


def _held(quantization: str | None) -> dict[str, str]:
    """A base that is not quantised has no such setting: its runs keep the keys that they have had before."""
    return {} if quantization is None else {"base_quantization": quantization}


def _measured(study: Study, task: StudyTask, phase: str) -> dict[str, Any]:
    split, items = ("validation", study.sweep.items) if phase == SWEEP else ("test", task.items)
    metrics = [LOSS] if phase == SWEEP else list(dict.fromkeys([task.primary, *task.also, LOSS]))
    return {
        "task": task.name,
        "base": study.base.name,
        "precision": study.training.precision,
        "split": split,
        "items": items,
        "metrics": metrics,
    }
