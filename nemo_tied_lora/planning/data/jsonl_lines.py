# SPDX-License-Identifier: Apache-2.0
"""Checks every line of a JSONL file. The file is streamed; a large one is read by several processes.

Measured: see docs/data.md.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nemo_tied_lora.planning.data.example_forms import Form, PromptExamples, read_example, with_texts
from nemo_tied_lora.planning.data.file_kinds import BOM, HEAD_BYTES, foreign_examples, foreign_file

__all__ = ["FileReport", "check_file", "examples", "is_blank"]

MOST_LISTED = 20
"""The largest number of wrong lines that are listed for each file."""

_RANGE_BYTES = 16 << 20
"""What one process reads at a time."""
_PARALLEL_BYTES = 64 << 20
"""From this size on, several processes read a file: starting them takes a tenth of a second."""
_MAX_LINE_BYTES = 256 << 20
"""A longer line is refused, because a line is held in memory."""


@dataclass
class FileReport:
    """What was found in a file, or in a part of it. Line numbers count from 1, blank lines included."""

    lines: int = 0
    examples: int = 0
    blank: int = 0
    marked: bool = False
    """Whether the file begins with a byte order mark."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many examples are of a kind that the user should know."""
    wrong: list[tuple[int, str]] = field(default_factory=list)
    """The first `MOST_LISTED` wrong lines: number and problem."""
    num_wrong: int = 0
    not_utf8: tuple[int, str] | None = None
    """The first line that is not UTF-8, and its problem."""
    num_not_utf8: int = 0
    whole: str | None = None
    """What is wrong with the file as a whole."""

    def add(self, part: FileReport) -> None:
        """Adds the report of the next part of the file."""
        before = self.lines
        self.wrong += [(before + number, text) for number, text in part.wrong]
        del self.wrong[MOST_LISTED:]
        if self.not_utf8 is None and part.not_utf8 is not None:
            self.not_utf8 = (before + part.not_utf8[0], part.not_utf8[1])
        self.marked |= part.marked
        self.whole = self.whole or part.whole
        for name in ("lines", "examples", "blank", "num_wrong", "num_not_utf8"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for name, count in part.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def problems(self) -> Iterator[str]:
        """One text for each problem, without the file's name."""
        if self.whole is not None:
            yield self.whole
        if self.num_wrong > 1 and not self.examples and all(text.startswith(_NO_VALUE) for _, text in self.wrong):
            number, text = self.wrong[0]
            yield f"is not JSONL: no line of it is JSON; line {number}: {text}"
            return
        if self.not_utf8 is not None:
            more = f" (and {self.num_not_utf8 - 1} more lines)" if self.num_not_utf8 > 1 else ""
            yield f"line {self.not_utf8[0]}{more} {self.not_utf8[1]}"
        texts = {text for _, text in self.wrong}
        if len(texts) == 1 and self.num_wrong == self.lines - self.blank > 1:
            yield f"line {self.wrong[0][0]}, and in the same way each of the other {self.num_wrong - 1:,}: {texts.pop()}"
            return
        for number, text in self.wrong:
            yield f"line {number}: {text}"
        if self.num_wrong > len(self.wrong):
            yield f"and {self.num_wrong - len(self.wrong):,} more lines are wrong"
        if self.examples == 0 and not (self.whole or self.wrong or self.not_utf8):
            yield "is empty: no example in it" + (f", only {self.blank:,} blank lines" if self.blank > 1 else "")

    def notes(self) -> Iterator[str]:
        """What the user should know about a file without problems."""
        if self.marked:
            yield "begins with a byte order mark, which is skipped"
        if self.blank:
            yield f"{self.blank:,} blank line{'s' * (self.blank > 1)} skipped"
        for what, count in self.counts.items():
            yield f"{count:,} of {self.examples:,} examples {what}"


def check_file(path: Path, form: Form) -> FileReport:
    """Checks every line of a file.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    foreign = foreign_file(head) or foreign_examples(
        _first_line(head), chat=not isinstance(form, PromptExamples), fields=getattr(form, "fields", ())
    )
    if foreign is not None:
        return FileReport(whole=foreign)
    report = FileReport()
    for part in _parts(path, size, form):
        report.add(part)
        if report.whole is not None:
            break
    return report


def examples(path: Path, fields: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yields the examples of a file that `check_file` has found right; numbers in the named fields become texts."""
    with path.open("rb") as file:
        for line in file:
            if not is_blank(line):
                yield with_texts(line.decode(), fields)


def _parts(path: Path, size: int, form: Form) -> Iterator[FileReport]:
    """The reports of consecutive parts of the file, in order."""
    starts = range(0, max(size, 1), _RANGE_BYTES)
    check = partial(_check_range, str(path), length=_RANGE_BYTES, form=form)
    with ExitStack() as stack:
        workers = min(len(starts), _num_cores()) if size >= _PARALLEL_BYTES else 1
        if workers > 1:
            # fork is quickest, but unsafe beside threads.
            method = "fork" if sys.platform == "linux" and threading.active_count() == 1 else "spawn"
            pool = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context(method)))
            reports: Iterator[FileReport] = pool.map(check, starts)
        else:
            reports = map(check, starts)
        bar = stack.enter_context(_progress(path, size))  # after the forks: it may start a thread
        for start, report in zip(starts, reports, strict=False):
            bar.update(min(_RANGE_BYTES, size - start))
            yield report


def _check_range(path: str, start: int, *, length: int, form: Form) -> FileReport:
    """Checks the lines that begin in [start, start + length)."""
    report, counts = FileReport(), {}  # type: ignore[var-annotated]
    report.counts = counts
    end = start + length
    with open(path, "rb") as file:
        if start > 0:
            file.seek(start - 1)
            if len(file.readline(_MAX_LINE_BYTES)) == _MAX_LINE_BYTES:
                return report  # the range before has reported it
        while file.tell() < end:
            line = file.readline(_MAX_LINE_BYTES)
            if not line:
                break
            if len(line) == _MAX_LINE_BYTES:
                report.whole = f"has a line of more than {_MAX_LINE_BYTES >> 20} MiB: not one example on each line"
                break
            report.lines += 1
            _check_line(line, report, form)
    return report


def _check_line(line: bytes, report: FileReport, form: Form) -> None:
    if is_blank(line):
        report.blank += 1
        return
    problem: str | None
    try:
        text = line.decode()
        report.marked |= report.lines == 1 and text.startswith("\ufeff")
        example = read_example(text)
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            report.num_not_utf8 += 1
            report.not_utf8 = report.not_utf8 or (report.lines, _not_utf8(line, error))
            return
        problem = _CUT
    except (ValueError, RecursionError) as error:
        problem = _not_json(line, error)
    else:
        report.examples += 1
        problem = _example_problem(line, example, report.counts, form)
    if problem is not None:
        report.num_wrong += 1
        if len(report.wrong) < MOST_LISTED:
            report.wrong.append((report.lines, problem))


def _example_problem(line: bytes, example: Any, counts: dict[str, int], form: Form) -> str | None:
    if not isinstance(example, dict):
        kind = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(
            type(example), "a number"
        )
        return f"is {kind}, not a JSON object; write one object, with the fields, on each line"
    if b"\\u" in line and _SURROGATE.search(line) and (where := _surrogate(example)) is not None:
        return f"holds half of a surrogate pair in {where}, which is not valid Unicode; write the whole character"
    for name in form.fields if isinstance(form, PromptExamples) else ("system", "conversations", "mask", "type"):
        if line.count(f'"{name}"'.encode()) > 1 and _keys(line.decode()).count(name) > 1:
            return f'has "{name}" twice; keep one'
    return form.check(example, counts)


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _surrogate(value: Any, where: str = "the line") -> str | None:
    """The field that holds a lone surrogate, which JSON's escapes can write but UTF-8 cannot hold."""
    if isinstance(value, str):
        return where if any("\ud800" <= character <= "\udfff" for character in value) else None
    if isinstance(value, dict):
        for name, one in value.items():
            found = _surrogate(name, "a key") or _surrogate(one, f'"{name}"')
            if found:
                return found
    if isinstance(value, list):
        return next((found for one in value if (found := _surrogate(one, where))), None)
    return None


def _keys(text: str) -> list[str]:
    """The keys of the outer object, repeated ones included."""
    pairs = json.JSONDecoder(object_pairs_hook=list, parse_int=str).decode(text.strip().removeprefix("\ufeff"))
    return [key for key, _ in pairs]


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    if (
        line[error.start : error.start + 1] == b"\xed"
        and b"\xa0" <= line[error.start + 1 : error.start + 2] <= b"\xbf"
    ):
        return "holds half of a surrogate pair as bytes (CESU-8), which is not valid UTF-8; write the whole character"
    text = line[max(0, error.start - 10) : error.start + 10].decode("cp1252", "replace")
    return (
        f"is not UTF-8: byte 0x{line[error.start]:02X} at byte {error.start + 1} ({text.strip()!r} in Windows-1252); if "
        "the file is Latin-1 or Windows-1252, convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
    )


def _not_json(line: bytes, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply for an example; leave the line out"
    if b"\0" in line:
        return f"holds {line.count(0):,} NUL bytes: the file was not written to its end; copy it again"
    if not isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    text = line.decode().strip()
    rest = text[error.pos :]
    if not rest.strip() or (not line.endswith(b"\n") and text.startswith("{") and not text.endswith(("}", ","))):
        return _CUT
    if b"\r" in line.rstrip():
        return "holds CR within the line; end lines with LF: tr '\\r' '\\n' < OLD > NEW"
    if error.msg.startswith("Unterminated string"):
        return "is cut off within a text; a line break in a text is written \\n, because each example is on one line"
    if error.msg == "Extra data" or rest == ",":
        more = "holds more than one JSON value; put each on its own line"
        return "ends in a comma; remove it" if rest.strip() == "," else more
    quoted = "; texts need double quotes" if rest[:1] == "'" or text.startswith("{'") else ""
    message = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
    return f"not JSON: {message}, at character {error.pos + 1} ({rest[:20]!r}){quoted}"


_NO_VALUE = "not JSON: expecting value, at character 1 "
_CUT = "is cut off: the line ends in the middle; copy the file again, or leave the line out"


def is_blank(line: bytes) -> bool:
    """Whether a line holds white space only. A byte order mark counts as white space: joined files have some inside."""
    text = line.removeprefix(BOM).strip()
    if not text or text[0] < 0x80 or len(text) > _MOST_WHITE_BYTES:
        return not text
    return not text.decode(errors="replace").strip()  # such as the blank that word processors write


_MOST_WHITE_BYTES = 64


def _first_line(head: bytes) -> str:
    lines = [line for line in head.split(b"\n") if not is_blank(line)]
    return lines[0].removeprefix(BOM).decode(errors="replace") if lines else ""


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress(path: Path, size: int) -> Any:
    from nemo_tied_lora.progress import Progress

    shown = size >= _PARALLEL_BYTES
    return Progress(desc=f"checking {path.name}", total=size, unit="B", unit_scale=True, disable=not shown)
