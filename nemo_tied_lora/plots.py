# SPDX-License-Identifier: Apache-2.0
"""Draws PNG pictures without a display, and writes them atomically."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_tied_lora.files import write_atomically

__all__ = ["panels", "picture"]


@contextmanager
def picture(path: Path, *, width: float = 8.0, height: float = 4.5) -> Iterator[Any]:
    """Yields axes to draw on. At the end, adds a grid and a legend, and writes the PNG. Sizes are in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    try:
        yield axes
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend()
        content = io.BytesIO()
        figure.savefig(content, dpi=120, format="png")
    finally:
        plt.close(figure)
    write_atomically(path, content.getvalue())


@contextmanager
def panels(path: Path, rows: int, *, columns: int = 1, width: float, height: float, title: str) -> Iterator[Any]:
    """Yields the axes of a grid, row by row. At the end, writes the PNG. Sizes are in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    try:
        figure.suptitle(title, fontsize="medium")
        yield list(axes.flat)
        content = io.BytesIO()
        figure.savefig(content, dpi=120, format="png")
    finally:
        plt.close(figure)
    write_atomically(path, content.getvalue())
