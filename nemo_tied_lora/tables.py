# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal and for Markdown pages. A column holds numbers where a cell below its head begins with a digit."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_table", "text_table"]

_Rows = Sequence[Sequence[str]]


def text_table(rows: _Rows, *, total: bool = False) -> str:
    """For the terminal: words to the left, numbers to the right, a rule under the head.

    Args:
        rows: the head, then the body, with as many cells each.
        total: the last row is a sum: a rule above it too.
    """
    widths, numbers = _widths(rows), _numbers(rows)
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    if total:
        lines.insert(-1, rule)
    return "\n".join([lines[0], rule, *lines[1:]])


def markdown_table(rows: _Rows, *, padded: bool = False) -> str:
    """For a Markdown page, numbers to the right; padded: for the terminal too, all cells padded on the right.

    Args:
        rows: the head, then the body, with as many cells each.
    """
    rule = ["---:" if number else "---" for number in _numbers(rows)]
    if padded:
        widths = _widths(rows)
        rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        rule = ["-" * (width + 2) for width in widths]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def _widths(rows: _Rows) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _numbers(rows: _Rows) -> list[bool]:
    return [any(cell[:1].isdigit() for cell in column[1:]) for column in zip(*rows, strict=True)]
