# SPDX-License-Identifier: Apache-2.0
"""Makes results of predictions: each metric with its interval, by group, and the paired differences of adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from nemo_tied_lora.tables import markdown_table
from nemo_tied_lora.tasks.intervals import LEVEL, RESAMPLES, Interval, interval, resampled_sums
from nemo_tied_lora.tasks.metrics import Item, Metric, Prediction

__all__ = ["SEED", "measured", "results_table"]

SEED = 1234
"""Of the bootstrap, so that the same predictions always give the same intervals."""
_MOST_PAIRS = 4
"""Up to so many adapters, the table shows the differences of all pairs; JSON always has them."""


def measured(
    items: Sequence[Item],
    predictions: Mapping[str, Sequence[Prediction]],
    metrics: Sequence[Metric],
    *,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Measures all adapters on the same items.

    Args:
        items: lines of test.jsonl.
        predictions: an adapter's name to one prediction for each item.
        metrics: the primary one first.

    Returns:
        {"items", "primary", "interval", "metrics": {name: {title, unit, greater_is_better, signature}},
        "adapters": {name: {"metrics": {metric: {value, low, high}}}}, "differences": [{first, second, metrics}],
        "groups": {group: {items, adapters, differences}}}. A difference is second minus first.
    """
    statistics = {name: [metric.statistics(items, its) for metric in metrics] for name, its in predictions.items()}
    groups = dict.fromkeys(str(item["group"]) for item in items if item.get("group") is not None)
    rows = {group: np.array([str(item.get("group")) == group for item in items]) for group in groups}
    return {
        "primary": metrics[0].name,
        "interval": {
            "level": LEVEL,
            "method": "percentile bootstrap over items",
            "resamples": resamples,
            "seed": SEED,
        },
        "metrics": {metric.name: _described(metric, items) for metric in metrics},
        **_numbers(statistics, metrics, np.ones(len(items), dtype=bool), resamples),
        "groups": {group: _numbers(statistics, metrics, rows[group], resamples) for group in groups},
    }


def results_table(results: Mapping[str, Any]) -> str:
    """Markdown: a table of adapters and one of differences, for all items and for each group."""
    parts = [("all", results), *results["groups"].items()]
    texts = []
    for group, part in parts:
        head = f"{part['items']:,} items" if group == "all" else f"{group}: {part['items']:,} items"
        texts.append(f"{head}\n\n{_table(results['metrics'], part)}")
    percent = f"{results['interval']['level']:.0%}"
    texts.append(
        f"In brackets: {percent} intervals over items. Differences are paired: both adapters answered the same items."
    )
    return "\n\n".join(texts)


def _described(metric: Metric, items: Sequence[Item]) -> dict[str, Any]:
    signature = {} if metric.signature is None else {"signature": metric.signature(items)}
    return {
        "title": metric.title,
        "unit": metric.unit,
        "greater_is_better": metric.greater_is_better,
        **signature,
    }


def _numbers(
    statistics: Mapping[str, Sequence[np.ndarray]], metrics: Sequence[Metric], rows: np.ndarray, resamples: int
) -> dict[str, Any]:
    """The numbers of the chosen items. All adapters and metrics share the draws of items."""
    columns = {
        (name, metric.name): (metric, found[rows])
        for name, of_metrics in statistics.items()
        for metric, found in zip(metrics, of_metrics, strict=True)
    }
    sums = resampled_sums(np.hstack([found for _, found in columns.values()]), resamples=resamples, seed=SEED)
    values, drawn, start = {}, {}, 0
    for key, (metric, found) in columns.items():
        end = start + found.shape[1]
        values[key], drawn[key], start = float(metric.value(found.sum(0))), metric.value(sums[:, start:end]), end
    adapters = {
        name: {"metrics": {m.name: _as_json(interval(values[name, m.name], drawn[name, m.name])) for m in metrics}}
        for name in statistics
    }
    differences = [
        {
            "first": first,
            "second": second,
            "metrics": {
                m.name: _as_json(
                    interval(
                        values[second, m.name] - values[first, m.name], drawn[second, m.name] - drawn[first, m.name]
                    )
                )
                for m in metrics
            },
        }
        for first, second in combinations(statistics, 2)
    ]
    return {"items": int(rows.sum()), "adapters": adapters, "differences": differences}


def _as_json(found: Interval) -> dict[str, float | None]:
    """Null in place of a number that is not finite, as the loss of a model that diverged is."""
    return {key: round(value, 6) if math.isfinite(value) else None for key, value in asdict(found).items()}


def _table(metrics: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    titles = [described["title"] for described in metrics.values()]
    counted = any("trained_parameters" in found for found in part["adapters"].values())
    rows = [("adapter", *(["trained"] if counted else []), *titles)]
    for name, found in part["adapters"].items():
        trained = [f"{found.get('trained_parameters', 0):,}"] if counted else []
        rows.append((name, *trained, *(_shown(found["metrics"][key], metrics[key]["unit"]) for key in metrics)))
    table = markdown_table(rows, padded=True)
    pairs = part["differences"]
    if len(part["adapters"]) > _MOST_PAIRS:
        pairs = [pair for pair in pairs if pair["first"] == next(iter(part["adapters"]))]
    if not pairs:
        return table
    rows = [("difference", *titles)]
    rows += [
        (
            f"{pair['second']} - {pair['first']}",
            *(_shown(pair["metrics"][metric], metrics[metric]["unit"], sign="+") for metric in metrics),
        )
        for pair in pairs
    ]
    return f"{table}\n\n{markdown_table(rows, padded=True)}"


def _shown(found: Mapping[str, float | None], unit: str, sign: str = "") -> str:
    numbers = [found[key] for key in ("value", "low", "high")]
    if any(number is None for number in numbers):
        return "not finite"
    digits = 1 if unit == "points" else 3
    value, low, high = (f"{number:{sign}.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"
