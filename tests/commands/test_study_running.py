# SPDX-License-Identifier: Apache-2.0
"""A study's runs: each is done once, by one process, and survives a kill. Processes without a model.

The commands that train and evaluate are stand-ins (`tests/harness/fake_tied_lora.py`); everything around them is real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.commands.study.cells import Cell
from nemo_tied_lora.commands.study.claims import claim, is_claimed
from nemo_tied_lora.commands.study.commands import Commands
from nemo_tied_lora.commands.study.one_run import folder_of, run_cell
from nemo_tied_lora.commands.study.plan import Study
from nemo_tied_lora.commands.study.results import Results, read_results
from nemo_tied_lora.commands.study.running import Outcome, run_study
from nemo_tied_lora.commands.study.schedule import schedule
from nemo_tied_lora.commands.study.task_files import prepare_tasks
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization
from nemo_tied_lora.tasks.training_order import line_length, training_items
from tests.harness.paths import ROOT
from tests.harness.study_results import study_values

FAKE = [sys.executable, "-S", str(ROOT / "tests" / "harness" / "fake_tied_lora.py")]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of two methods on a task of the project, in a folder with that task's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    data = tmp_path / "runs" / "quickstart" / "data"
    data.mkdir(parents=True)
    for number, split in enumerate(("train", "validation", "test")):
        items = [{"input": f"de {10 * i + number}:", "output": "x" * (5 + i)} for i in range(8)]
        (data / f"finetune_{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return Study.from_config(small_values(tmp_path))


def small_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two methods with a fixed rate and two seeds, on one task."""
    values = study_values(folder)
    method = {"rank": 8, "seeds": 2, "rates": [0.01]}
    values["methods"] = {name: {"preset": name, **method} for name in ("lora", "tl6")}
    values["claim"] |= {"rival": None}
    task = {"family": "numbers", "primary": "exact_match", "steps": 20, "max_seq_length": 64, "beyond_below": 0}
    values["tasks"] = {"german_numbers": {**task, "max_chars": 17}}
    return values | changes


def run(study: Study, **options: Any) -> Outcome:
    """`tied-lora compare`, without its checks and its page."""
    files, commands = prepare_tasks(study), Commands(1, FAKE)
    return run_study(
        study,
        lambda cell: folder_of(study, cell),
        lambda cell, held: run_cell(study, cell, files[cell.task], commands, held, keep_adapter=False),
        commands.stop,
        **{"at_once": 2, **options},
    )


def calls() -> list[list[str]]:
    """The arguments of all commands so far."""
    return [json.loads(line) for line in Path(os.environ["FAKE_CALLS"]).read_text().splitlines()]


def found(study: Study) -> Results:
    """The results so far."""
    return read_results(Path(study.results))


def all_cells(study: Study) -> tuple[Cell, ...]:
    """The runs of the study."""
    return schedule(study, {}).cells


def test_every_run_is_done_once_and_its_result_holds_what_the_page_needs(study: Study) -> None:
    assert len(run(study).done) == len(all_cells(study)) == 5
    words = calls()
    assert sorted(call[0] for call in words) == ["evaluate"] * 5 + ["finetune"] * 4
    assert run(study) == Outcome()
    assert len(calls()) == len(words)
    for cell in all_cells(study):
        result = found(study).of(cell)
        assert result is not None
        assert result.values["scores"]["exact_match"] == (0 if cell.method == "base" else 75)
        assert result.values["trained_parameters"] == {"base": 0, "lora": 1000, "tl6": 110}[cell.method]
        assert result.statistics("answer_loss") == [[5.0 + i for i in range(8)], [7.0] * 8]
        assert not list(folder_of(study, cell).glob("*.nemo"))


def test_a_training_gets_the_settings_of_its_key(study: Study) -> None:
    run(study)
    training = next(c for c in calls() if c[0] == "finetune" and "preset=tl6" in c and "model.seed=2" in c)
    assert {"task=german_numbers", "model.peft.tied_lora.seed=2", "model.optim.lr=0.01", "trainer.max_steps=20"} < set(
        training
    )
    assert {"trainer.precision=bf16", "model.peft.tied_lora.dtype=float32", "model.global_batch_size=8"} < set(
        training
    )
    assert "model.optim.lr_multipliers={v: 1, B: 1, u: 1, A: 1}" in training  # the rate is that of all factors
    train = next(word for word in training if word.startswith("model.data.train_ds.file_names"))
    assert "model.data.train_ds.shuffle=false" in training
    lines = Path(train.partition("=[")[2].rstrip("]")).read_text().splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) == 20 * 8
    lengths = {len(item["input"] + item["output"]) for item in items}
    assert 1 < len(lengths) < 8  # negative control: some items of the file are longer
    assert max(lengths) <= 17


def test_a_method_on_a_quantised_base_is_trained_and_evaluated_on_it(study: Study, tmp_path: Path) -> None:
    values = small_values(tmp_path, resamples=100)
    method = {"preset": "lora", "rank": 8, "seeds": 1, "rates": [0.01]}
    values["methods"] = {"lora": method, "tl6": {**method, "preset": "tl6"}}
    values["methods"]["lora_nf4"] = {**method, "base_quantization": {"kind": "nf4", "double": True}}
    assert len(run(Study.from_config(values)).done) == 5
    word = "model.base_quantization={kind: nf4, double: true}"
    quantised = sorted((call[0], "adapter=null" in call) for call in calls() if word in call)
    assert quantised == [("evaluate", False), ("evaluate", True), ("finetune", False)]
    assert not any("base_quantization" in part for call in calls() if word not in call for part in call)
    for command in ("finetune", "evaluate"):
        config = compose_config(command, [word])
        assert BaseQuantization.from_setting(plain(config)["model"]["base_quantization"]).precision == "nf4/64 double"


def test_the_items_of_a_run_follow_its_seed_in_batches_of_similar_length() -> None:
    lines = [json.dumps({"input": "x" * (number // 10), "output": str(number)}).encode() for number in range(10, 100)]
    first = training_items(lines, 30, 8, 1)
    assert training_items(lines, 30, 8, 1) == first
    assert training_items(lines, 30, 8, 2) != first
    assert len(first) == 240
    assert {first.count(line) for line in lines} == {2, 3}  # none comes again before all others have come
    batches = [[line_length(line) for line in first[start : start + 8]] for start in range(0, 240, 8)]
    assert max(max(lengths) - min(lengths) for lengths in batches) <= 1
    assert [lengths[0] for lengths in batches] != sorted(lengths[0] for lengths in batches)


def test_a_failed_run_is_recorded_and_tried_again_while_the_others_go_on(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"german_numbers-tl6-s1": 1}))
    outcome = run(study)
    assert list(outcome.failed) == ["german_numbers-tl6-s1"]
    failed = outcome.failed["german_numbers-tl6-s1"]
    assert failed.startswith(
        "exit code 1 (the gradient of layers.0.linear_qkv.u holds NaN or infinity on rank 0); its"
    )
    assert len(outcome.done) == 4
    monkeypatch.setenv("FAKE_FAULTS", "{}")
    assert [cell.label for cell in run(study).done] == ["german_numbers-tl6-s1"]


def test_a_study_whose_first_runs_all_fail_stops(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"german_numbers": 1}))
    outcome = run(study, at_once=1)
    assert (len(outcome.failed), outcome.stopped) == (3, "the first 3 runs failed")


def test_a_training_that_diverges_is_a_result_without_scores(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"preset=lora": "diverge"}))
    run(study)
    for cell in all_cells(study):
        result = found(study).of(cell)
        assert result is not None
        assert result.diverged == (cell.method == "lora")
        assert (result.loss == float("inf")) == (cell.method == "lora")


def test_a_run_whose_evaluation_failed_does_not_train_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"evaluate task=german_numbers": 1}))
    run(study, at_once=1)
    trained = [call for call in calls() if call[0] == "finetune"]
    monkeypatch.setenv("FAKE_FAULTS", "{}")
    run(study, at_once=1)
    again = [call for call in calls() if call[0] == "finetune"]
    assert len(trained) == 2
    assert len(again) == 4


def test_a_limit_of_runs_or_of_time_stops_new_runs_only(study: Study) -> None:
    assert len(run(study, limit=2).done) == 2
    outcome = run(study, minutes=1e-9)
    assert outcome.done == []
    assert outcome.stopped == "the time of minutes= is up"
    assert len(run(study, limit=3).done) == 3
    assert run(study, limit=1) == Outcome()  # all is done, so no limit was reached


def test_two_processes_never_do_the_same_run(study: Study) -> None:
    cells = all_cells(study)
    with claim(folder_of(study, cells[1])) as held:
        assert held is not None
        assert is_claimed(folder_of(study, cells[1]))
        outcome = run(study)
    assert [cell.label for cell in outcome.elsewhere] == [cells[1].label]
    assert len(outcome.done) == len(cells) - 1
    assert not is_claimed(folder_of(study, cells[1]))
    assert [cell.label for cell in run(study).done] == [cells[1].label]


PROGRAM = """
import sys
from pathlib import Path
from nemo_tied_lora.commands.compare import _stopped_by_sigterm
from nemo_tied_lora.commands.study.plan import Study
from tests.commands.test_study_running import run, small_values
with _stopped_by_sigterm():
    run(Study.from_config(small_values(Path.cwd())), at_once=1)
"""


def hangs_file() -> Path:
    """The file with the number of the process that hangs."""
    return Path(os.environ["FAKE_CALLS"]).with_suffix(".hangs")


def start_hanging(study: Study, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    """Starts the study in another process; the second run's training hangs."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"finetune task=german_numbers": "hang"}))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (hangs_file().exists() and hangs_file().read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert hangs_file().exists()
    monkeypatch.setenv("FAKE_FAULTS", "{}")
    return process


def test_a_stopped_study_stops_its_runs_and_continues(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_hanging(study, monkeypatch)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not is_claimed(folder_of(study, all_cells(study)[1]))
    assert len(found(study).by_key) == 1  # the base; nothing of the run that was stopped
    assert len(run(study).done) == 4


def test_a_run_stays_claimed_while_the_command_of_a_killed_study_lives(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start_hanging(study, monkeypatch)
    process.kill()
    process.wait()
    second = all_cells(study)[1]
    assert is_claimed(folder_of(study, second))
    assert [cell.label for cell in run(study).elsewhere] == [second.label]
    os.kill(int(hangs_file().read_text()), signal.SIGKILL)
    while is_claimed(folder_of(study, second)):
        time.sleep(0.02)
    assert [cell.label for cell in run(study).done] == [second.label]
