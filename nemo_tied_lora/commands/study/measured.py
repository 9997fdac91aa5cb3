# SPDX-License-Identifier: Apache-2.0
"""Makes the numbers of a result from the predictions that `tied-lora evaluate` has written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_tied_lora.tasks.evaluation import RESULTS_FILE
from nemo_tied_lora.tasks.metrics import metrics_of

__all__ = ["item_checksum", "measured"]


def measured(output: Path, items_file: Path, settings: Mapping[str, Any], marker: str | None) -> dict[str, Any]:
    """Computes each metric of a run, and keeps the statistics of each item, so that intervals need no predictions.

    Args:
        output: the folder of the evaluation, with the predictions of one adapter or of the base.
        items_file: the items that it answered.
        settings: of the run; `metrics` are computed.
        marker: the task's, before the final answer.

    Returns:
        `scores`, `items` and `statistics` of a result.
    """
    items = _lines(items_file)
    adapters = json.loads((output / RESULTS_FILE).read_text())["adapters"]
    (found,) = (output / facts["predictions"] for facts in adapters.values())
    predictions = _lines(found)
    if [one["id"] for one in predictions] != [item["id"] for item in items]:
        raise ValueError(f"{found}: its items are not those of {items_file}")
    names = settings["metrics"]
    metrics = [
        metric for metric in metrics_of(names, choice="endings" in items[0], marker=marker) if metric.name in names
    ]
    statistics = {metric.name: metric.statistics(items, predictions) for metric in metrics}
    scores = {metric.name: float(f"{float(metric.value(statistics[metric.name].sum(0))):.6g}") for metric in metrics}
    return {
        "scores": scores,
        "items": {"count": len(items), "ids": item_checksum(items), **_groups(items)},
        "statistics": {name: columns.T.tolist() for name, columns in statistics.items()},
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def item_checksum(items: Sequence[Mapping[str, Any]]) -> str:
    """Differs if the items, or their order, differ."""
    return hashlib.sha256("\n".join(item["id"] for item in items).encode()).hexdigest()[:16]


def _groups(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The names of the items' groups, and the number of each item's group."""
    of = [str(item.get("group")) for item in items]
    names = sorted(set(of))
    return {"groups": {"names": names, "of": [names.index(name) for name in of]}} if names != ["None"] else {}
