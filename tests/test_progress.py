# SPDX-License-Identifier: Apache-2.0
"""Progress in a file is a line every so often, and one at the end; on a terminal it is a bar. Pure Python."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
from typing import Any

import pytest

from nemo_tied_lora import progress
from nemo_tied_lora.progress import EVERY_S, Progress, SoOften, shows_bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bar(file: io.StringIO, **settings: Any) -> Progress:
    return Progress(total=300, desc="merging", unit="tensor", file=file, **settings)


def test_a_file_gets_a_line_every_half_minute_and_the_last() -> None:
    file, now = io.StringIO(), [0.0]
    shown = bar(file)
    shown._time = lambda: now[0]
    shown.start_t = shown.last_print_t = 0.0
    for _ in range(300):  # 75 s in steps of a quarter of a second
        now[0] += 0.25
        shown.update(1)
    shown.close()
    lines = file.getvalue().splitlines()
    assert lines == [
        "merging: 120 of 300 tensor, 45 s left",
        "merging: 240 of 300 tensor, 15 s left",
        "merging: 300 of 300 tensor, 1 min 15 s",
    ]
    assert "\r" not in file.getvalue()


def test_short_work_is_one_line_and_no_work_is_none() -> None:
    file = io.StringIO()
    assert list(Progress([1, 2, 3], desc="packing", unit="file", file=file)) == [1, 2, 3]
    assert file.getvalue() == "packing: 3 of 3 file, 0 s\n"
    file = io.StringIO()
    assert list(Progress([], desc="packing", unit="file", file=file)) == []
    assert file.getvalue() == ""


def test_work_without_a_known_end_is_counted() -> None:
    file = io.StringIO()
    with Progress(desc="fitting", unit="iteration", file=file) as shown:
        shown.update()
        shown.set_postfix_str("relative error 0.1", refresh=False)
        shown.update()
    assert file.getvalue() == "fitting: 2 iteration, 0 s\n"


def test_bytes_have_a_unit() -> None:
    file = io.StringIO()
    with Progress(total=3 * 10**9, desc="copying", unit="B", unit_scale=True, file=file) as shown:
        shown.update(3 * 10**9)
    assert file.getvalue() == "copying: 3.00G of 3.00G B, 0 s\n"


def test_a_terminal_gets_a_bar() -> None:
    file = Terminal()
    with bar(file) as shown:
        shown.update(300)
    assert "\rmerging: 100%|" in file.getvalue()


@pytest.mark.parametrize(("columns", "bars"), [(80, True), (0, False)])
def test_a_terminal_without_a_width_gets_lines(columns: int, bars: bool) -> None:
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with os.fdopen(slave, "w") as terminal:
            assert shows_bars(terminal) == bars
    finally:
        os.close(master)


def test_the_first_line_is_due_at_once_and_the_next_after_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    due = SoOften()
    found = []
    for _ in range(70):
        found.append(due())
        now[0] += 1
    assert [second for second, is_due in enumerate(found) if is_due] == [0, EVERY_S, 2 * EVERY_S]
