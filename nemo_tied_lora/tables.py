# SPDX-License-Identifier: Apache-2.0
"""Makes durations readable, and tables for the terminal and for Markdown.

A column is numeric if a cell below its head begins with a digit.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["duration", "markdown_table", "text_table"]

_Rows = Sequence[Sequence[str]]


def text_table(rows: _Rows, *, total: bool = False) -> str:
    """Returns a table for the terminal: words left-aligned, numbers right-aligned, a rule under the head.

    Args:
        rows: the head, then the body. All rows have the same number of cells.
        total: the last row is a sum, and gets a rule above it.
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
    """Returns a Markdown table with right-aligned numbers.

    Args:
        rows: the head, then the body. All rows have the same number of cells.
        padded: pad all cells on the right, so that the table is readable in a terminal too.
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


def duration(seconds: float) -> str:
    """Returns "2 h 5 min", "3 min 20 s" or "7 s"."""
    whole = max(0, int(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
