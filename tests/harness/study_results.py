# SPDX-License-Identifier: Apache-2.0
"""A small study, and results for it that no model has made: each method's quality is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_tied_lora.commands.study.cells import LOSS, SWEEP, Cell
from nemo_tied_lora.commands.study.plan import BASE, Study
from nemo_tied_lora.commands.study.results import Results, read_results, write_result
from nemo_tied_lora.commands.study.schedule import schedule
from nemo_tied_lora.tasks.metrics import METRICS

__all__ = ["BEST_RATES", "QUALITY", "study_values", "values_of", "write_all", "write_some"]

BEST_RATES = {"lora": 0.005, "tl6": 0.02, "lora_r1": 0.01}
"""The rate with the lowest loss that `loss_of` makes."""
QUALITY = {BASE: 20.0, "lora": 70.0, "tl6": 69.5, "lora_r1": 60.0, "tl6_r2": 65.0}
QUALITY |= {"base_nf4": 15.0, "lora_nf4": 69.6, "tl6_nf4": 67.0}
"""Points on every task."""
TRAINED = {"lora": 1000, "tl6": 110, "lora_r1": 125, "tl6_r2": 60, "lora_nf4": 1000, "tl6_nf4": 110}
ITEMS = 300


def study_values(folder: Path) -> dict[str, Any]:
    """The values of a study with two tasks and four methods, one of them on the task with more headroom."""
    method = {"preset": "lora", "rank": 8, "seeds": 3}
    task = {"steps": 20, "max_seq_length": 64, "beyond_below": 0}
    return {
        "name": "small",
        "title": "A small study",
        "about": ["What it asks.", "And why."],
        "limits": ["It is small."],
        "folder": str(folder / "runs"),
        "results": str(folder / "results"),
        "resamples": 200,
        "base": {"path": str(folder / "base.nemo"), "name": "a base", "fingerprint": None, "remedy": "make it"},
        "training": {
            "batch": 8,
            "micro_batch": 8,
            "precision": "bf16",
            "warmup_steps": 2,
            "weight_decay": 0.0,
            "checkpoints": 2,
            "validation_batches": 1,
            "overrides": [],
        },
        "sweep": {"steps": 5, "items": 50, "seed": 1, "growth": 2},
        "claim": {
            "candidate": "tl6",
            "reference": "lora",
            "rival": "lora_r1",
            "points": 1.0,
            "share_of_gain": 0.02,
            "headroom_tasks": 1,
            "pairs": {},
        },
        "methods": {
            "lora": {**method, "rates": [0.002, 0.005, 0.01]},
            "tl6": {**method, "preset": "tl6", "rates": [0.01, 0.02, 0.05]},
            "lora_r1": {**method, "rank": 1, "rates": [0.002, 0.005]},
            "tl6_r2": {
                **method,
                "preset": "tl6",
                "rank": 2,
                "seeds": 1,
                "rates_of": "tl6",
                "tasks": "most_headroom",
                "wave": 2,
            },
        },
        "tasks": {
            "spelling": {**task, "family": "spelling", "primary": "exact_match"},
            "senses": {**task, "family": "senses", "primary": "accuracy", "items": 200},
        },
    }


def values_of(study: Study, cell: Cell, *, quality: float | None = None, data: str = "d0") -> dict[str, Any]:
    """The values of a result. The seed makes the items' difficulties, which all runs of a task share."""
    points = QUALITY[cell.method] if quality is None else quality
    place = [task.name for task in study.tasks].index(cell.task)
    easy = np.random.default_rng(place).random(ITEMS)
    noise = np.random.default_rng([place, cell.seed or 0, len(cell.method)]).normal(0, 0.02, ITEMS)
    right = (easy + noise < points / 100).astype(float)
    tokens = np.full(ITEMS, 10.0)
    columns = {LOSS: [(_loss(cell, place) * tokens).tolist(), tokens.tolist()]}
    columns |= {name: [right.tolist(), np.ones(ITEMS).tolist()] for name in cell.settings["metrics"] if name != LOSS}
    scores = {name: float(METRICS[name].value(np.sum(np.array(columns[name]), 1))) for name in columns}
    splits = [cell.settings["split"], *([] if cell.is_base else ["train"])]
    return {
        "data": {split: f"{data}{split}{place}" for split in splits},
        "base": None if cell.is_base else "f1",
        "versions": {"torch": "2"},
        "diverged": False,
        "trained_parameters": TRAINED.get(cell.method, 0),
        "training_loss": [2.0, 1.0],
        "seconds": {"train": 100.0, "evaluate": 20.0},
        "scores": scores,
        "items": {"count": ITEMS, "ids": f"ids{place}{cell.settings['split']}"},
        "statistics": columns,
    }


def _loss(cell: Cell, place: int) -> float:
    """Lowest at the method's best rate. The second task has more headroom."""
    if cell.is_base:
        return 3.0 + place
    best = BEST_RATES.get(cell.method, 0.02)
    return 2.0 + abs(np.log10((cell.rate or best) / best))


def write_some(study: Study, cells: Mapping[str, Cell] | list[Cell], **changes: Any) -> None:
    """Writes results of these runs."""
    for cell in cells.values() if isinstance(cells, Mapping) else cells:
        write_result(Path(study.results), cell, values_of(study, cell, **changes))


def write_all(study: Study) -> Results:
    """Writes results of all runs that the study has, one after another as the sweep decides them."""
    while True:
        results = read_results(Path(study.results))
        left = [cell for cell in schedule(study, results.losses()).cells if cell not in results]
        if not left:
            return results
        write_some(study, [cell for cell in left if cell.phase == SWEEP] or left)
