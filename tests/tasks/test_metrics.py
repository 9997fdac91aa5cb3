# SPDX-License-Identifier: Apache-2.0
"""Metrics against published examples, against sacrebleu itself, and against independent implementations. Pure maths."""

from __future__ import annotations

import math
import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from nemo_tied_lora.tasks.answer_texts import exact_match, f1, maths_exact_match, maths_number
from nemo_tied_lora.tasks.corpus_scores import bleu_statistics, bleu_value, chrf_statistics, chrf_value, rouge_l
from nemo_tied_lora.tasks.metrics import METRICS, Metric, metrics_of

# The example of sacrebleu's README.
ANSWERS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_bleu_and_chrf_of_sacrebleus_published_example_are_the_published_ones() -> None:
    items = [{"references": references} for references in REFERENCES]
    predictions = [{"completion": f" {answer}\n"} for answer in ANSWERS]
    assert METRICS["bleu"].of(items, predictions) == pytest.approx(48.53, abs=0.005)
    assert METRICS["chrf"].of(items, predictions) == pytest.approx(59.73, abs=0.005)
    bleu = METRICS["bleu"].signature
    assert bleu is not None
    assert bleu(items).startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    fewer = [{"references": references[(number == 0) :]} for number, references in enumerate(REFERENCES)]
    assert METRICS["bleu"].of(fewer, predictions) == pytest.approx(29.44, abs=0.005)
    assert bleu(fewer).startswith("nrefs:var|")


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("testing one", ["testing one two"], 4 / 5),
        ("testing two", ["testing one two"], 4 / 5),
        ("text first", ["first text", "first something"], 1 / 2),
        ("", ["testing one two"], 0.0),
    ],
)
def test_rouge_l_of_rouge_scores_published_examples(answer: str, references: list[str], score: float) -> None:
    assert rouge_l(answer, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "references", "exact", "overlap"),
    [
        ("The  Denver Broncos!", ["Denver Broncos", "the Broncos"], 1, 1),
        ("Saint Bernadette", ["Saint Bernadette Soubirous"], 0, 0.8),
        ("a cat sat on the cat", ["the cat"], 0, 0.4),
        ("an-other", ["another"], 1, 1),
        ("Theater", ["the ater"], 0, 0),
        ("the", ["a"], 0, 0),
        ("A.", ["A"], 1, 1),
        ("", ["A"], 0, 0),
        ("", ["..."], 0, 0),
        ("+", ["-"], 0, 0),
        (" + ", ["+"], 1, 1),
        ("東京。", ["東京"], 0, 0),
        ("the", ["cat"], 0, 0),
    ],
)
def test_exact_match_and_f1_follow_squads_rules(
    answer: str, references: list[str], exact: float, overlap: float
) -> None:
    assert exact_match(answer, references) == exact
    assert f1(answer, references) == pytest.approx(overlap)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("5 + 7 = 12\n#### 12", "12", True),
        ("#### 1,234.00", "#### 1234", True),
        ("#### $1,234.", "1234", True),
        ("#### -3 degrees", "-3", True),
        ("#### -$3", "-3", True),
        ("####\n42 apples", "#### 42", True),
        ("#### 3/4", "0.75", True),
        ("#### 3/0", "3", False),
        ("#### 12.5", "12", False),
        ("#### 12\n#### 13", "13", False),
        ("the answer is 12", "12", False),
        ("#### twelve", "12", False),
        ("####", "#### none", False),
    ],
)
def test_a_maths_answer_is_the_number_after_the_marker(answer: str, reference: str, right: bool) -> None:
    assert maths_exact_match(answer, [reference]) == right


def test_another_marker_is_the_tasks() -> None:
    assert maths_number("so 3, answer: 7", "answer:") == Fraction(7)
    (metric, _) = metrics_of(["maths_exact_match"], choice=False, marker="answer:")
    assert metric.of([{"references": ["7"]}], [{"completion": "so 3, answer: 7"}]) == 100
    assert METRICS["maths_exact_match"].of([{"references": ["7"]}], [{"completion": "so 3, answer: 7"}]) == 0


def test_a_choice_is_right_if_the_labels_ending_is_the_likeliest() -> None:
    item = {"endings": ["ab", "abcdefgh"], "label": 1, "references": []}
    by_sum, by_length = METRICS["accuracy"], METRICS["accuracy_norm"]
    prediction = {"endings": [(2.0, 1), (4.0, 5)]}
    assert (by_sum.of([item], [prediction]), by_length.of([item], [prediction])) == (0, 100)
    assert (by_sum.of([item, item], [prediction, {"endings": [(5.0, 1), (4.0, 5)]}])) == 50


def test_a_choice_of_a_model_that_diverged_is_not_a_number_and_equal_endings_are_equally_right() -> None:
    item = {"endings": [" x", " x", " y"], "label": 0}
    for name in ("accuracy", "accuracy_norm"):
        diverged = METRICS[name].of([item], [{"endings": [(math.nan, 1)] * 3}])
        assert math.isnan(diverged), "the first of equal losses would be a right answer"
        assert METRICS[name].of([item | {"label": 1}], [{"endings": [(1.0, 1), (1.0, 1), (2.0, 1)]}]) == 100


def test_the_answer_loss_is_per_token_over_all_items() -> None:
    predictions = [{"loss": 3.0, "tokens": 1}, {"loss": 1.0, "tokens": 3}]
    assert METRICS["answer_loss"].of([{}, {}], predictions) == 1.0


def test_the_primary_metric_is_first_and_losses_are_always_there() -> None:
    assert [metric.name for metric in metrics_of(["f1", "exact_match"], choice=False)] == [
        "f1",
        "exact_match",
        "answer_loss",
    ]
    names = [metric.name for metric in metrics_of(["accuracy_norm"], choice=True)]
    assert names == ["accuracy_norm", "accuracy", "answer_loss"]


def random_texts(count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Answers, some empty or equal to a reference, and one to three references for each."""
    draw = random.Random(seed)
    words = ["the", "a", "cat", "sat", "on", "mat,", "Dog", "dog.", "1,000", "ran", "über", "(x)", "an"]

    def text(least: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, 9)))

    references = [[text(1) for _ in range(draw.randint(1, 3))] for _ in range(count)]
    return [draw.choice([text(0), draw.choice(texts)]) for texts in references], references


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_sums_of_statistics_give_what_sacrebleu_gives_for_those_items(name: str) -> None:
    """Also for the few items of an odd draw, where counts are zero and sacrebleu smooths."""
    statistics, value = {"bleu": (bleu_statistics, bleu_value), "chrf": (chrf_statistics, chrf_value)}[name]
    theirs = BLEU(force=True) if name == "bleu" else CHRF()
    answers, references = random_texts(40, seed=1)
    found = statistics(answers, references)
    draws = [random.Random(seed).choices(range(40), k=1 + seed % 7) for seed in range(60)]
    got = value(np.stack([found[draw].sum(0) for draw in draws]))
    for draw, mine in zip(draws, got, strict=True):
        most = max(len(references[i]) for i in draw)
        by_number = [[references[i][n] if n < len(references[i]) else None for i in draw] for n in range(most)]
        want = theirs.corpus_score([answers[i] for i in draw], by_number).score  # type: ignore[arg-type]
        assert mine == pytest.approx(want, abs=1e-9)
    assert len({round(score, 6) for score in got}) > 30


def independent_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU by its definition, for one reference of letters and blanks."""
    logs, lengths = [], (sum(len(a.split()) for a in answers), sum(len(r.split()) for r in references))
    for n in range(1, 5):
        hits = total = 0
        for answer, reference in zip(answers, references, strict=True):
            grams = [Counter(zip(*(text.split()[i:] for i in range(n)), strict=False)) for text in (answer, reference)]
            hits, total = hits + (grams[0] & grams[1]).total(), total + grams[0].total()
        logs.append(math.log(hits / total))
    return 100 * min(1.0, math.exp(1 - lengths[1] / lengths[0])) * math.exp(sum(logs) / 4)


def independent_chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 by its definition, for one reference; characters without blanks."""
    precisions, recalls = [], []
    for n in range(1, 7):
        hits = ours = theirs = 0
        for pair in zip(answers, references, strict=True):
            bare = [text.replace(" ", "") for text in pair]
            a, b = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in bare)
            hits, ours, theirs = hits + (a & b).total(), ours + a.total(), theirs + b.total()
        precisions.append(hits / ours)
        recalls.append(hits / theirs)
    p, r = sum(precisions) / 6, sum(recalls) / 6
    return 100 * 5 * p * r / (4 * p + r)


def independent_rouge(answer: str, reference: str) -> float:
    """ROUGE-L's F by its definition: the longest common subsequence, found by trying all of the shorter's."""
    a, r = answer.split(), reference.split()

    def follows(mask: int) -> bool:
        left = iter(r)
        return all(word in left for number, word in enumerate(a) if mask >> number & 1)

    longest = max(mask.bit_count() for mask in range(1 << len(a)) if follows(mask))
    return 2 * longest / (len(a) + len(r))


def independent_f1(answer: str, reference: str) -> float:
    def words(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in string.punctuation)
        return [word for word in re.split(r"\s+", kept) if word not in ("", "a", "an", "the")]

    a, r = words(answer), words(reference)
    same = sum(min(a.count(word), r.count(word)) for word in set(a))
    return 2 * same / (len(a) + len(r)) if a or r else float(answer.lower().split() == reference.lower().split())


def test_metrics_agree_with_independent_implementations_on_random_texts() -> None:
    draw = random.Random(3)
    letters = ["red", "blue", "green", "pink", "teal", "gold"]
    texts = [" ".join(draw.choices(letters, k=draw.randint(4, 9))) for _ in range(60)]
    answers, references = texts[:30], texts[30:]
    items, predictions = [{"references": [r]} for r in references], [{"completion": a} for a in answers]

    def of(metric: Metric) -> float:
        return metric.of(items, predictions)

    assert of(METRICS["bleu"]) == pytest.approx(independent_bleu(answers, references))
    assert of(METRICS["chrf"]) == pytest.approx(independent_chrf(answers, references))
    rouges = [independent_rouge(a, r) for a, r in zip(answers, references, strict=True)]
    assert of(METRICS["rouge_l"]) == pytest.approx(100 * np.mean(rouges))
    answers, several = random_texts(200, seed=4)
    want = [max(independent_f1(a, r) for r in refs) for a, refs in zip(answers, several, strict=True)]
    assert [f1(a, refs) for a, refs in zip(answers, several, strict=True)] == pytest.approx(want)
    assert 0 < np.mean(want) < 1
