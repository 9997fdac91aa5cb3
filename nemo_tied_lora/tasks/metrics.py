# SPDX-License-Identifier: Apache-2.0
"""The metrics of a task: what each needs of a model, and what it makes of its predictions.

A metric turns items into statistics (items, k), and sums of statistics into its value. So a value over any choice of
items, as a bootstrap draws them, costs one sum: see `intervals`.

An item is a line of a task's `test.jsonl`; `Prediction` says what a prediction holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from nemo_tied_lora.tasks import corpus_scores
from nemo_tied_lora.tasks.answer_texts import MATHS_MARKER, exact_match, f1, maths_exact_match, maths_number

__all__ = ["ALWAYS", "ALWAYS_OF_A_CHOICE", "METRICS", "Item", "Metric", "Prediction", "metrics_of"]

Item = Mapping[str, Any]
"""A line of test.jsonl: `references`, and `endings` and `label` if it is a choice."""
Prediction = Mapping[str, Any]
"""`loss` (nats) and `tokens` of the right answer, `completion` if texts were generated, and `endings` of a choice: a pair
(nats, tokens) for each ending."""

_Items = Sequence[Item]
_Predictions = Sequence[Prediction]

ALWAYS = ("answer_loss",)
"""Metrics that every task gets."""
ALWAYS_OF_A_CHOICE = ("accuracy", "accuracy_norm")
"""Metrics that a task with endings gets, besides its own."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one number is made of predictions."""

    name: str
    title: str
    """The head of a table's column."""
    needs: Literal["generation", "endings", "loss"]
    """What the model has to do: generate an answer, score every ending, or score the right answer."""
    statistics: Callable[[_Items, _Predictions], np.ndarray]
    """Items and their predictions to (items, k)."""
    value: Callable[[np.ndarray], np.ndarray]
    """Sums of statistics (..., k) to the metric (...), in `unit`."""
    unit: str = "points"
    """points: 0 to 100; or nats per token."""
    greater_is_better: bool = True
    reads: Callable[[str], bool] | None = None
    """Whether any answer could match a reference. None: always."""
    signature: Callable[[_Items], str] | None = None
    """What else a number depends on, for the record."""

    def of(self, items: _Items, predictions: _Predictions) -> float:
        """The metric of all items."""
        return float(self.value(self.statistics(items, predictions).sum(0)))


def metrics_of(names: Sequence[str], *, choice: bool, marker: str | None = None) -> tuple[Metric, ...]:
    """The metrics to report for a task: its own in their order, the primary one first, then those that are always given.

    Args:
        names: names of `METRICS`.
        choice: whether the task has endings.
        marker: the text before the final answer of maths_exact_match; None: `MATHS_MARKER`.
    """
    all_names = dict.fromkeys((*names, *(ALWAYS_OF_A_CHOICE if choice else ()), *ALWAYS))
    return tuple(_with_marker(METRICS[name], marker or MATHS_MARKER) for name in all_names)


def _with_marker(metric: Metric, marker: str) -> Metric:
    if metric.name != "maths_exact_match" or marker == MATHS_MARKER:
        return metric
    return replace(
        metric,
        statistics=_text(partial(maths_exact_match, marker=marker)),
        reads=lambda text: maths_number(text, marker) is not None,
    )


def _mean(score: Callable[[Item, Prediction], float]) -> Callable[[_Items, _Predictions], np.ndarray]:
    """Statistics (items, 2): the item's score, and 1."""

    def statistics(items: _Items, predictions: _Predictions) -> np.ndarray:
        scores = [score(item, prediction) for item, prediction in zip(items, predictions, strict=True)]
        return np.stack([np.array(scores, dtype=np.float64), np.ones(len(scores))], 1)

    return statistics


def _text(score: Callable[[str, Sequence[str]], float]) -> Callable[[_Items, _Predictions], np.ndarray]:
    return _mean(lambda item, prediction: score(prediction["completion"], item["references"]))


def _corpus(
    statistics: Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray],
) -> Callable[[_Items, _Predictions], np.ndarray]:
    return lambda items, predictions: statistics(
        [prediction["completion"].strip() for prediction in predictions], _references(items)
    )


def _references(items: _Items) -> list[Sequence[str]]:
    return [item["references"] for item in items]


def _choice(*, normalised: bool) -> Callable[[Item, Prediction], float]:
    """1 if the right ending has the smallest loss: summed, or divided by the ending's number of characters.

    Not a number if a loss is not finite, as that of a model that diverged. Of equal texts either is right.
    """

    def score(item: Item, prediction: Prediction) -> float:
        lengths = [len(ending.strip()) or 1 if normalised else 1 for ending in item["endings"]]
        losses = [nats / length for (nats, _), length in zip(prediction["endings"], lengths, strict=True)]
        if not all(map(math.isfinite, losses)):
            return math.nan
        return float(item["endings"][losses.index(min(losses))] == item["endings"][item["label"]])

    return score


def _loss(items: _Items, predictions: _Predictions) -> np.ndarray:
    return np.array([(prediction["loss"], prediction["tokens"]) for prediction in predictions], dtype=np.float64)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _percent(sums: np.ndarray) -> np.ndarray:
    return 100 * _ratio(sums)


def _generated(name: str, title: str, score: Callable[[str, Sequence[str]], float], **more: Any) -> Metric:
    return Metric(name=name, title=title, needs="generation", statistics=_text(score), value=_percent, **more)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _generated("exact_match", "exact match", exact_match),
        _generated("f1", "F1", f1),
        _generated(
            "rouge_l",
            "ROUGE-L",
            corpus_scores.rouge_l,
            reads=corpus_scores.rouge_reads,
            signature=lambda items: corpus_scores.rouge_signature(),
        ),
        Metric(
            name="bleu",
            title="BLEU",
            needs="generation",
            statistics=_corpus(corpus_scores.bleu_statistics),
            value=corpus_scores.bleu_value,
            signature=lambda items: corpus_scores.sacrebleu_signature("bleu", _references(items)),
        ),
        Metric(
            name="chrf",
            title="chrF",
            needs="generation",
            statistics=_corpus(corpus_scores.chrf_statistics),
            value=corpus_scores.chrf_value,
            signature=lambda items: corpus_scores.sacrebleu_signature("chrf", _references(items)),
        ),
        _generated(
            "maths_exact_match",
            "maths exact match",
            maths_exact_match,
            reads=lambda text: maths_number(text) is not None,
        ),
        Metric(
            name="accuracy",
            title="accuracy",
            needs="endings",
            statistics=_mean(_choice(normalised=False)),
            value=_percent,
        ),
        Metric(
            name="accuracy_norm",
            title="accuracy per character",
            needs="endings",
            statistics=_mean(_choice(normalised=True)),
            value=_percent,
        ),
        Metric(
            name="answer_loss",
            title="answer loss",
            needs="loss",
            statistics=_loss,
            value=_ratio,
            unit="nats per token",
            greater_is_better=False,
        ),
    )
}
"""Name to metric, all that a task can name."""
