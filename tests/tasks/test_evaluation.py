# SPDX-License-Identifier: Apache-2.0
"""What an evaluation keeps on disk: through kills, other settings and full disks, to results.json. Pure Python."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.tasks import evaluation as evaluation_module
from nemo_tied_lora.tasks.adapters import adapter_list, adapter_list_problems, adapter_names
from nemo_tied_lora.tasks.checksums import file_checksum
from nemo_tied_lora.tasks.evaluation import Evaluation
from nemo_tied_lora.tasks.metrics import METRICS
from nemo_tied_lora.tasks.predictions import alone_in
from nemo_tied_lora.tasks.prepare import prepare
from nemo_tied_lora.tasks.results import measured, results_table
from nemo_tied_lora.tasks.task import Task
from tests.harness.adapter_files import tiny_adapter

ITEMS = 12


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task's files, something that passes for a base, and two adapters."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 4), ("test", ITEMS)):
        lines = [{"q": f"{split} {i}", "a": f"word {i % 5}", "kind": "odd" if i % 3 else "even"} for i in range(count)]
        for number, line in enumerate(lines):
            line |= {"kanji": "本", "mixed": "none" if number % 2 else "#### 1"}
        Path(f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("base.nemo").write_bytes(b"weights")
    for name, rank in (("a", 2), ("b", 3)):
        Path(name).mkdir()
        tiny_adapter(Path(name) / "adapter.nemo", rank=rank)
    return tmp_path


def evaluation(*overrides: str, adapters: tuple[str | None, ...] = (None,), **more: Any) -> Evaluation:
    words = ["task=base", "task.name=mine", "task.prompt='{q}'", "task.answer='{a}'", "task.group=kind"]
    words += ["task.source.files={train: train.jsonl, test: test.jsonl}", "task.limits.validation=1"]
    task = Task.from_config(
        plain(compose_config("evaluate", [*words, "task.metrics=[exact_match,f1]", *overrides]))["task"]
    )
    return Evaluation(task, prepare(task), base="base.nemo", adapters=adapters, folder=None, precision="32", **more)


def predict(one: Evaluation, adapter: int = 0, *, right: int = ITEMS, most: int = ITEMS) -> None:
    """Predicts what is missing, of at most so many items: the first `right` items get their reference."""
    predictions = one.predictions[adapter]
    for number in predictions.missing("loss")[:most]:
        one.keep(adapter, {number: {"loss": 1.5 + number, "tokens": 3}})
    for number in predictions.missing("completion")[:most]:
        text = one.items[number]["references"][0] if number < right else "wrong"
        one.keep(adapter, {number: {"completion": text}})


def finished(*overrides: str, adapters: tuple[str | None, ...] = (None,)) -> dict[str, Any]:
    one = evaluation(*overrides, adapters=adapters)
    one.check()
    one.begin()
    for number, path in enumerate(adapters):
        predict(one, number, right=3 if path is None else 9)
    return one.finish(resamples=200, layout={"tensor_model_parallel_size": 1})


def test_a_quantised_base_needs_a_folder_of_its_own() -> None:
    evaluation().begin()
    assert "base_quantization" not in evaluation().settings  # so that older folders stay usable
    evaluation().check()
    with pytest.raises(ConfigError, match="base_quantization"):
        evaluation(base_quantization="nf4/64").check()


def test_results_hold_every_number_with_its_interval_and_what_it_was_made_with() -> None:
    results = finished(adapters=(None, "a/adapter.nemo", "b/adapter.nemo"))
    assert results == json.loads(Path("runs/evaluate/mine/results.json").read_text())
    assert (results["primary"], results["items"], list(results["metrics"])) == (
        "exact_match",
        ITEMS,
        ["exact_match", "f1", "answer_loss"],
    )
    base, a = results["adapters"]["base"], results["adapters"]["a"]
    assert base["metrics"]["exact_match"]["value"] == 25
    assert base["metrics"]["answer_loss"]["value"] == pytest.approx(sum(1.5 + n for n in range(ITEMS)) / (3 * ITEMS))
    assert 0 <= base["metrics"]["exact_match"]["low"] < 25 < base["metrics"]["exact_match"]["high"] < 100
    assert (base["adapter"], a["adapter"], a["sha256"]) == (
        None,
        "a/adapter.nemo",
        file_checksum(Path("a/adapter.nemo")),
    )
    assert a["trained_parameters"] > 0
    pairs = {(one["first"], one["second"]): one["metrics"]["exact_match"] for one in results["differences"]}
    assert list(pairs) == [("base", "a"), ("base", "b"), ("a", "b")]
    assert pairs["base", "a"]["value"] == 50
    assert pairs["base", "a"]["low"] > 0
    assert pairs["a", "b"] == {"value": 0, "low": 0, "high": 0}
    assert {group: part["items"] for group, part in results["groups"].items()} == {"even": 4, "odd": 8}
    assert results["groups"]["even"]["adapters"]["a"]["metrics"]["exact_match"]["value"] == 75
    assert results["versions"]["sacrebleu"]
    assert results["settings"]["precision"] == "32"


def test_the_table_shows_the_primary_metric_first_and_differences_with_a_sign() -> None:
    lines = results_table(finished("task.metrics=[f1]", adapters=(None, "a/adapter.nemo"))).splitlines()
    assert lines[0] == f"{ITEMS} items"
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["adapter", "trained", "F1", "answer loss"]
    assert [line.split("|")[2].strip() for line in lines[4:6]] == ["0", "1,568"]
    assert any(line.startswith("| a - base   | +") for line in lines)
    assert "even: 4 items" in lines


def test_a_killed_evaluation_continues_where_it_stopped() -> None:
    whole = finished()
    first = Path("runs/evaluate/mine/base.jsonl").read_bytes()
    os.rename("runs/evaluate", "runs/whole")
    killed = evaluation()
    killed.begin()
    predict(killed, right=3, most=5)
    part = Path("runs/evaluate/mine/base.part.jsonl")
    killed.predictions[0].close()
    part.write_bytes(part.read_bytes() + b'{"item": 7, "completion": "wor')  # what a kill leaves of a line
    again = evaluation()
    assert (again.predictions[0].missing("loss"), again.predictions[0].missing("completion")) == (
        list(range(5, ITEMS)),
        list(range(5, ITEMS)),
    )
    assert part.read_bytes().endswith(b"\n")
    predict(again, right=3)
    assert again.finish(resamples=200, layout={"tensor_model_parallel_size": 1}) == whole
    assert Path("runs/evaluate/mine/base.jsonl").read_bytes() == first
    assert not part.exists()


def test_a_finished_file_is_used_again_and_says_what_was_predicted() -> None:
    finished()
    again = evaluation()
    assert again.predictions[0].missing("loss") == []
    lines = [json.loads(line) for line in Path("runs/evaluate/mine/base.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [item["id"] for item in again.items]
    assert lines[0] | {"id": ""} == {
        "id": "",
        "group": "even",
        "loss": 1.5,
        "tokens": 3,
        "completion": "word 0",
        "references": ["word 0"],
    }


def test_an_adapter_with_other_weights_at_the_same_path_is_predicted_anew() -> None:
    finished(adapters=("a/adapter.nemo",))
    os.replace("b/adapter.nemo", "a/adapter.nemo")
    assert len(evaluation(adapters=("a/adapter.nemo",)).predictions[0].missing("loss")) == ITEMS


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["task.generation.max_new_tokens=5"], "generation.max_new_tokens 64, here 5"),
        (["task.limits.test=7"], "task.test_sha256"),
        (["task.metrics=[answer_loss]"], "generation.max_new_tokens 64, here None"),
    ],
)
def test_a_folder_of_other_settings_is_refused_with_what_differs(change: list[str], told: str) -> None:
    finished()
    with pytest.raises(ConfigError) as refused:
        evaluation(*change).check()
    (problem,) = refused.value.problems
    assert problem.startswith("output=runs/evaluate/mine: holds an evaluation with other settings (")
    assert told in problem
    assert problem.endswith("name another folder, or delete it")


def test_another_base_is_refused_too() -> None:
    finished()
    Path("base.nemo").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="base_sha256"):
        evaluation().check()


def test_a_file_of_another_test_set_is_refused() -> None:
    finished()
    path = Path("runs/evaluate/mine/base.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ConfigError, match="does not hold the predictions of this test set; delete it"):
        _ = evaluation().predictions


def test_two_evaluations_do_not_write_to_one_folder() -> None:
    with (
        alone_in(Path("out")),
        pytest.raises(ConfigError, match="another evaluation writes there now"),
        alone_in(Path("out")),
    ):
        pass
    with alone_in(Path("out")):
        pass


def test_a_full_disk_is_one_line_and_keeps_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    one = evaluation()
    one.begin()
    predict(one, most=4)

    class Full:
        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(one.predictions[0], "_file", Full())
    with pytest.raises(
        ConfigError, match="output=runs/evaluate/mine: cannot be written: No space left on device; what is"
    ):
        one.keep(0, {4: {"loss": 1.0, "tokens": 1}})
    assert evaluation().predictions[0].missing("loss") == list(range(4, ITEMS))


def test_too_little_room_is_seen_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    one, usage = evaluation(), type("usage", (), {"free": 10})
    monkeypatch.setattr(evaluation_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ConfigError, match=r"no room on disk: predictions may take 98,304 bytes, and 10 are free; name"
    ):
        one.check()


def test_a_loss_that_is_not_finite_is_null_and_the_other_numbers_stay() -> None:
    items = [{"references": ["x"]}] * 3
    predictions = [{"loss": float("nan"), "tokens": 1, "completion": "x"}] + [
        {"loss": 1.0, "tokens": 1, "completion": "x"}
    ] * 2
    results = measured(items, {"base": predictions}, [METRICS["exact_match"], METRICS["answer_loss"]], resamples=50)
    assert results["adapters"]["base"]["metrics"]["answer_loss"]["value"] is None
    assert results["adapters"]["base"]["metrics"]["exact_match"]["value"] == 100
    assert "not finite" in results_table(results)


def test_a_longer_list_gives_an_adapter_another_name_but_keeps_its_predictions() -> None:
    Path("old/a").mkdir(parents=True)
    tiny_adapter(Path("old/a/adapter.nemo"), rank=4)
    finished(adapters=("a/adapter.nemo",))
    longer = evaluation(adapters=("old/a/adapter.nemo", "a/adapter.nemo"))
    assert [len(one.missing("loss")) for one in longer.predictions] == [ITEMS, 0]
    assert len({one.path for one in longer.predictions}) == 2


def test_references_that_a_metric_cannot_read_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"rouge_l: 12 of 12 test items have no reference that rouge_l can read.*日"):
        evaluation("task.answer='日{kanji}'", "task.metrics=[rouge_l]").check()
    evaluation("task.references=mixed", "task.metrics=[maths_exact_match]").check()
    assert "task mine: 6 of 12 test items have no reference that maths_exact_match can read" in capsys.readouterr().err


def test_names_are_as_short_as_they_can_be() -> None:
    assert adapter_names([None, "a.nemo", "runs/german/adapter.nemo"]) == ["base", "a", "german"]
    assert adapter_names(["runs/x/adapter.nemo", "old/x/adapter.nemo"]) == ["runs/x", "old/x"]
    assert adapter_names([None, "new/base.nemo"])[1].endswith("new/base")


def test_a_list_of_adapters_is_checked() -> None:
    assert adapter_list(None) == [None]
    assert adapter_list("a.nemo") == ["a.nemo"]
    assert list(adapter_list_problems([None, "a.nemo"])) == []
    assert "names nothing" in next(adapter_list_problems([]))
    assert "must be a path" in next(adapter_list_problems([["a"]]))
    assert list(adapter_list_problems(["a.nemo", "./a.nemo"])) == ["adapter: ./a.nemo is there twice; leave one out"]


def test_a_large_file_is_sampled_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_tied_lora.tasks import checksums

    for name, value in (("_WHOLE_BYTES", 1000), ("_SAMPLES", 5), ("_SAMPLE_BYTES", 100)):
        monkeypatch.setattr(checksums, name, value)
    content = bytearray(5000)
    Path("large").write_bytes(content)
    first = file_checksum(Path("large"))
    for place, differs in ((4999, True), (0, True), (600, False)):
        changed = bytearray(content)
        changed[place] = 1
        Path("changed").write_bytes(changed)
        assert (file_checksum(Path("changed")) != first) is differs
