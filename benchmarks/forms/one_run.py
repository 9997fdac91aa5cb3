# SPDX-License-Identifier: Apache-2.0
"""Does one run, and makes its result."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.study.measured import item_checksum
from nemo_tied_lora.commands.study.task_files import TaskFiles
from nemo_tied_lora.planning.versions import installed_version

from .batches import Encoder, training_batches
from .cells import ACCURACY, LOSS, Cell
from .factors import Factors
from .form import Form, trained_parameters
from .gradient_start import GradientDirections
from .llama import FrozenLlama
from .training import Recipe, answer_losses, train

__all__ = ["Bench"]

_PARTS = 10
_PACKAGES = ("nemo_tied_lora", "torch", "tokenizers", "numpy")


class Bench:
    """A loaded base with the data of its tasks: does runs one after the other.

    Args:
        folder: the Hugging Face folder.
        fingerprint: of the base, for the results.
        files: a task's name to its files.
    """

    def __init__(self, folder: Path, fingerprint: str, files: Callable[[str], TaskFiles]) -> None:
        self._model, self._encoder = FrozenLlama(folder), Encoder(folder)
        self._fingerprint, self._files = fingerprint, lru_cache(maxsize=None)(files)

    def result(self, cell: Cell) -> dict[str, Any]:
        """Trains and measures. Returns the values of `write_result`."""
        settings, files = cell.settings, self._files(cell.settings["task"])
        began, cpu = time.monotonic(), time.process_time()
        values: dict[str, Any] = {"diverged": False, "trained_parameters": 0, "training_loss": None}
        apply = self._model.plain
        if settings["form"] is not None:
            factors, losses, count = self._trained(settings, files)
            apply = factors.apply
            values |= {"trained_parameters": count, "training_loss": _parts(losses)}
            values["diverged"] = not math.isfinite(losses[-1])
        trained = time.monotonic()
        values |= {"scores": {}, "items": {"count": 0, "ids": ""}, "statistics": {}}
        if not values["diverged"]:
            values |= self._measured(settings, files, apply)
            values["diverged"] = not math.isfinite(values["scores"][LOSS])
            if values["diverged"]:
                values |= {"scores": {}, "statistics": {}}
        splits = [settings["split"], *(["train"] if settings["form"] is not None else [])]
        return {
            "data": {split: files.checksums[split] for split in splits},
            "versions": {name: installed_version(name) for name in _PACKAGES},
            **values,
            "base": self._fingerprint,
            "seconds": {"train": round(trained - began, 1), "evaluate": round(time.monotonic() - trained, 1)},
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "load": round(os.getloadavg()[0], 1),
        }

    def _trained(self, settings: Any, files: TaskFiles) -> tuple[Factors, list[float], int]:
        """The trained factors, the losses, and how many parameters they are."""
        form, model = Form.of(settings["form"]), self._model
        longest, steps = settings["max_seq_length"], settings["steps"]
        batches = training_batches(
            self._encoder, files.train, steps=steps, batch=settings["batch"], seed=settings["seed"], longest=longest
        )
        directions = None
        if settings["start_batches"]:
            directions = GradientDirections(model, form, batches[: settings["start_batches"]], settings["seed"])
        factors = Factors(form, model.sizes.linears, model.sizes.layers, seed=settings["seed"], directions=directions)
        recipe = Recipe(
            learning_rate=settings["learning_rate"],
            multipliers=settings["multipliers"],
            steps=steps,
            warmup_steps=settings["warmup_steps"],
            weight_decay=settings["weight_decay"],
            clip=settings["clip"],
        )
        if form.keep is None:
            count = sum(tensor.numel() for tensor in factors.trained.values())
            assert count == trained_parameters(form, model.sizes.linears, model.sizes.layers)
            losses = train(model, factors, batches, recipe)
        else:
            from .pruning import Pruning

            pruning = Pruning(factors, model.sizes.linears, model.sizes.layers, steps)
            losses = train(model, factors, batches, recipe, pruning.observe)
            count = pruning.kept()
        factors.prepare()
        return factors, losses, count

    def _measured(self, settings: Any, files: TaskFiles, apply: Any) -> dict[str, Any]:
        items = _lines(files.items[settings["split"]])
        pairs = [self._encoder.pair(item) for item in items]
        marks = [_mark(self._encoder, item) for item in items] if ACCURACY in settings["metrics"] else None
        losses, chosen = answer_losses(self._model, apply, pairs, marks)
        nats, tokens = (list(column) for column in zip(*losses, strict=True))
        scores = {LOSS: float(f"{sum(nats) / sum(tokens):.6g}")}
        statistics: dict[str, list[list[float]]] = {LOSS: [nats, tokens]}
        if marks is not None:
            right = [float(one == item["label"]) for one, item in zip(chosen, items, strict=True)]
            scores[ACCURACY] = round(100 * sum(right) / len(right), 4)
            statistics[ACCURACY] = [right, [1.0] * len(right)]
        return {
            "scores": scores,
            "items": {"count": len(items), "ids": item_checksum(items)},
            "statistics": statistics,
        }


def _mark(encoder: Encoder, item: dict[str, Any]) -> list[int]:
    """The place of the token in which the endings differ, and that token of each ending.

    Raises:
        ValueError: the endings differ in more than one token.
    """
    endings = [encoder.ids(ending) for ending in item["endings"]]
    length = len(endings[0])
    places = [n for n in range(length) if len({ids[n] for ids in endings if len(ids) == length}) > 1]
    if len(places) != 1 or {len(ids) for ids in endings} != {length}:
        raise ValueError(f"{item['id']}: its endings differ in more than one token")
    return [places[0], *(ids[places[0]] for ids in endings)]


def _parts(losses: Sequence[float]) -> list[float | None]:
    """The training loss in ten parts of the run, each a mean over its steps."""
    bounds = [round(part * len(losses) / _PARTS) for part in range(_PARTS + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(bounds) if b > a]
    return [round(mean, 4) if math.isfinite(mean) else None for mean in means]


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
