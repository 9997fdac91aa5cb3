# SPDX-License-Identifier: Apache-2.0
"""Writes docs/forms.md and the sweep in docs/learning_rates.md, with their numbers and pictures, from results alone."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_tied_lora.commands.study.paragraphs import paragraph, rounded
from nemo_tied_lora.commands.study.results import read_results
from nemo_tied_lora.files import write_atomically, write_json

from . import forms_page, forms_picture, rates_page
from .plan import FORMS, RATES, read_plan
from .text import between_markers

__all__ = ["MARKER", "STEP_TIME", "write"]

MARKER = "sweep"
"""The part of docs/learning_rates.md that is written here."""
STEP_TIME = "forms_step.json"
"""What `python -m benchmarks.forms step` has measured, beside the page."""
_LINE = f"<!-- {MARKER}: written by python -m benchmarks.forms page -->"
_ABOUT = (
    "A form of adapter at a rank has a best learning rate, and it differs much: in [study.md](study.md) it is 0.005 for LoRA "
    "and 0.02 for TL6, both of rank 8. Here is measured which multipliers of `model.optim.lr` for each factor let one "
    "learning rate serve all ranks and presets."
)
_NEW = f"# Learning rates\n\n{paragraph(_ABOUT)}\n\n## The sweep\n\n{_LINE}\n\n<!-- end of {MARKER} -->\n"


def write(results: Path, docs: Path) -> int:
    """Writes all files. Returns the exit code.

    Raises:
        ConfigError: results contradict each other, or the page lost its markers.
    """
    found = read_results(results)
    rates, forms = read_plan(RATES), read_plan(FORMS)
    page, measured = docs / "learning_rates.md", docs / STEP_TIME
    steps = json.loads(measured.read_text()) if measured.exists() else None
    text = between_markers(
        page.read_text() if page.exists() else _NEW, MARKER, rates_page.sweep_text(rates, found), page
    )
    rates_page.draw(docs / rates_page.PICTURE, rates, found)
    forms_picture.draw(docs / forms_picture.PICTURE, forms, found)
    files = [
        write_atomically(page, text.encode()),
        write_json(docs / "learning_rates.json", rounded(rates_page.sweep_values(rates, found))),
        write_atomically(docs / "forms.md", forms_page.page_text(forms, found, steps).encode()),
        write_json(docs / "forms.json", rounded(forms_page.page_values(forms, found))),
        docs / rates_page.PICTURE,
        docs / forms_picture.PICTURE,
    ]
    print("\n".join(f"wrote {file}" for file in files))
    return 0
