# SPDX-License-Identifier: Apache-2.0
"""BLEU and chrF as sacrebleu computes them, and ROUGE-L as rouge-score does.

sacrebleu counts n-grams for each item. Their sums over any items give that corpus's score, so a resampled corpus is not
scored again: `bleu_value` and `chrf_value` are sacrebleu's formulas for arrays of such sums. Tests compare them with
sacrebleu.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np

from nemo_tied_lora.planning.versions import installed_version

__all__ = [
    "bleu_statistics",
    "bleu_value",
    "chrf_statistics",
    "chrf_value",
    "rouge_l",
    "rouge_reads",
    "rouge_signature",
    "sacrebleu_signature",
]

_BETA = 2.0
"""chrF weighs recall twice as much as precision."""

_Texts = Sequence[str]


def bleu_statistics(answers: _Texts, references: Sequence[_Texts]) -> np.ndarray:
    """(items, 10): the answer's words, the closest reference's words, matched n-grams and n-grams for n of 1 to 4."""
    return _statistics("bleu", answers, references)


def chrf_statistics(answers: _Texts, references: Sequence[_Texts]) -> np.ndarray:
    """(items, 18): for n of 1 to 6, the answer's character n-grams, the best reference's, and those that match."""
    return _statistics("chrf", answers, references)


def bleu_value(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU (...) in points, of sums (..., 10). Zero counts are smoothed as by mteval ("exp")."""
    answer, reference = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2:6], sums[..., 6:10]
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.where(answer < reference, np.exp(1 - reference / answer), 1.0)
        halvings = np.cumsum((matched == 0) & (total > 0), -1)
        precision = np.where(matched > 0, matched, 0.5**halvings) / total
        score = 100 * brevity * np.exp(np.log(precision).mean(-1))
    scored = (matched.sum(-1) > 0) & (total > 0).all(-1)
    return np.where(scored, score, 0.0)


def chrf_value(sums: np.ndarray) -> np.ndarray:
    """Corpus chrF2 (...) in points, of sums (..., 18). Orders without n-grams on a side do not count."""
    answer, reference, matched = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    counts = (answer > 0) & (reference > 0)
    orders = np.maximum(counts.sum(-1), 1)
    precision = (np.where(counts, matched, 0) / np.maximum(answer, 1)).sum(-1) / orders
    recall = (np.where(counts, matched, 0) / np.maximum(reference, 1)).sum(-1) / orders
    below = _BETA**2 * precision + recall
    return 100 * (1 + _BETA**2) * precision * recall / np.where(below > 0, below, 1.0)


def rouge_l(answer: str, references: _Texts) -> float:
    """ROUGE-L's F measure, from 0 to 1: the best over the references. Words are stemmed, as is usual for summaries."""
    return float(_rouge().score_multi(list(references), answer)["rougeL"].fmeasure)


def rouge_reads(text: str) -> bool:
    """Whether rouge-score finds a word: it knows Latin letters without accents, and digits."""
    return re.search(r"[a-z0-9]", text.lower()) is not None


def sacrebleu_signature(name: str, references: Sequence[_Texts]) -> str:
    """sacrebleu's signature of "bleu" or "chrf": what makes two numbers comparable."""
    counts = {len(texts) for texts in references}
    metric = _metric(name)
    metric.num_refs = counts.pop() if len(counts) == 1 else -1
    return str(metric.get_signature().format())


def rouge_signature() -> str:
    """What makes two ROUGE-L numbers comparable."""
    return f"rougeL|measure:f|stemmer:yes|version:{installed_version('rouge-score')}"


def _statistics(name: str, answers: _Texts, references: Sequence[_Texts]) -> np.ndarray:
    # sacrebleu wants the n-th reference of every item together, None where an item has fewer.
    by_number: Any = list(zip_longest(*references))
    found = _metric(name)._extract_corpus_statistics(list(answers), by_number)
    return np.array(found, dtype=np.float64)


@lru_cache
def _metric(name: str) -> Any:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(force=True) if name == "bleu" else CHRF()


@lru_cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
