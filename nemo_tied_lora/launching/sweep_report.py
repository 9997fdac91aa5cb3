# SPDX-License-Identifier: Apache-2.0
"""Makes one table and one picture of a sweep, from its index file and the `metrics.json` of each run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import write_atomically, write_json
from nemo_tied_lora.launching.sweep import read_index
from nemo_tied_lora.plots import picture
from nemo_tied_lora.tables import markdown_table

__all__ = ["gather", "table", "write_report"]

_COLUMNS = {
    "trained_parameters": ("trained", "{:,}"),
    "share_of_lora": ("of LoRA", "{:.1%}"),
    "validation_loss": ("validation loss", "{:.4f}"),
    "exact_match": ("exact match", "{:.1%}"),
    "training_loss": ("last training loss", "{:.4f}"),
    "steps": ("steps", "{:,}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "wall_seconds": ("seconds", "{:,.0f}"),
}


def gather(folder: Path) -> list[dict[str, Any]]:
    """Returns one row per run, in the order of the index: folder, swept keys, and numbers if it has finished.

    Raises:
        ConfigError: the folder has no readable index.
    """
    index = folder / "sweep.tsv"
    try:
        runs = list(read_index(index.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError([f"folder={folder}: {error.strerror}: {index}; name a sweep's folder"]) from None
    return [_row(folder / Path(place).name, overrides) for place, overrides in runs]


def write_report(folder: Path) -> str:
    """Writes report.json, report.md and report.png into the sweep's folder; returns the table."""
    rows = gather(folder)
    text = table(rows)
    write_json(folder / "report.json", {"runs": rows})
    write_atomically(folder / "report.md", text.encode())
    if any("validation_loss" in row for row in rows):
        _draw(folder / "report.png", rows)
    return text


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table: the swept keys, each number that some run has, and the state of each run."""
    swept = list(dict.fromkeys(key for row in rows for key in row["swept"]))
    numbers = [key for key in _COLUMNS if any(key in row for row in rows)]
    cells = [["run", *(key.rpartition(".")[2] for key in swept), *(_COLUMNS[key][0] for key in numbers), "state"]]
    for row in rows:
        values = [_COLUMNS[key][1].format(row[key]) if row.get(key) is not None else "" for key in numbers]
        cells.append([Path(row["folder"]).name, *(row["swept"].get(key, "") for key in swept), *values, row["state"]])
    return markdown_table(cells, padded=True) + "\n"


def _row(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    row: dict[str, Any] = {"folder": str(folder), "swept": {key: value for key, _, value in pairs}}
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {**row, "state": "started, not finished" if (folder / "logs").exists() else "not started"}
    except (OSError, ValueError) as error:
        return {**row, "state": f"metrics.json cannot be read: {error}"}
    last = metrics["validations"][-1] if metrics.get("validations") else {}
    steps = metrics.get("steps") or []
    lora = metrics.get("lora_parameters")
    numbers = {
        "trained_parameters": metrics.get("trained_parameters"),
        "share_of_lora": metrics["trained_parameters"] / lora if lora else None,
        "validation_loss": last.get("validation_loss"),
        "exact_match": last.get("validation_exact_string_match"),
        "training_loss": steps[-1].get("loss") if steps else None,
        "steps": len(steps),
        "tokens_per_second": metrics.get("tokens_per_second"),
        "wall_seconds": metrics.get("wall_seconds"),
    }
    return {**row, "state": "finished", **{key: value for key, value in numbers.items() if value is not None}}


def _draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws validation loss over trained parameters. A line joins runs that differ only in rank."""
    series: dict[str, list[tuple[int, float, str]]] = {}
    for row in rows:
        if "validation_loss" in row:
            short = {key.rpartition(".")[2]: value for key, value in row["swept"].items()}
            rank = short.pop("rank", None)
            label = ", ".join(f"{key}={value}" for key, value in short.items()) or "all runs"
            point = (row["trained_parameters"], row["validation_loss"], "" if rank is None else f"rank {rank}")
            series.setdefault(label, []).append(point)
    with picture(path, width=8, height=5) as axes:
        for label, found in series.items():
            points = sorted(found)
            axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", label=label)
            for trained, loss, note in points:
                axes.annotate(note, (trained, loss), textcoords="offset points", xytext=(5, 6), fontsize=8)
        axes.set(xscale="log", xlabel="trained parameters", ylabel="validation loss (nats per answer token)")
        finished = sum("validation_loss" in row for row in rows)
        axes.set_title(f"{path.parent.name}: {finished} of {len(rows)} runs")
        axes.margins(x=0.1, y=0.12)
