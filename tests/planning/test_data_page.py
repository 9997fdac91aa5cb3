# SPDX-License-Identifier: Apache-2.0
"""docs/data.md: its examples are right, and its programs convert other files into right ones. Pure Python."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from nemo_tied_lora.planning.data import file_kinds, jsonl_lines
from nemo_tied_lora.planning.data.example_forms import Conversations, Form, PromptExamples
from nemo_tied_lora.planning.data.jsonl_lines import check_file
from tests.harness.paths import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
PROMPTS = PromptExamples(template="{input} {output}", fields=("input", "output"), label="output")
OTHER_FILES: dict[str, tuple[int, str, Form]] = {
    "CSV": (0, '\ufeffinput,output\n"a, b",c\nü,5\n', PROMPTS),
    "OpenAI": (
        1,
        '{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "ü"}, '
        '{"role": "assistant", "content": "b"}]}\n\n'
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
        Conversations(),
    ),
    "ShareGPT": (
        1,
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n',
        Conversations(),
    ),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_program_of_the_page_makes_a_right_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    program, content, form = OTHER_FILES[kind]
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text(content)
    assert list(check_file(old, form).problems())
    monkeypatch.setattr(sys, "argv", ["convert", str(old), str(new)])
    exec(PROGRAMS[program], {})
    report = check_file(new, form)
    assert list(report.problems()) == []
    assert report.examples == len([line for line in content.splitlines() if line]) - (kind == "CSV")


def test_the_pages_examples_are_right(tmp_path: Path) -> None:
    lines = re.findall(r"^    (\{.*\})$", PAGE, flags=re.M)
    assert len(lines) == 2
    for line, form in zip(lines, (PROMPTS, Conversations()), strict=True):
        (tmp_path / "train.jsonl").write_text(line)
        assert list(check_file(tmp_path / "train.jsonl", form).problems()) == [], json.loads(line)


def test_headings_that_messages_name_are_on_the_page() -> None:
    headings = {
        re.sub(r"[^a-z -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", PAGE, re.M)
    }
    named = set(re.findall(r"_PAGE\}#([\w-]+)", Path(file_kinds.__file__).read_text()))
    assert named
    assert named <= headings


def test_the_pages_numbers_are_the_programs() -> None:
    assert f"At most {jsonl_lines.MOST_LISTED} lines" in PAGE
    assert f"From {jsonl_lines._PARALLEL_BYTES >> 20} MiB on" in PAGE
