# SPDX-License-Identifier: Apache-2.0
"""`tied-lora report`: gathers the runs of a sweep into one table and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.local_command import run_composed
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.launching.sweep_report import write_report

__all__ = ["SUMMARY", "main"]

SUMMARY = "gather the runs of a sweep into one table and one picture"

_EXAMPLES = """  tied-lora report folder=runs/ranks
"""


def main(argv: list[str]) -> int:
    """Prints the table and writes report.md, report.json and report.png. Returns 0, or 2 if there is no sweep."""
    return run_composed("report", argv, _report, summary=SUMMARY, examples=_EXAMPLES)


def _report(cfg: dict[str, Any]) -> int:
    if cfg["folder"] is None:
        raise ConfigError(["folder: missing; name the sweep's folder, which holds sweep.tsv"])
    folder = Path(str(cfg["folder"]))
    print(write_report(folder), end="")
    written = [
        str(folder / f"report.{kind}") for kind in ("md", "json", "png") if (folder / f"report.{kind}").exists()
    ]
    print(f"written: {', '.join(written)}")
    return 0
