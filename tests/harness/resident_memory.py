# SPDX-License-Identifier: Apache-2.0
"""Measures the memory that a call needs, by the kernel's count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["memory_of"]


def memory_of(call: Callable[[], Any]) -> int:
    """Bytes of resident memory that the call adds at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory("VmRSS")
    result = call()
    peak = _memory("VmHWM")
    del result
    return peak - before


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
