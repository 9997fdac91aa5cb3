# SPDX-License-Identifier: Apache-2.0
"""Sentences of the game Battle for Wesnoth with their translations: dialogue, story and help, GPL-2+."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.tasks.builders.apt import Apt

__all__ = ["OPTIONS", "build", "option_problems", "pairs", "read_mo"]

OPTIONS = ("language", "release", "parts")
"""`language`: as in "de". `release` and `parts`: of the names of Debian's packages; part data holds the game's own texts,
the others are campaigns."""

_MARKUP = re.compile(r"[<>$%|{}=]|\n")
_TEST, _VALIDATION = 10, 5
"""Per cent of the pairs, by a checksum of the English text: a pair keeps its split in another release."""


def option_problems(key: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the values of the options."""
    for name in ("language", "release"):
        if not isinstance(options[name], str) or not re.fullmatch(r"[\w.@-]+", options[name]):
            yield f"{key}.{name}={options[name]!r}: must be a text, as 'de' or '1.16'"
    parts = options["parts"]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        yield f"{key}.parts={parts!r}: must be a list of parts of the game, as [data, httt]"


def build(options: Mapping[str, Any], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(records, what they were made of).

    Args:
        options: see `OPTIONS`. `language`: as in "de" or "fr".
        folder: a new folder, for downloads.

    Raises:
        ConfigError: apt cannot get the packages.
    """
    apt = Apt(folder / "apt")
    packages = [f"wesnoth-{options['release']}-{part}" for part in options["parts"]]
    versions = apt.versions(packages)
    language = str(options["language"])
    catalogues = [
        path
        for package in apt.download(packages)
        for path in apt.unpack(package, f"*/locale/{language}/LC_MESSAGES/*.mo")
    ]
    return list(pairs(catalogues, language)), {"packages": versions}


def pairs(catalogues: list[Path], language: str) -> Iterator[dict[str, Any]]:
    """Yields each sentence of 5 words and more without markup, once, with its translation."""
    seen = set()
    for path in catalogues:
        for text, translation in read_mo(path):
            english, other = text.partition("^")[2].strip() if "^" in text[:60] else text.strip(), translation.strip()
            if english in seen or not other or not _is_plain(english, other):
                continue
            seen.add(english)
            yield {"split": _split(english), "en": english, language: other}


def read_mo(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (text, translation) of a gettext catalogue; of plural forms the first.

    The format: https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html
    """
    data = path.read_bytes()
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, texts, translations = struct.unpack(f"{order}3I", data[8:20])
    for number in range(count):
        found = []
        for table in (texts, translations):
            length, start = struct.unpack_from(f"{order}2I", data, table + 8 * number)
            found.append(data[start : start + length].partition(b"\0")[0].decode("utf-8", "replace"))
        text = found[0].rpartition("\x04")[2]  # what stands before is a context
        if text:
            yield text, found[1]


def _is_plain(english: str, other: str) -> bool:
    return (
        20 <= len(english) <= 300
        and len(english.split()) >= 5
        and not _MARKUP.search(english + other)
        and 0.5 <= len(other) / len(english) <= 2.2
    )


def _split(english: str) -> str:
    share = int.from_bytes(hashlib.sha256(english.encode()).digest()[:4], "big") % 100
    return "test" if share < _TEST else "validation" if share < _TEST + _VALIDATION else "train"
