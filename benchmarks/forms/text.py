# SPDX-License-Identifier: Apache-2.0
"""Paragraphs, numbers and markers of the pages."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.tasks.intervals import Interval

__all__ = ["between_markers", "interval_text", "paragraph", "rounded"]


def paragraph(text: str) -> str:
    """Filled to the width of the pages. A list item's further lines are indented."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 119, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def interval_text(found: Interval | None, *, signed: bool = False, digits: int = 3) -> str:
    """ "1.234 [1.2, 1.3]"; empty for None."""
    if found is None:
        return ""
    sign = "+" if signed else ""
    value, low, high = (f"{number:{sign}.{digits}f}" for number in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def rounded(value: Any) -> Any:
    """Numbers with six digits, so that another machine's rounding does not change a page; null for one that is not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def between_markers(page: str, name: str, text: str, path: Path) -> str:
    """The page with the text between `<!-- NAME ... -->` and `<!-- end of NAME -->` replaced.

    Raises:
        ConfigError: the page lacks the markers.
    """
    start, end = page.find(f"<!-- {name}:"), page.find(f"<!-- end of {name} -->")
    if start < 0 or end < start:
        raise ConfigError(
            [f"{path}: has no part between <!-- {name}: ... --> and <!-- end of {name} -->; restore them"]
        )
    begin = page.index("-->", start) + 3
    return f"{page[:begin]}\n\n{text}\n\n{page[end:]}"
