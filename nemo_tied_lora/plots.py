# SPDX-License-Identifier: Apache-2.0
"""What all pictures share: no display, a grid, a file that is never half written."""

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
    """Axes to draw on (sizes in inches); on leaving, a grid and a legend are added and the PNG is written."""
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
def panels(path: Path, number: int, *, width: float, height: float, title: str) -> Iterator[Any]:
    """So many axes under each other (sizes in inches); on leaving, the PNG is written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(number, 1, figsize=(width, height), layout="constrained", squeeze=False)
    try:
        figure.suptitle(title, fontsize="medium")
        yield list(axes[:, 0])
        content = io.BytesIO()
        figure.savefig(content, dpi=120, format="png")
    finally:
        plt.close(figure)
    write_atomically(path, content.getvalue())
