# SPDX-License-Identifier: Apache-2.0
"""Three tasks of the descriptions of Debian's packages and their translations. The licence is each package's own.

A description has a synopsis of one line and paragraphs:

- `summaries`: the paragraphs, and the synopsis as their summary
- `questions`: a first sentence of each of four similar packages, and a synopsis: which package is it?
- `translations`: synopses and paragraphs, one to one
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_tied_lora.progress import Progress
from nemo_tied_lora.tasks.builders.apt import Apt

__all__ = [
    "OPTIONS",
    "Description",
    "build",
    "option_problems",
    "questions",
    "read_descriptions",
    "summaries",
    "translations",
]

OPTIONS = ("task", "language")
"""`task`: summaries, questions or translations. `language`: of translations; else null."""

_SUMMARIES = {"test": 1000, "validation": 500, "train": 12_500}
_TWINS = r"lib.*-dev|librust|golang-|.*-doc$|.*-dbg|fonts-|libghc|.*-l10n"
_NOT_SUMMARISED = re.compile(rf"({_TWINS})")
_NOT_ASKED = re.compile(rf"({_TWINS}|node-|ruby-|r-cran|php-)")
"""Packages that come in families, whose descriptions differ in a name only."""
_ADD_ONS = re.compile(r"\(.*(dev|documentation|doc|headers|debug|transitional|library|common|data)|transitional|dummy")


@dataclass(frozen=True)
class Description:
    """Of one package, in one language."""

    package: str
    synopsis: str
    text: str

    @property
    def paragraphs(self) -> list[str]:
        """The paragraphs: without line ends, but for one before each item of a list."""
        return [" ".join(lines) for lines in _paragraphs(self.text)]


def option_problems(key: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the values of the options."""
    if options["task"] not in ("summaries", "questions", "translations"):
        yield f"{key}.task={options['task']!r}: unknown; choose one of summaries, questions, translations"
    if (options["task"] == "translations") != isinstance(options["language"], str):
        yield f"{key}.language={options['language']!r}: translations need one, as 'de'; the others have none: null"


def build(options: Mapping[str, Any], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(records, what they were made of).

    Raises:
        ConfigError: apt cannot get the lists.
    """
    language = options["language"]
    languages = ["en", *([str(language)] if language else [])]
    apt, origin, read = Apt(folder / "apt", languages), {}, {}
    for name in languages:
        archive, file = apt.descriptions(name)
        content = file.read_bytes()
        origin[name] = {"archive": archive, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        read[name] = read_descriptions(content.decode("utf-8", "replace"), name)
    if options["task"] == "translations":
        records = list(translations(read["en"], read[str(language)], str(language)))
    else:
        records = list(summaries(read["en"]) if options["task"] == "summaries" else questions(read["en"]))
    return records, origin


def read_descriptions(text: str, language: str) -> dict[str, Description]:
    """Reads apt's list of descriptions. Maps the checksum of the English description to the one in this language."""
    found = {}
    for stanza in text.split("\n\n"):
        checksum = re.search(r"^Description-md5: (\S+)", stanza, re.M)
        described = re.search(rf"^Description-{re.escape(language)}: (.*(?:\n .*)*)", stanza, re.M)
        package = re.search(r"^Package: (\S+)", stanza, re.M)
        if checksum and described and package:
            synopsis, *lines = described[1].split("\n")
            body = "\n".join("" if line.strip() == "." else line[1:] for line in lines)
            found[checksum[1]] = Description(package[1], synopsis.strip(), body)
    return found


def summaries(english: Mapping[str, Description]) -> Iterator[dict[str, Any]]:
    """Descriptions of 150 to 700 characters with a synopsis of 3 to 12 words; of those with the same first paragraph, one."""
    left = iter(_to_summarise(english))
    for split, count in _SUMMARIES.items():
        for _, one in zip(range(count), left, strict=False):
            document = "\n".join(one.paragraphs)
            yield {"split": split, "package": one.package, "document": document, "summary": one.synopsis}


def _to_summarise(english: Mapping[str, Description]) -> list[Description]:
    """In a fixed random order. `questions` takes none of the first ones, so that the two tasks share no package."""
    seen, found = set(), []
    for one in english.values():
        paragraphs = one.paragraphs
        fits = paragraphs and 150 <= len("\n".join(paragraphs)) <= 700 and 3 <= len(one.synopsis.split()) <= 12
        if not fits or _ADD_ONS.search(one.synopsis.lower()) or _NOT_SUMMARISED.match(one.package):
            continue
        if paragraphs[0] not in seen:
            seen.add(paragraphs[0])
            found.append(one)
    random.Random(11).shuffle(found)
    return found


def questions(english: Mapping[str, Description]) -> Iterator[dict[str, Any]]:
    """Four packages with a first sentence each, the synopsis of one of them as the question, its name as the answer.

    The other three are those that share most rare words with it. The name is not in the synopsis. Splits go by name.
    """
    asked = list(_to_ask(english))
    words = [set(re.findall(r"[a-z]{4,}", f"{one.synopsis} {sentence}".lower())) for one, sentence in asked]
    where: dict[str, list[int]] = defaultdict(list)
    for number, found in enumerate(words):
        for word in found:
            where[word].append(number)
    draw = random.Random(5)
    for number, (one, _) in enumerate(Progress(asked, desc="similar packages", unit="packages")):
        near = _similar(number, asked, words[number], where)
        if len(near) < 3:
            continue
        shown = [number, *near]
        draw.shuffle(shown)
        context = " ".join(f"{asked[other][0].package}: {asked[other][1]}" for other in shown)
        share = _share(one.package)
        yield {
            "split": "test" if share < 8 else "validation" if share < 12 else "train",
            "context": context,
            "question": f"Which package is this: {one.synopsis}?",
            "answer": one.package,
            "start": context.index(f"{one.package}: "),
        }


def _to_ask(english: Mapping[str, Description]) -> Iterator[tuple[Description, str]]:
    used = {one.package for one in _to_summarise(english)[: sum(_SUMMARIES.values())]}
    seen = set()
    for one in english.values():
        if one.package in used or _NOT_ASKED.match(one.package):
            continue
        first = " ".join(line.strip() for line in one.text.split("\n\n")[0].split("\n"))
        sentence = re.split(r"(?<=[.!])\s", first)[0]
        fits = (
            60 <= len(sentence) <= 200 and 4 <= len(one.synopsis.split()) <= 12 and "transitional" not in one.synopsis
        )
        named = re.search(rf"\b{re.escape(one.package.lower())}\b", one.synopsis.lower())
        if fits and not named and sentence not in seen:
            seen.add(sentence)
            yield one, sentence


def _similar(
    number: int, asked: list[tuple[Description, str]], words: set[str], where: Mapping[str, list[int]]
) -> list[int]:
    """At most 3 packages of another family, those with most words in common first; of equals, the earlier ones."""
    shared: Counter[int] = Counter()
    for word in words:
        if len(where[word]) < 400:
            shared.update(where[word])
    family = asked[number][0].package.split("-")[0]
    most = sorted(shared, key=lambda other: (-shared[other], other))[:12]
    return [other for other in most if other != number and asked[other][0].package.split("-")[0] != family][:3]


def translations(
    english: Mapping[str, Description], other: Mapping[str, Description], language: str
) -> Iterator[dict[str, Any]]:
    """Synopses, and paragraphs where both languages have as many, of 5 to 60 words. Splits go by the name's first part."""
    seen = set()
    for checksum, translated in other.items():
        one = english.get(checksum)
        if one is None:
            continue
        before, after = one.paragraphs, translated.paragraphs
        found = [
            (one.synopsis, translated.synopsis),
            *(zip(before, after, strict=True) if len(before) == len(after) else ()),
        ]
        for text, translation in found:
            plain = text != translation and "\n" not in text + translation and 5 <= len(text.split()) <= 60
            if plain and text not in seen and 0.6 <= len(translation) / len(text) <= 1.9:
                seen.add(text)
                share = _share(re.split(r"[-0-9]", translated.package)[0])
                split = "test" if share < 6 else "validation" if share < 9 else "train"
                yield {"split": split, "package": translated.package, "en": text, language: translation}


def _share(name: str) -> int:
    """A number from 0 to 99 that depends on the name alone."""
    return int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16) % 100


def _paragraphs(text: str) -> Iterator[list[str]]:
    """Yields the lines of each paragraph."""
    current: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            current.append("\n" * line.startswith((" ", "*", "-")) + line.strip())
        elif current:
            yield current
            current = []
