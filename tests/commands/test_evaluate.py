# SPDX-License-Identifier: Apache-2.0
"""`tied-lora evaluate`: refusals in this process, and the whole command on a tiny model: real NeMo, real ranks, real files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.commands.main import main
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.nemo.tokenized_items import TokenizedItems
from nemo_tied_lora.planning.base_config import base_model_config
from tests.harness.adapter_files import tiny_adapter
from tests.harness.base_files import write_base
from tests.harness.command_runs import tied_lora
from tests.harness.random_adapters import random_adapter

WORDS = ["eins", "zwei", "drei", "vier", "five", "six", "sept", "huit"]
TEST_ITEMS = 12
OWN_TASK = ["task=base", "task.name=own", "task.prompt='{q}'", "task.limits.validation=1"]
OWN_TASK += ["task.source.files={train: own_train.jsonl, test: own_test.jsonl}"]
GENERATION = [*OWN_TASK, "task.answer='{a}'", "task.metrics=[exact_match,bleu]", "task.generation.max_new_tokens=6"]
CHOICE = [*OWN_TASK, "task.folder=choice", "task.endings=ends", "task.label=right", "task.metrics=[accuracy]"]


def write_task(folder: Path) -> None:
    """Records whose prompts have different lengths, for generation and for a choice."""
    for split, count in (("train", 4), ("test", TEST_ITEMS)):
        lines = [
            {
                "q": f"{'1' * (i % 3)}{i % 8}{split[:2] if split == 'train' else ''}{i // 8}:",
                "a": WORDS[i % 8],
                "ends": [WORDS[i % 8], WORDS[(i + 1) % 8] + "s"][:: 1 if i % 2 else -1],
                "right": 0 if i % 2 else 1,
            }
            for i in range(count)
        ]
        (folder / f"own_{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path)
    write_base(tmp_path / "base.nemo")
    tiny_adapter(tmp_path / "a.nemo")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["evaluate", *words]) == 2
    _, found, told = capsys.readouterr().err.partition("tied-lora evaluate: not possible:\n")
    assert found
    return [line.strip() for line in told.splitlines()]


def test_every_mistake_is_reported_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*GENERATION, "task.metrics=[accuracy]", "adapter=[null,gone.nemo,base.nemo]", "base=none.nemo"]
    found = refused(capsys, *words, "batch_size=0", "resamples=many", "trainer.precision=8", "output=own_test.jsonl")
    starts = [
        "task.metrics: accuracy compares endings",
        "base=none.nemo: no such file",
        "adapter=gone.nemo: no such file",
    ]
    starts += ["adapter=base.nemo: is a base model", "batch_size=0:", "resamples='many':", "trainer.precision='8':"]
    starts += ["output=own_test.jsonl: is a file; name a folder"]
    assert [line[: len(start)] for line, start in zip(sorted(found), sorted(starts), strict=True)] == sorted(starts)
    assert not Path("runs").exists()


def test_what_is_missing_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line.split(":")[0] for line in refused(capsys)] == ["task", "base"]
    assert refused(capsys, *GENERATION, "base=base.nemo", "adapter=[]") == [
        'adapter=[]: names nothing to evaluate; write adapter=null for the base, or "adapter=[null,a.nemo]"'
    ]


def test_a_number_is_a_folders_name_and_a_file_in_the_way_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*GENERATION, "base=base.nemo"]
    (line,) = refused(capsys, *words, "output=own_test.jsonl/x")
    assert line == f"output=own_test.jsonl/x: {folder / 'own_test.jsonl'} is a file; name a folder"
    Path("2024").mkdir()
    Path("2024/evaluation.json").write_text("{}")
    (line,) = refused(capsys, *words, "output=2024")
    assert line.startswith("output=2024: holds an evaluation with other settings")
    (line,) = refused(capsys, *words, "resamples=100001")
    assert line.startswith("resamples=100001: must be at most 100000")


def test_an_empty_test_set_is_refused_before_torch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own_test.jsonl").write_text("\n")
    (line,) = refused(capsys, *GENERATION, "base=base.nemo")
    assert "test" in line


def test_an_adapter_of_a_base_with_other_sizes_is_refused_before_torch(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = random_adapter({**base_model_config(folder / "base.nemo"), "position_embedding_type": "rope"})
    facts = {"base": {"architecture": {"num_layers": 7, "hidden_size": 24}}}
    write_adapter(folder / "b.nemo", other.config, other.shapes, other.state, facts)
    (line, *_) = refused(capsys, *GENERATION, "base=base.nemo", "adapter=b.nemo")
    assert line.startswith("adapter=b.nemo: was trained on a base with num_layers=7, and this one has ")


def test_items_that_are_too_long_for_the_base_are_named() -> None:
    letters = SimpleNamespace(
        text_to_ids=lambda text: [ord(one) % 50 for one in text.strip()], eos_id=0, bos_id=-1, vocab_size=50
    )
    cfg = {"position_embedding_type": "learned_absolute", "encoder_seq_length": 8, "override_vocab_size": 50}
    model = SimpleNamespace(tokenizer=letters, cfg=OmegaConf.create(cfg))
    fits = {"id": "a", "input": "12345", "output": " 678"}  # 5 + 3 + end-of-text; the last is only predicted
    found = TokenizedItems.of(model, [fits, {"id": "b", "input": "", "endings": [" 1", " 22"], "label": 1}])
    assert [len(prompt) for prompt in found.prompts] == [5, 1]
    assert [[len(answer) for answer in answers] for answers in found.answers] == [[4], [2, 3]]
    assert (found.labels, found.prompts[1]) == ([0, 1], [0])
    with pytest.raises(ConfigError) as caught:
        TokenizedItems.of(model, [fits, *[{**fits, "id": f"c{i}", "input": "123456"} for i in range(14)]])
    first, *_, last = caught.value.problems
    assert first.startswith(
        "task item c0: has 6 tokens in its prompt and 4 in its answer, and the base learned positions for 8;"
    )
    assert (last, len(caught.value.problems)) == ("and 4 more problems of items", 11)


# The whole command. One module-wide folder, because each run adds to the others' claims.


@pytest.fixture(scope="module")
def bench(workshop: Path) -> Path:
    """The workshop with a task and two adapters of its base."""
    write_task(workshop)
    base = base_model_config(workshop / "base.nemo")
    file = random_adapter(base)
    write_adapter(workshop / "x.nemo", file.config, file.shapes, file.state, {})
    stranger = {"base": {"fingerprint": {"value": "0" * 32, "weights": {"decoder": "1"}, "vocab_rows": None}}}
    write_adapter(workshop / "stranger.nemo", file.config, file.shapes, file.state, stranger)
    return workshop


def evaluate(bench: Path, output: str, *words: str, **more: Any) -> tuple[dict[str, Any], str, str]:
    """Returns results.json and what was printed."""
    done = tied_lora("evaluate", "base=base.nemo", f"output={output}", "resamples=200", *words, folder=bench, **more)
    results = json.loads((bench / output / "results.json").read_text()) if done.returncode == 0 else {}
    return results, done.stdout, done.stderr


@pytest.fixture(scope="module")
def single(bench: Path) -> tuple[dict[str, Any], str, str]:
    return evaluate(bench, "single", *GENERATION, "adapter=[null,x.nemo]", "trainer.precision=32")


def lines(bench: Path, output: str, name: str) -> list[dict[str, Any]]:
    (file,) = (bench / output).glob(f"{name}*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_it_measures_the_base_and_its_adapters(bench: Path, single: tuple[dict[str, Any], str, str]) -> None:
    results, printed, progress = single
    assert list(results["adapters"]) == ["base", "x"]
    assert list(results["metrics"]) == ["exact_match", "bleu", "answer_loss"]
    base, adapted = (lines(bench, "single", name) for name in ("base", "x"))
    assert len(base) == TEST_ITEMS
    assert [one["loss"] for one in base] != [one["loss"] for one in adapted]
    loss = sum(one["loss"] for one in base) / sum(one["tokens"] for one in base)
    assert results["adapters"]["base"]["metrics"]["answer_loss"]["value"] == pytest.approx(loss, abs=1e-6)
    assert {one["tokens"] - len(one["references"][0]) for one in base} == {1}  # each letter, and end-of-text
    assert "| exact match" in printed
    assert "| x - base" in printed
    assert "base: losses: 12 of 12 items" in progress
    assert "x: answers: 12 of 12 items" in progress


KILLED = """
import os, sys
from nemo_tied_lora.tasks.predictions import Predictions

add = Predictions.add

def dying(predictions, done):
    add(predictions, done)
    if predictions.path.name.startswith("x") and "completion" in next(iter(done.values())):
        os._exit(9)

Predictions.add = dying
"""


def test_a_killed_evaluation_on_another_layout_continues_to_the_same_results(
    bench: Path, single: tuple[dict[str, Any], str, str], tmp_path: Path
) -> None:
    words = [*GENERATION, "adapter=[null,x.nemo]", "trainer.precision=32", "layout=pp2", "batch_size=5"]
    (tmp_path / "sitecustomize.py").write_text(KILLED)
    _, printed, _ = evaluate(bench, "pp2", *words, ok=False, planted={"PYTHONPATH": str(tmp_path)})
    assert "written" not in printed
    assert (bench / "pp2" / "base.jsonl").exists()
    (part,) = (bench / "pp2").glob("x-*.part.jsonl")
    kept = part.read_text()
    results, _, progress = evaluate(bench, "pp2", *words)
    assert kept.count("completion") == 5
    assert "base: all 12 predictions are there from before" in progress
    assert "x: 12 items, 5 of them are there from before" in progress
    assert "x: answers: 7 of 7 items" in progress
    for name in ("base", "x"):
        for here, there in zip(lines(bench, "pp2", name), lines(bench, "single", name), strict=True):
            assert here["completion"] == there["completion"]
            assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)  # sums in another order, in float32
    want = single[0]["adapters"]["x"]["metrics"]["exact_match"]
    assert results["adapters"]["x"]["metrics"]["exact_match"] == want


def test_a_choice_takes_the_likeliest_ending_and_bf16_is_near_to_float32(bench: Path) -> None:
    whole, _, _ = evaluate(bench, "choice32", *CHOICE, "trainer.precision=32")
    near, printed, _ = evaluate(bench, "choice16", *CHOICE, "layout=tp2", "batch_tokens=20")
    assert "| base    | " in printed
    exact, rounded = (lines(bench, output, "base") for output in ("choice32", "choice16"))
    for one, other in zip(exact, rounded, strict=True):
        ends = [loss for loss, _ in one["endings"]]
        assert one["loss"] in ends
        assert [loss for loss, _ in other["endings"]] == pytest.approx(ends, rel=0.02)  # bfloat16 has 8 bits
    right = sum(one["loss"] == min(loss for loss, _ in one["endings"]) for one in exact)
    assert whole["adapters"]["base"]["metrics"]["accuracy"]["value"] == pytest.approx(100 * right / TEST_ITEMS)
    assert near["settings"]["precision"] == "bf16"


def test_an_adapter_of_other_weights_is_refused_before_anything_is_evaluated(bench: Path) -> None:
    words = [*GENERATION, "adapter=[x.nemo,stranger.nemo]", "trainer.precision=32"]
    _, _, told = evaluate(bench, "strange", *words, ok=False)
    assert "stranger.nemo: base: the adapter was trained on other weights" in told
    assert "allow_other_base=true" in told
    assert [path.name for path in (bench / "strange").glob("*.jsonl")] == []
