# SPDX-License-Identifier: Apache-2.0
"""One process: whole runs of benchmarks/forms on a tiny model and tiny data, and their results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forms.batches import Encoder
from forms.cells import ACCURACY, LOSS, base_cell, cell
from forms.form import Form
from forms.llama import Batch, FrozenLlama
from forms.one_run import Bench
from forms.plan import FORMS, Plan, Task, read_plan
from torch.nn import functional

from nemo_tied_lora.commands.study.results import read_results, write_result
from nemo_tied_lora.commands.study.task_files import TaskFiles
from tests.harness.twin_folders import write_twin

ENDINGS = [" w1 w9", " w2 w9", " w3 w9"]


def item(number: int) -> dict[str, Any]:
    label = number % 3
    prompt = " ".join(f"w{(number * step) % 30}" for step in range(1, 4 + number % 3))
    return {"id": f"i{number}", "input": prompt, "output": ENDINGS[label], "endings": ENDINGS, "label": label}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base, train.jsonl and test.jsonl."""
    folder = tmp_path_factory.mktemp("bench")
    write_twin(folder)
    for name, numbers in (("train", range(40)), ("test", range(100, 112))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item(number)) + "\n" for number in numbers))
    return folder


@pytest.fixture
def plan() -> Plan:
    """The forms' plan, with short runs."""
    found = read_plan(FORMS)
    training = replace(found.training, batch=4, warmup_steps=1, start_batches=2)
    return replace(found, training=training, sweep=replace(found.sweep, steps=6))


@pytest.fixture
def task(plan: Plan) -> Task:
    """A choice task."""
    (found,) = (one for one in plan.tasks if one.choice)
    return replace(found, steps=6)


@pytest.fixture
def bench(place: Path) -> Bench:
    tests = place / "test.jsonl"
    files = TaskFiles(
        (),
        place / "train.jsonl",
        {"test": tests, "validation": tests},
        None,
        dict.fromkeys(("train", "test", "validation"), "sum"),
        0,
    )
    return Bench(place, "a fingerprint", lambda name: files)


def test_the_base_is_measured_as_each_item_alone_would_be(place: Path, bench: Bench, plan: Plan, task: Task) -> None:
    found = bench.result(base_cell(plan, task, "test"))
    model, encoder = FrozenLlama(place), Encoder(place)
    nats, right = [], []
    for number in range(100, 112):
        one = item(number)
        batch = Batch.of([encoder.pair(one)])
        logits = model.answer_logits(batch, model.plain).float()
        nats.append(float(functional.cross_entropy(logits, batch.targets, reduction="sum")))
        right.append(float(logits[0, [2, 3, 4]].argmax() == one["label"]))  # w1, w2, w3
    assert found["statistics"][LOSS][0] == pytest.approx(nats, rel=0.02)  # bfloat16: other batches round otherwise
    assert found["statistics"][LOSS][1] == [3] * 12  # two words and the end
    assert found["scores"][LOSS] == pytest.approx(sum(nats) / 36, rel=0.01)
    assert found["statistics"][ACCURACY][0] == right
    assert found["trained_parameters"] == 0


@pytest.mark.parametrize("name", ["tl6", "tl6_gradient", "frozen_core_untied"])
def test_a_run_learns_and_its_result_can_be_read(
    bench: Bench, plan: Plan, task: Task, tmp_path: Path, name: str
) -> None:
    form = Form.of({**plan.candidate(name).form, "rank": 2})
    base = bench.result(base_cell(plan, task, "test"))
    one = cell(plan, task, "test", name, form, multipliers={"A": 0.5, "v": 2.0}, rate=0.05, seed=1)
    found = bench.result(one)
    assert found["scores"][LOSS] < base["scores"][LOSS] - 0.1
    write_result(tmp_path, one, found)  # type: ignore[arg-type]
    results = read_results(tmp_path)
    assert results.by_key[one.key].loss == found["scores"][LOSS]
    assert results.by_key[one.key].statistics(ACCURACY)[0] == found["statistics"][ACCURACY][0]
    assert bench.result(one)["training_loss"] == found["training_loss"]  # the same bits again
    used = {"tl6": {"A": 0.5, "v": 2.0}, "tl6_gradient": {"A": 0.5, "v": 2.0}, "frozen_core_untied": {}}[name]
    assert one.settings["multipliers"] == used


def test_a_run_that_diverges_has_a_result_without_scores(bench: Bench, plan: Plan, task: Task, tmp_path: Path) -> None:
    one = cell(plan, task, "validation", "tl6", Form(rank=2), multipliers={}, rate=1e30, seed=1)
    found = bench.result(one)
    assert (found["diverged"], found["scores"]) == (True, {})
    write_result(tmp_path, one, found)  # type: ignore[arg-type]
    assert read_results(tmp_path).losses() == {one.key: float("inf")}


def test_endings_that_differ_in_two_tokens_are_refused(bench: Bench, plan: Plan, task: Task, place: Path) -> None:
    wrong = {**item(1), "endings": [" w1 w9", " w2 w8", " w3 w7"]}
    path = place / "wrong.jsonl"
    path.write_text(json.dumps(wrong) + "\n")
    files = TaskFiles((), path, {"test": path}, None, {"test": "sum"}, 0)
    with pytest.raises(ValueError, match="differ in more than one token"):
        Bench(place, "a fingerprint", lambda name: files).result(base_cell(plan, task, "test"))


def test_a_prompt_that_is_too_long_loses_its_end(place: Path) -> None:
    encoder = Encoder(place)
    long = {"input": "w1 w2 w3 w4 w5", "output": " w6"}
    assert encoder.pair(long) == ([2, 3, 4, 5, 6], [7, 0])
    assert encoder.pair(long, 5) == ([2, 3, 4], [7, 0])
