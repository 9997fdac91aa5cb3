# SPDX-License-Identifier: Apache-2.0
"""Compares an answer's text with its references: exact match, F1 and the number after a marker. Scores from 0 to 1.

With several references, the best counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

__all__ = ["MATHS_MARKER", "exact_match", "f1", "maths_exact_match", "maths_number", "normalised"]

MATHS_MARKER = "####"
"""What stands before the final answer in GSM8K, and in the tasks of this package."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# A sign, a currency, then digits with or without commas: "-$1,234.50", ".5", "3/4".
_NUMBER = re.compile(r"([-+\u2212]?)\s*[$€£]?\s*([-\u2212]?)((?:\d[\d,]*)(?:\.\d+)?|\.\d+)(?:\s*/\s*(\d[\d,]*))?")


def normalised(text: str) -> str:
    """The text by SQuAD's rules: lower case, without ASCII punctuation, without a, an and the, single blanks.

    Where nothing would be left, the articles stay, or else the punctuation: the answers "A" and "+" are not empty.
    """
    lower = text.lower()
    bare = lower.translate(_PUNCTUATION)
    steps = (" ".join(one.split()) for one in (_ARTICLES.sub(" ", bare), bare, lower))
    return next(filter(None, steps), "")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference after SQuAD's normalisation."""
    found = normalised(answer)
    return float(any(found == normalised(reference) for reference in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """SQuAD's F1: the harmonic mean of precision and recall over the words of answer and reference, each word as often as
    it stands there.
    """
    return max(_f1(normalised(answer).split(), normalised(reference).split()) for reference in references)


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    same = sum((Counter(answer) & Counter(reference)).values())
    return 2 * same / (len(answer) + len(reference))


def maths_exact_match(answer: str, references: Sequence[str], marker: str = MATHS_MARKER) -> float:
    """1 if the number after the answer's first marker equals that of a reference.

    An answer without the marker is wrong, whatever numbers it has. A reference may be the number alone.
    """
    if marker not in answer:
        return 0.0
    found = maths_number(answer, marker)
    return float(found is not None and found in [maths_number(reference, marker) for reference in references])


def maths_number(text: str, marker: str = MATHS_MARKER) -> Fraction | None:
    """The first number in the line after the first marker, or in the whole text if it has none; None: there is no number.

    Commas between digits, a currency, a unit and a point at the end do not count: "#### $1,234.50 a day." is 1234.5.
    """
    _, found_marker, after = text.partition(marker)
    found = _NUMBER.search(after.strip().partition("\n")[0] if found_marker else text)
    if found is None:
        return None
    before, after, digits, divisor = found.groups()
    number = Fraction(digits.replace(",", ""))
    if divisor is not None:
        below = int(divisor.replace(",", ""))
        if below == 0:
            return None
        number /= below
    return -number if (before or after) in ("-", "\u2212") else number
