# SPDX-License-Identifier: Apache-2.0
"""Draws an adapter as heat maps over layers and linears: the size of u and v, and the effective rank of the update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_tied_lora.adapter.update_statistics import LayerFacts
from nemo_tied_lora.plots import panels

__all__ = ["digits_that_differ", "draw_adapter", "panels_of"]

_PANELS = {
    "u": "root mean square of u",
    "v": "root mean square of v",
    "rank": "effective rank of the update",
}


def draw_adapter(path: Path, facts: Sequence[LayerFacts], title: str) -> None:
    """Draws up to three heat maps, one row per linear and one column per layer; see `panels_of`."""
    targets = list(dict.fromkeys(fact.target for fact in facts))
    layers = sorted({fact.layer for fact in facts})
    shown = panels_of(facts)
    width = min(16.0, max(7.0, 2.5 + 0.32 * len(layers)))
    height = 1.2 + len(shown) * max(1.3, 0.75 + 0.26 * len(targets))
    with panels(path, len(shown), width=width, height=height, title=title) as all_axes:
        for axes, what in zip(all_axes, shown, strict=True):
            cells = np.full((len(targets), len(layers)), np.nan)
            for fact in facts:
                value = fact.effective_rank if what == "rank" else fact.rms.get(what, np.nan)
                cells[targets.index(fact.target), layers.index(fact.layer)] = value
            _draw(axes, cells, targets, layers, _PANELS[what])
        all_axes[-1].set_xlabel("layer")


def panels_of(facts: Sequence[LayerFacts]) -> tuple[str, ...]:
    """The heat maps to draw: `rank` always; `u` and `v` only if the file holds them, because a frozen one is 1."""
    return tuple(what for what in _PANELS if what == "rank" or any(what in fact.rms for fact in facts))


def _draw(axes: Any, cells: np.ndarray, targets: Sequence[str], layers: Sequence[int], label: str) -> None:
    axes.set_title(label, fontsize="medium", loc="left")
    image = axes.imshow(np.ma.masked_invalid(cells), aspect="auto", cmap="viridis", interpolation="nearest")
    step = -(-len(layers) // 32)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_yticks(range(len(targets)), targets)
    axes.tick_params(labelsize="small", length=0)
    axes.figure.colorbar(image, ax=axes, pad=0.01)
    if cells.size <= 160:
        _write_values(axes, cells, image)


def _write_values(axes: Any, cells: np.ndarray, image: Any) -> None:
    """Writes each value into its cell, dark on light or light on dark, with enough digits to tell the cells apart."""
    digits = min(
        digits_that_differ(cells[np.isfinite(cells)]), 4 if cells.shape[1] <= 16 else 3
    )  # narrow cells have less room
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            color = "black" if image.norm(value) > 0.6 else "white"
            axes.text(column, row, f"{value:#.{digits}g}", ha="center", va="center", color=color, fontsize="x-small")


def digits_that_differ(values: np.ndarray) -> int:
    """Significant digits, 2 to 4, so that the range of the values is about ten steps of the last digit."""
    largest, spread = float(np.abs(values).max(initial=0.0)), float(np.ptp(values)) if values.size else 0.0
    if not largest or not spread:
        return 2
    return int(np.clip(np.floor(np.log10(largest / spread) + 0.7) + 2, 2, 4))
