# SPDX-License-Identifier: Apache-2.0
"""What one evaluation keeps on disk: its settings, each adapter's predictions, and at the end `results.json`."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_tied_lora.adapter.param_count import parameter_counts
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.files import write_json
from nemo_tied_lora.planning.nemo_model_config import nemo_config
from nemo_tied_lora.planning.versions import installed_version
from nemo_tied_lora.tasks.adapters import adapter_names
from nemo_tied_lora.tasks.checksums import file_checksum
from nemo_tied_lora.tasks.metrics import metrics_of
from nemo_tied_lora.tasks.predictions import Predictions, check_settings, write_settings
from nemo_tied_lora.tasks.prepare import Prepared
from nemo_tied_lora.tasks.results import measured
from nemo_tied_lora.tasks.task import Task

__all__ = ["RESULTS_FILE", "Evaluation"]

RESULTS_FILE = "results.json"
_PACKAGES = ("nemo_tied_lora", "nemo_toolkit", "megatron_core", "torch", "numpy", "sacrebleu", "rouge_score")
_BYTES_AN_ITEM = 8 << 10
"""Room for one adapter's prediction of an item: a generous guess."""

_READS = {"rouge_l": "knows the letters a to z and digits alone", "maths_exact_match": "compares numbers"}


class Evaluation:
    """A task's test set, a base, adapters, and the folder of their predictions.

    Args:
        split: test, or validation for a choice between adapters that the test set must not make.
        adapters: paths; None is the base alone.
        folder: where predictions and results go; None: runs/evaluate/TASK.
        precision: of the model, as `trainer.precision`.
        base_quantization: what the base's linears are held in, as "nf4/64"; None: not quantised.
    """

    def __init__(
        self,
        task: Task,
        prepared: Prepared,
        *,
        base: str,
        adapters: Sequence[str | None],
        folder: str | None,
        precision: str,
        base_quantization: str | None = None,
        split: str = "test",
    ) -> None:
        self.task, self.base, self.adapters = task, base, list(adapters)
        self.folder = Path(folder or f"runs/evaluate/{task.name}")
        self.metrics = metrics_of(task.metrics, choice=task.is_choice, marker=task.marker)
        self.names = adapter_names(self.adapters)
        self._prepared, self._precision, self._split = prepared, precision, split
        self._base_quantization = base_quantization

    @property
    def generates(self) -> bool:
        """Whether a metric compares generated texts."""
        return any(metric.needs == "generation" for metric in self.metrics)

    @cached_property
    def items(self) -> list[dict[str, Any]]:
        """The lines of the split's file."""
        return list(self._prepared.items(self._split))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What predictions depend on, besides the adapter. The layout and the sizes of batches change rounding alone."""
        task, checksum = self.task, self._prepared.record["splits"][self._split]["sha256"][:16]
        limits = {"max_new_tokens": task.max_new_tokens, "stop": list(task.stop)}
        return {
            "task": {"name": task.name, f"{self._split}_sha256": checksum},
            "base_sha256": file_checksum(Path(self.base)),
            "precision": self._precision,
            **({"base_quantization": self._base_quantization} if self._base_quantization else {}),
            "generation": limits if self.generates else None,
        }

    @cached_property
    def predictions(self) -> list[Predictions]:
        """Each adapter's, with what is on disk. A file's name holds the adapter's checksum: it is this adapter's alone."""
        needs = ["loss", "tokens"]
        needs += ["endings"] * self.task.is_choice + ["completion"] * self.generates
        return [Predictions(self.folder, name, self.items, needs) for name in self._files]

    def check(self) -> None:
        """Compares the metrics with the references and the folder with this evaluation, and looks for room on its disk.

        Raises:
            ConfigError: with all problems.
        """
        problems = Problems()
        problems += self._unreadable_references()
        problems.attempt(check_settings, self.folder, self.settings)
        needed = len(self.adapters) * self._prepared.counts[self._split] * _BYTES_AN_ITEM
        there = next(one for one in (self.folder.resolve(), *self.folder.resolve().parents) if one.is_dir())
        free = shutil.disk_usage(there).free
        if free < needed:
            problems.append(
                f"output={self.folder}: no room on disk: predictions may take {needed:,} bytes, and {free:,} are free; name "
                "a folder on another disk"
            )
        problems.raise_if_any()

    def begin(self) -> None:
        """Makes the folder this evaluation's own.

        Raises:
            ConfigError: it belongs to another one, or cannot be written.
        """
        with self.writing():
            write_settings(self.folder, self.settings)

    def keep(self, number: int, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Writes predictions of the adapter with that number.

        Raises:
            ConfigError: they cannot be written.
        """
        with self.writing():
            self.predictions[number].add(predictions)

    def complete(self, number: int) -> None:
        """Writes the whole file of the adapter with that number, which lacks no prediction.

        Raises:
            ConfigError: it cannot be written.
        """
        with self.writing():
            self.predictions[number].finish()

    def finish(self, *, resamples: int, layout: Mapping[str, int]) -> dict[str, Any]:
        """Writes `results.json` and returns its content.

        Args:
            layout: the parallel sizes of this run, for the record.

        Raises:
            ConfigError: it cannot be written.
        """
        with self.writing():
            found = dict(zip(self.names, (one.finish() for one in self.predictions), strict=True))
            results = measured(self.items, found, self.metrics, resamples=resamples)
            for name, path, file in zip(self.names, self.adapters, self._files, strict=True):
                facts: dict[str, Any] = {"adapter": path, "predictions": f"{file}.jsonl"}
                if path is not None:
                    facts |= {"sha256": file_checksum(Path(path)), "trained_parameters": _trained_parameters(path)}
                results["adapters"][name] = facts | results["adapters"][name]
            task = {"name": self.task.name, "family": self.task.family, "folder": str(self._prepared.folder)}
            head = {
                "task": task,
                "base": self.base,
                "settings": self.settings,
                "layout": dict(layout),
                "versions": {name: installed_version(name) for name in _PACKAGES},
            }
            write_json(self.folder / RESULTS_FILE, {**head, **results})
            return {**head, **results}

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns what goes wrong with the disk into a problem with a remedy.

        Raises:
            ConfigError: an OSError was raised inside.
        """
        try:
            yield
        except OSError as error:
            problem = f"output={self.folder}: cannot be written: {error.strerror or error}"
            raise ConfigError(
                [f"{problem}; what is there is kept: the same command continues once that is solved"]
            ) from None

    @cached_property
    def _files(self) -> list[str]:
        """The names of the files with predictions, without endings."""
        ends = ["" if path is None else f"-{file_checksum(Path(path))[:8]}" for path in self.adapters]
        names = [name.replace("/", "_") + end for name, end in zip(self.names, ends, strict=True)]
        for number, end in enumerate(ends):
            # An earlier list may have given the same adapter another name: names are as short as a list allows.
            there = [*self.folder.glob(f"*{end}.jsonl"), *self.folder.glob(f"*{end}.part.jsonl")] if end else []
            known = {file.name.removesuffix(".jsonl").removesuffix(".part") for file in there}
            if known and names[number] not in known:
                names[number] = min(known - set(names), default=names[number])
        return names

    def _unreadable_references(self) -> Iterator[str]:
        """Yields the metrics that no answer could satisfy. Prints those for which this holds for some items."""
        for metric in self.metrics:
            if (reads := metric.reads) is None:
                continue
            wrong = [item for item in self.items if not any(map(reads, item["references"]))]
            if not wrong:
                continue
            count = f"{len(wrong):,} of {len(self.items):,} test items have no reference that {metric.name} can read"
            example = f"{count}, such as {wrong[0]['references'][0][:40]!r}; it {_READS[metric.name]}"
            if len(wrong) == len(self.items):
                yield f"task.metrics: {metric.name}: {example}; choose another metric"
            else:
                print(f"task {self.task.name}: {example}; they count as wrong", file=sys.stderr, flush=True)


def _trained_parameters(path: str) -> int:
    description, _ = nemo_config(Path(path), "adapter")
    shapes = {group: LinearShape.from_dict(stored) for group, stored in description["targets"].items()}
    return sum(parameter_counts(shapes, TiedLoraConfig.from_mapping(description["peft"]["tied_lora"])).values())
