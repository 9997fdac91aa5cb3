# SPDX-License-Identifier: Apache-2.0
"""Recognizes, from its first bytes, a file that is not UTF-8 text with one JSON object on each line, and says what to do."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["BOM", "HEAD_BYTES", "foreign_examples", "foreign_file"]

BOM = codecs.BOM_UTF8
HEAD_BYTES = 1 << 16
"""`foreign_file` needs so many first bytes."""

_PAGE = "docs/data.md"
_MAGIC = (
    (b"\x1f\x8b", "gzip", "gunzip it"),
    (b"BZh", "bzip2", "bunzip2 it"),
    (b"\xfd7zXZ\x00", "xz", "unxz it"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "unzstd it"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip", "unpack it"),
    (b"PAR1", "Parquet", f"convert it: {_PAGE}#parquet"),
    (b"ARROW1", "Arrow", f"convert it: {_PAGE}#parquet"),
    (b"\xff\xff\xff\xff", "Arrow", f"convert it: {_PAGE}#parquet"),
    (b"\x89HDF", "HDF5", "write its examples as JSONL"),
    (b"\x93NUMPY", "NumPy", "for packed sequences set packed_sequence=true, else write its examples as JSONL"),
    (b"SQLite format 3", "SQLite", "write its examples as JSONL"),
    (b"%PDF", "PDF", "write its examples as JSONL"),
    (b"\x80\x04\x95", "pickle", "write its examples as JSONL"),
    (b"\x7fELF", "program", "name the JSONL file"),
)
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Where the NUL bytes of an ASCII character are. True: NUL.
_WIDE = (
    ((False, True, True, True), "UTF-32LE"),
    ((True, True, True, False), "UTF-32BE"),
    ((False, True, False, True), "UTF-16LE"),
    ((True, False, True, False), "UTF-16BE"),
)


def foreign_file(head: bytes) -> str | None:
    """Returns what a file is, with the remedy, if its first `HEAD_BYTES` show that it is no JSONL file in UTF-8."""
    return _binary(head) or _wide_text(head) or _other_text(head)


def _binary(head: bytes) -> str | None:
    if head.startswith(b"PK\x03\x04"):
        if b"[Content_Types].xml" in head or b"xl/" in head:
            return f"is an Excel workbook, not JSONL; save it as CSV, then convert it: {_PAGE}#csv"
        return "is a zip archive, not JSONL; unzip it"
    if head[257:262] == b"ustar":
        return "is a tar archive, not JSONL; unpack it"
    for magic, name, remedy in _MAGIC:
        if head.startswith(magic):
            return f"is {'an' if name[0] in 'AE' else 'a'} {name} file, not JSONL; {remedy}"
    return None


def _wide_text(head: bytes) -> str | None:
    remedy = "convert it: iconv -f {0} -t UTF-8 OLD > NEW"
    for mark, name in _MARKS:
        if head.startswith(mark):
            return f"is {name} text, not UTF-8; " + remedy.format(name)
    nulls = tuple(byte == 0 for byte in head[:4])
    for pattern, name in _WIDE:
        if nulls == pattern:
            return f"is {name} text, not UTF-8; " + remedy.format(name)
    return None


def _other_text(head: bytes) -> str | None:
    text = head.removeprefix(BOM).lstrip()
    first = text.split(b"\n", 1)[0].strip()
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the data; run git lfs pull"
    if text[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not JSONL; download the file itself"
    if text.startswith(b"[") and (first in (b"[", b"[]") or text[1:].lstrip().startswith((b"{", b'"', b"[", b"]"))):
        return f"is a JSON array, not one object on each line; convert it: jq -c '.[]' OLD > NEW ({_PAGE}#json-array)"
    if first == b"{" and b"\n" in text:
        return f"holds JSON objects over several lines; put each on one line: jq -c . OLD > NEW ({_PAGE}#json-array)"
    if b"\r" in text.rstrip() and b"\n" not in text and text.startswith(b"{"):
        return "ends its lines with CR alone; convert it: tr '\\r' '\\n' < OLD > NEW"
    return _table(first)


def _table(first: bytes) -> str | None:
    """CSV and TSV: a first line of names, with separators, that is not JSON."""
    for separator, name in ((b"\t", "TSV"), (b",", "CSV"), (b";", "CSV")):
        cells = [cell.strip(b' "') for cell in first.split(separator)]
        if len(cells) > 1 and all(cell and len(cell) < 64 and not set(cell) & set(b"{}[]:") for cell in cells):
            return f"is {name}, not JSONL; convert it: {_PAGE}#csv"
    return None


def foreign_examples(line: str, *, chat: bool, fields: Collection[str] = ()) -> str | None:
    """Returns which other form of example a file's first line has, with the remedy. None: none that is known.

    Args:
        chat: whether NeMo's conversations are expected.
        fields: the expected fields. A line that has them all may have others too.
    """
    try:
        example = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(example, Mapping) or (fields and all(name in example for name in fields)):
        return None
    if _turns(example, "messages", "role"):
        forms = "NeMo's conversations" + ("" if chat else " (model.data.chat=true) or to prompts and answers")
        return f"holds OpenAI messages; convert them to {forms}: {_PAGE}#openai-messages"
    if _turns(example, "conversations", "from"):
        if not chat:
            return "holds conversations; train on them with model.data.chat=true"
        if not {turn["from"] for turn in example["conversations"]}.isdisjoint(("human", "gpt")) and (
            "system" not in example or "mask" not in example
        ):
            return f"holds ShareGPT conversations; convert them to NeMo's: {_PAGE}#openai-messages"
    return None


def _turns(example: Mapping[str, Any], key: str, speaker: str) -> bool:
    turns = example.get(key)
    return isinstance(turns, list) and bool(turns) and all(isinstance(t, Mapping) and speaker in t for t in turns)
