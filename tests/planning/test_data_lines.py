# SPDX-License-Identifier: Apache-2.0
"""Every line of a data file is right, or named for what it is. Pure Python."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.planning.data import jsonl_lines
from nemo_tied_lora.planning.data.example_forms import Conversations, Form, PromptExamples, with_texts
from nemo_tied_lora.planning.data.jsonl_lines import check_file, examples

FORM = PromptExamples(template="{input} {output}", fields=("input", "output"), label="output")
GOOD = b'{"input": "a", "output": "b"}\n'


def found(tmp_path: Path, content: bytes, form: Form = FORM) -> tuple[list[str], list[str]]:
    """The problems of a file with this content, and the notes."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    report = check_file(path, form)
    return list(report.problems()), list(report.notes())


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "x")
    return file.getvalue()


# name: (content, what the one problem says)
WRONG_FILES = {
    "zero bytes": (b"", "is empty"),
    "blank lines only": (b"\n\n  \n", "only 3 blank lines"),
    "a byte order mark only": (b"\xef\xbb\xbf", "is empty"),
    "UTF-16 with a mark": (b"\xff\xfe" + GOOD.decode().encode("utf-16-le"), "is UTF-16 text"),
    "UTF-16 big endian with a mark": (b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), "is UTF-16 text"),
    "UTF-16 without a mark": (GOOD.decode().encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
    "UTF-16 big endian without a mark": (GOOD.decode().encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
    "UTF-32": (GOOD.decode().encode("utf-32"), "is UTF-32 text"),
    "UTF-32 without a mark": (GOOD.decode().encode("utf-32-be"), "is UTF-32BE text"),
    "Latin-1": (
        GOOD * 2 + '{"input": "für", "output": "ü"}\n'.encode("latin-1") * 3,
        "line 3 (and 2 more lines) is not",
    ),
    "Windows-1252 quotes": ('{"input": "“x”", "output": "b"}\n'.encode("cp1252"), "Windows-1252"),
    "a JSON array": (json.dumps([{"input": "a"}] * 2).encode(), "is a JSON array"),
    "a JSON array over several lines": (json.dumps([{"input": "a"}], indent=2).encode(), "jq -c '.[]'"),
    "an empty JSON array": (b"[]", "is a JSON array"),
    "a JSON array after a mark": (b'\xef\xbb\xbf[{"input": "a"}]', "is a JSON array"),
    "an object over several lines": (json.dumps({"input": "a", "output": "b"}, indent=1).encode(), "jq -c ."),
    "gzip": (gzip.compress(GOOD), "is a gzip file"),
    "zip": (zipped("train.jsonl"), "is a zip archive"),
    "Excel": (zipped("[Content_Types].xml"), "is an Excel workbook"),
    "Parquet": (b"PAR1" + b"\0" * 20, "is a Parquet file"),
    "CSV": (b"input,output\na,b\n", "is CSV"),
    "CSV with quotes": (b'"input","output"\n"a","b"\n', "is CSV"),
    "TSV": (b"input\toutput\na\tb\n", "is TSV"),
    "one column of text": (b"input\na\nb\n", "no line of it is JSON"),
    "YAML": (b"- input: a\n  output: b\n", "no line of it is JSON"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html>\n<html></html>", "is a web page"),
    "NumPy": (b"\x93NUMPY\x01\x00", "packed_sequence=true"),
    "CR alone": (GOOD.replace(b"\n", b"\r") * 3, "CR alone"),
    "OpenAI messages": (b'{"messages": [{"role": "user", "content": "x"}]}\n', "holds OpenAI messages"),
    "Arrow": (b"ARROW1\0\0" + b"\0" * 20, "is an Arrow file"),
    "an answer of a server": (b"Entry not found", "line 1: not JSON: expecting value"),
    "ShareGPT": (b'{"conversations": [{"from": "human", "value": "x"}]}\n', "model.data.chat=true"),
}

# name: (line, what its problem says). The line is the third of a file.
WRONG_LINES = {
    "a missing field": (b'{"input": "a"}', 'has no "output"'),
    "a field in capitals": (b'{"Input": "a", "output": "b"}', "its fields are Input, output"),
    "null": (b'{"input": "a", "output": null}', '"output" is null'),
    "true": (b'{"input": true, "output": "b"}', 'write "true"'),
    "a list": (b'{"input": ["a"], "output": "b"}', '"input" is a list'),
    "an object": (b'{"input": {"a": 1}, "output": "b"}', '"input" is an object'),
    "NaN": (b'{"input": "a", "output": NaN}', '"output" is NaN'),
    "a lone surrogate": (rb'{"input": "\ud83d", "output": "b"}', 'half of a surrogate pair in "input"'),
    "a lone second surrogate in an unused field": (
        rb'{"input": "a", "output": "b", "x": ["\udc00"]}',
        "surrogate pair",
    ),
    "a surrogate as bytes": (b'{"input": "\xed\xa0\xbd", "output": "b"}', "CESU-8"),
    "a list in place of an object": (
        b'["a", "b"]',
        "is a list, not a JSON object; write one object, with the fields, on each line",
    ),
    "a text in place of an object": (
        b'"a"',
        "is a text, not a JSON object; write one object, with the fields, on each line",
    ),
    "a number in place of an object": (
        b"42",
        "is a number, not a JSON object; write one object, with the fields, on each line",
    ),
    "null in place of an object": (
        b"null",
        "is null, not a JSON object; write one object, with the fields, on each line",
    ),
    "no prompt and no answer": (b'{"input": "", "output": " "}', "neither a prompt nor an answer"),
    "a field twice": (b'{"input": "a", "output": "b", "output": "c"}', 'has "output" twice'),
    "a comma at the end": (b'{"input": "a", "output": "b"},', "ends in a comma"),
    "single quotes": (b"{'input': 'a'}", "double quotes"),
    "two objects": (GOOD.strip() * 2, "more than one JSON value"),
    "a raw tab": (b'{"input": "a\tb", "output": "c"}', "invalid control character"),
    "a cut text": (b'{"input": "a', "is cut off within a text"),
    "a cut object": (b'{"input": "a",', "is cut off"),
    "NUL bytes": (b"\0" * 9, "holds 9 NUL bytes"),
    "too many brackets": (b'{"x": ' + b"[" * 100_000, "nested too deeply"),
    "half a file of CR": (b'{"input": "a"}\r{"input": "a"}', "CR within the line"),
}

# name: (line, what is said of it)
GOOD_LINES = {
    "a number": (b'{"input": 42, "output": "b"}', "1 of 3 examples with a number that is taken as its text"),
    "a number of 5000 digits": (b'{"input": %s, "output": "b"}' % (b"9" * 5000), "taken as its text"),
    "an empty answer": (b'{"input": "a", "output": ""}', "1 of 3 examples with an empty answer"),
    "a blank line": (b"", "1 blank line skipped"),
    "a line of blanks": (b" \t\r", "1 blank line skipped"),
    "a no-break space": ("\u00a0".encode(), "1 blank line skipped"),
    "a whole pair": (rb'{"input": "\ud83d\ude00", "output": "b"}', None),
    "an escaped backslash": (rb'{"input": "\\ud83d", "output": "b"}', None),
    "NaN in an unused field": (b'{"input": "a", "output": "b", "score": NaN}', None),
    "a field twice in an inner object": (b'{"input": "a", "output": "b", "x": {"output": "c"}}', None),
    "blanks around the object": (b'  {"input": "a", "output": "b"} ', None),
    "a mark of a joined file": (b"\xef\xbb\xbf" + GOOD.strip(), None),
    "a line separator in a text": ('{"input": "a\u2028b", "output": "c"}'.encode(), None),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path: Path, name: str) -> None:
    content, says = WRONG_FILES[name]
    problems, _ = found(tmp_path, content)
    assert len(problems) == 1
    assert says in problems[0]


@pytest.mark.parametrize("name", WRONG_LINES)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_wrong_line_is_named_with_its_number(tmp_path: Path, name: str, end: bytes) -> None:
    line, says = WRONG_LINES[name]
    good = GOOD.strip() + end
    problems, _ = found(tmp_path, good + end + line + end + good)
    assert len(problems) == 1
    assert problems[0].startswith("line 3")
    assert says in problems[0]


@pytest.mark.parametrize("name", GOOD_LINES)
def test_what_makes_sense_works_and_is_counted(tmp_path: Path, name: str) -> None:
    line, says = GOOD_LINES[name]
    problems, notes = found(tmp_path, GOOD + line + b"\n" + GOOD)
    assert problems == []
    assert [note for note in notes if says is None or says not in note] == []
    assert len(notes) == (says is not None)


@pytest.mark.parametrize("cut", range(1, len(GOOD) - 1))
def test_a_file_cut_anywhere_in_its_last_line_is_noticed(tmp_path: Path, cut: int) -> None:
    problems, _ = found(tmp_path, GOOD + GOOD[:cut])
    assert problems == ["line 2: is cut off: the line ends in the middle; copy the file again, or leave the line out"]


def test_a_file_cut_within_a_character_is_noticed(tmp_path: Path) -> None:
    problems, _ = found(tmp_path, GOOD + '{"input": "ü'.encode()[:-1])
    assert problems[0].startswith("line 2: is cut off")


def test_a_mark_at_the_beginning_is_skipped_and_said(tmp_path: Path) -> None:
    assert found(tmp_path, b"\xef\xbb\xbf" + GOOD) == ([], ["begins with a byte order mark, which is skipped"])


def test_all_problems_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    problems, _ = found(tmp_path, (GOOD + b"{}\n") * 500)
    assert len(problems) == jsonl_lines.MOST_LISTED + 1
    assert problems[1].startswith('line 4: has no "input", "output"')
    assert problems[-1] == "and 480 more lines are wrong"


def test_what_is_wrong_with_every_line_is_said_once(tmp_path: Path) -> None:
    problems, _ = found(tmp_path, b'{"question": 1}\n\n' * 50)
    assert len(problems) == 1
    assert problems[0].startswith('line 1, and in the same way each of the other 49: has no "input", "output"')


def test_a_file_read_in_parts_by_several_processes_gives_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [GOOD, b"\n", b'{"input": 1, "output": "b"}\n', b"{}\n", '{"input": "ü"}\n'.encode("latin-1"), b'{"inp\n']
    content = b"\xef\xbb\xbf" + b"".join(lines) * 40 + GOOD.strip()
    whole = found(tmp_path, content)
    monkeypatch.setattr(jsonl_lines, "_num_cores", lambda: 3)
    monkeypatch.setattr(jsonl_lines, "_PARALLEL_BYTES", 1)
    for size in (1000, len(GOOD), 7):  # 7: shorter than a line
        monkeypatch.setattr(jsonl_lines, "_RANGE_BYTES", size)
        if size < 1000:
            monkeypatch.setattr(jsonl_lines, "_PARALLEL_BYTES", 1 << 30)
        assert found(tmp_path, content) == whole


def test_a_line_too_long_for_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_lines, "_MAX_LINE_BYTES", 1 << 20)
    problems, _ = found(tmp_path, GOOD + b'{"input": "' + b"a" * (3 << 20) + b'", "output": "b"}\n')
    assert problems == ["has a line of more than 1 MiB: not one example on each line"]


def test_a_number_is_taken_as_it_is_written() -> None:
    line = '{"input": 1e3, "output": -0.10, "id": 7, "big": %s}' % ("9" * 5000)
    example = with_texts(line, ["input", "output", "big"])
    assert (example["input"], example["output"], example["id"]) == ("1e3", "-0.10", 7)
    assert example["big"] == "9" * 5000


def test_examples_are_read_as_they_were_checked(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n" + b'{"input": 7, "output": 8}\r\n')
    assert list(examples(path, ["input"])) == [{"input": "a", "output": "b"}, {"input": "7", "output": 8}]


TURNS = [
    {"from": "User", "value": "1"},
    {"from": "Assistant", "value": "a"},
]
CONVERSATION = {"system": "", "mask": "User", "type": None, "conversations": TURNS}
WRONG_CONVERSATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no system": ({"system": None}, '"system" is null'),
    "no turns": ({"conversations": []}, '"conversations" is a list: must be a list of turns'),
    "a turn that is a text": ({"conversations": ["a"]}, "turn 1: is 'a'"),
    "a turn without value": ({"conversations": [{"from": "User"}]}, 'turn 1: has no "value"'),
    "a number as value": ({"conversations": [TURNS[0], {**TURNS[1], "value": 3}]}, "the number 3"),
    "an unknown type": ({"type": "TEXT"}, "must be TEXT_TO_VALUE"),
    "an unknown speaker in mask": ({"mask": "human"}, "no turn is from human"),
    "all masked": ({"mask": "User,Assistant"}, "no turn to train on: NeMo leaves out the first turn and those of the"),
    "all masked, from the first turn on": (
        {"mask": "User,Assistant", "type": "TEXT_TO_VALUE"},
        "no turn to train on: NeMo leaves out the turns of the speakers in mask",
    ),
    "one turn": ({"conversations": TURNS[:1]}, "no turn to train on"),
    "a number as label": ({"conversations": [TURNS[0], {**TURNS[1], "label": 3}]}, '"label" is the number 3'),
    "mask null": ({"mask": None}, '"mask" is null'),
}


@pytest.mark.parametrize("name", WRONG_CONVERSATIONS)
def test_a_wrong_conversation_is_named(tmp_path: Path, name: str) -> None:
    changed, says = WRONG_CONVERSATIONS[name]
    lines = [json.dumps(CONVERSATION), json.dumps({**CONVERSATION, **changed})]
    problems, _ = found(tmp_path, "\n".join(lines).encode(), Conversations())
    assert len(problems) == 1
    assert problems[0].startswith("line 2: ")
    assert says in problems[0]


@pytest.mark.parametrize(
    "changed",
    [{}, {"type": "VALUE_TO_TEXT"}, {"type": "TEXT_TO_VALUE"}, {"mask": "Assistant", "conversations": TURNS * 2}],
    ids=["no type", "value to text", "text to value", "another mask"],
)
def test_a_conversation_of_nemo_is_right(tmp_path: Path, changed: dict) -> None:
    assert found(tmp_path, json.dumps({**CONVERSATION, **changed}).encode(), Conversations()) == ([], [])


def test_prompts_and_answers_among_conversations_are_named(tmp_path: Path) -> None:
    problems, _ = found(tmp_path, GOOD, Conversations())
    assert "its fields are input, output; for prompts and answers, set model.data.chat=false" in problems[0]


def test_sharegpt_and_openai_are_named_among_conversations_too(tmp_path: Path) -> None:
    for line in ('{"conversations": [{"from": "human", "value": "x"}]}', '{"messages": [{"role": "user"}]}'):
        problems, _ = found(tmp_path, line.encode(), Conversations())
        assert len(problems) == 1
        assert "docs/data.md#openai-messages" in problems[0]
