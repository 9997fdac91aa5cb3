# SPDX-License-Identifier: Apache-2.0
"""The layout of tables. Pure text."""

from __future__ import annotations

import pytest

from nemo_tied_lora.tables import markdown_table, text_table

ROWS = [("name", "number", "share", ""), ("u", "1,024", "-", "few"), ("  B", "8", "12.5%", ""), ("sum", "", "3%", "")]


def test_words_are_left_aligned_and_numbers_right_aligned_under_a_rule() -> None:
    assert text_table(ROWS).splitlines() == [
        "name  number  share",
        "------------------------",
        "u      1,024      -  few",
        "  B        8  12.5%",
        "sum              3%",
    ]


def test_a_sum_has_a_rule_above_it() -> None:
    lines = text_table(ROWS, total=True).splitlines()
    assert lines[4] == lines[1]
    assert lines[:4] + lines[5:] == text_table(ROWS).splitlines()


def test_a_table_may_have_only_a_head() -> None:
    assert text_table([("a", "b")]) == "a  b\n----"
    assert markdown_table([("a", "b")]) == "| a | b |\n|---|---|"


def test_markdown_marks_the_columns_of_numbers() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| name | number | share |  |",
        "|---|---:|---:|---|",
        "| u | 1,024 | - | few |",
        "|   B | 8 | 12.5% |  |",
        "| sum |  | 3% |  |",
    ]


def test_padded_markdown_is_aligned_in_a_terminal() -> None:
    assert markdown_table(ROWS[:2], padded=True).splitlines() == [
        "| name | number | share |     |",
        "|------|--------|-------|-----|",
        "| u    | 1,024  | -     | few |",
    ]


def test_a_row_that_lacks_a_cell_is_an_error() -> None:
    for table in (text_table, markdown_table):
        with pytest.raises(ValueError, match="zip"):
            table([("a", "b"), ("1",)])
