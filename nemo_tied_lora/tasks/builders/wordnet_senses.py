# SPDX-License-Identifier: Apache-2.0
"""Which sense has a word in a sentence? From WordNet's examples and glosses. The result is in this package.

The format of WordNet's files: https://wordnet.princeton.edu/documentation/wndb5wn
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_tied_lora.tasks.builders.apt import Apt

__all__ = ["OPTIONS", "Synset", "build", "option_problems", "read_synsets", "senses"]

OPTIONS = ()

_PACKAGE = "wordnet-base"
_PARTS = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True)
class Synset:
    """Words with one meaning."""

    key: str
    """Part of speech and offset, as in n-00002684."""
    part: str
    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]


def option_problems(key: str, options: Mapping[str, Any]) -> Iterator[str]:
    """There are no options."""
    yield from ()


def build(options: Mapping[str, Any], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(records, what they were made of).

    Raises:
        ConfigError: apt cannot get Debian's package.
    """
    apt = Apt(folder / "apt")
    versions = apt.versions([_PACKAGE])
    (package,) = apt.download([_PACKAGE])
    files = {path.name: path for path in apt.unpack(package, "*/wordnet/data.*")}
    found = [one for part in _PARTS for one in read_synsets(files[f"data.{part}"].read_text("latin-1"), part)]
    return list(senses(found)), {"packages": versions}


def read_synsets(text: str, part: str) -> Iterator[Synset]:
    """Reads one of WordNet's data files."""
    for line in text.splitlines():
        if line.startswith("  "):
            continue  # the licence
        fields, described = line.split(" | ", 1)
        values, described = fields.split(), described.strip()
        words = [re.sub(r"\(.*\)", "", word).replace("_", " ") for word in values[4 : 4 + 2 * int(values[3], 16) : 2]]
        gloss = re.sub(r';?\s*"[^"]*"[^;"]*', "", described).strip(" ;")
        kind = values[2].replace("s", "a")  # satellites of adjectives are adjectives
        yield Synset(f"{kind}-{values[0]}", part, tuple(words), gloss, tuple(re.findall(r'"([^"]+)"', described)))


def senses(synsets: list[Synset]) -> Iterator[dict[str, Any]]:
    """For each example of 4 words and more that holds a word with at least 3 other senses: the right gloss among four.

    Words are drawn into splits, so no word is in two.
    """
    of_word: dict[tuple[str, str], list[Synset]] = defaultdict(list)
    for one in synsets:
        for word in one.words:
            of_word[word.lower(), one.part].append(one)
    draw = random.Random(7)
    found = [question for one in synsets for question in _questions(one, of_word, draw)]
    draw.sample(found, 4)  # without effect but on the draws below: so the file in this package was made
    splits = _splits(sorted({word.lower() for _, word, *_ in found}), draw)
    for one, word, sentence, endings in found:
        shown = list(endings)
        draw.shuffle(shown)
        label = shown.index(endings[0])
        yield {
            "split": splits[word.lower()],
            "word": word,
            "sentence": sentence,
            "endings": shown,
            "label": label,
            "synset": one.key,
        }


def _questions(
    one: Synset, of_word: Mapping[tuple[str, str], list[Synset]], draw: random.Random
) -> Iterator[tuple[Synset, str, str, list[str]]]:
    """Yields (synset, word, sentence, glosses with the right one first) for each example that holds a word of the synset."""
    for sentence in one.examples:
        if len(sentence.split()) < 4:
            continue
        for word in one.words:
            others = [other for other in of_word[word.lower(), one.part] if other.key != one.key]
            stem = re.escape(word.lower()[: max(3, len(word) - 2)])
            if len(others) < 3 or not re.search(rf"\b{stem}\w*", sentence.lower()):
                continue
            glosses = [gloss for gloss in dict.fromkeys(other.gloss for other in others) if gloss != one.gloss]
            if len(glosses) >= 3:
                yield one, word, sentence, [one.gloss, *draw.sample(glosses, 3)]
                break


def _splits(words: list[str], draw: random.Random) -> dict[str, str]:
    draw.shuffle(words)
    ends = (0.1 * len(words), 0.15 * len(words))
    return {
        word: "test" if number < ends[0] else "validation" if number < ends[1] else "train"
        for number, word in enumerate(words)
    }
