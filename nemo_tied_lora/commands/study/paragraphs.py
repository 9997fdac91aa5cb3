# SPDX-License-Identifier: Apache-2.0
"""Paragraphs and numbers of the pages that show results."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from nemo_tied_lora.tasks.intervals import Interval

__all__ = ["interval_text", "paragraph", "rounded"]


def paragraph(text: str) -> str:
    """Filled to the width of the pages. A list item's further lines are indented."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 119, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def interval_text(found: Interval | None, *, signed: bool = False, digits: int = 1) -> str:
    """ "1.2 [1.0, 1.4]"; empty for None."""
    if found is None:
        return ""
    sign = "+" if signed else ""
    value, low, high = (f"{number:{sign}.{digits}f}" for number in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def rounded(value: Any) -> Any:
    """Numbers with six digits, so that another machine's rounding does not change a page; null for one that is not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value
