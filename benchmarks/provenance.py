# SPDX-License-Identifier: Apache-2.0
"""The origin of a measurement: date, commit, versions, processor."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nemo_tied_lora.planning.versions import git, installed_version

__all__ = ["provenance"]

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "megatron-core", "nemo_toolkit", "numpy", "nemo_tied_lora")


def provenance(threads: int) -> dict[str, Any]:
    """The first fields of every benchmark's JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git(ROOT, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(git(ROOT, "status", "--porcelain", "--", "nemo_tied_lora", "benchmarks")),
        "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
