# SPDX-License-Identifier: Apache-2.0
"""What the quickstart on SmolLM2 prints: the metric before and after, what was trained, examples, and where things are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_tied_lora.tables import duration, markdown_table
from nemo_tied_lora.tasks.task import Task

__all__ = ["report"]

_SHOWN, _WIDTH = 5, 44


def report(task: Task, metrics: Mapping[str, Any], folder: Path, adapter: Path, evaluation: Path) -> str:
    """The report as Markdown.

    Args:
        metrics: the quickstart's metrics.json.
        evaluation: the folder with results.json and the predictions.
    """
    results = metrics["evaluation"]
    share = metrics["trained_parameters"] / metrics["lora_parameters"]
    seconds = metrics["seconds"]
    time = "Time of this call, which continued another" if metrics["continued"] else "Time"
    parts = ", ".join(f"{name} {duration(spent)}" for name, spent in seconds.items())
    return f"""
## {_base_name(metrics["base"])}: {task.family or task.name}, {metrics["preset"]} on {metrics["layout"]}

{_headline(results)}
Trained parameters: {metrics["trained_parameters"]:,}, **{share:.1%}** of LoRA's {metrics["lora_parameters"]:,} \
at the same rank, {metrics["trained_parameters"] / metrics["base_parameters"]:.2%} of the base's.
{time}: {duration(sum(seconds.values()))} ({parts}). Memory: {metrics["peak_memory_bytes"] / 2**30:.1f} GiB at most, \
all processes.

{markdown_table(list(_examples(task, results, evaluation)), padded=True)}

```
{metrics["parameter_table"]}

adapter   {adapter} ({adapter.stat().st_size:,} bytes)
picture   {folder / "loss.png"}
numbers   {folder / "metrics.json"}
answers   {evaluation}
```
"""


def _base_name(record: Mapping[str, Any]) -> str:
    if not record.get("name"):
        return "The base"
    quantised = str(record.get("quantisation", "")).partition(" ")[0]
    return f"{record['name']}{f', dequantised from {quantised}' if quantised else ''}"


def _headline(results: Mapping[str, Any]) -> str:
    """The primary metric before and after, its paired difference, and the answers' loss."""
    (before, after), (difference,) = list(results["adapters"].values()), results["differences"]
    primary = results["primary"]
    lines = []
    for name in dict.fromkeys((primary, "answer_loss")):
        described = results["metrics"][name]
        unit = described["unit"]
        title = (
            described["title"][0].upper()
            + described["title"][1:]
            + (f" on {results['items']:,} held-out items" if name == primary else "")
        )
        one, two, change = (part["metrics"][name] for part in (before, after, difference))
        bold = "**" if name == primary else ""
        lines.append(
            f"{title}: {_number(one, unit)} before, {bold}{_number(two, unit)} after{bold}, "
            f"a difference of {_number(change, unit, '+')} {unit}."
        )
    return "\n".join([*lines, f"In brackets: {results['interval']['level']:.0%} intervals over items."])


def _number(found: Mapping[str, float | None], unit: str, sign: str = "") -> str:
    digits = 1 if unit == "points" else 3
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "not finite"
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _examples(task: Task, results: Mapping[str, Any], evaluation: Path) -> Iterator[Sequence[str]]:
    """Some items from the whole test set, evenly spaced, with the answers of the base and of the adapted model."""
    items = _lines(Path(results["task"]["folder"]) / "test.jsonl")
    base, adapted = (_lines(evaluation / facts["predictions"]) for facts in results["adapters"].values())
    # A translation may be right without being equal to the reference.
    by_equality = task.is_choice or results["primary"] in ("exact_match", "maths_exact_match")
    yield ("prompt", "base", "adapted", "right" if by_equality else "reference")
    for number in range(0, len(items), max(1, -(-len(items) // _SHOWN))):
        item = items[number]
        answers = [_answer(item, predictions[number]) for predictions in (base, adapted)]
        expected = item["references"][0] if item.get("references") else item["output"]
        if by_equality and answers[1].strip() == expected.strip():
            last = "yes"
        else:
            last = f"no: {_short(expected)}" if by_equality else _short(expected)
        yield (_short(item["input"]), *(_short(answer) for answer in answers), last)


def _answer(item: Mapping[str, Any], prediction: Mapping[str, Any]) -> str:
    """The generated text, or the ending that the model prefers."""
    if "endings" in prediction:
        nats = [loss for loss, _ in prediction["endings"]]
        return str(item["endings"][nats.index(min(nats))])
    return str(prediction.get("completion", ""))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _short(text: str) -> str:
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= _WIDTH else flat[: _WIDTH - 3] + "..."
