# SPDX-License-Identifier: Apache-2.0
"""The part of a page between two markers."""

from __future__ import annotations

from pathlib import Path

from nemo_tied_lora.errors import ConfigError

__all__ = ["between_markers"]


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
