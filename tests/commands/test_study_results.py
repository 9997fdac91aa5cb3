# SPDX-License-Identifier: Apache-2.0
"""The files of results: small, exact, and refused when they do not belong together. Pure Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nemo_tied_lora.commands import compare
from nemo_tied_lora.commands.study.cells import FINAL, base_cell, method_cell
from nemo_tied_lora.commands.study.plan import Study
from nemo_tied_lora.commands.study.results import FORMAT, read_results, write_result
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.tasks.metrics import METRICS
from tests.harness.study_results import study_values, values_of

TEXTS = ["Der Wald ist still .", "Ein Ork", "", "Ich weiß es nicht , mein Herr .", "nein"]
ANSWERS = ["Der Wald war still .", "Ein Elf kommt", "ja", "Ich weiß nichts , mein Herr .", ""]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A small study."""
    return Study.from_config(study_values(tmp_path))


def test_statistics_come_back_exactly_and_small(study: Study) -> None:
    items = [{"references": [text]} for text in TEXTS * 80]
    predictions = [
        {"completion": text, "loss": 12.345678 + i, "tokens": 7 + i % 3} for i, text in enumerate(ANSWERS * 80)
    ]
    metrics = [METRICS[name] for name in ("chrf", "bleu", "exact_match", "answer_loss")]
    statistics = {metric.name: metric.statistics(items, predictions) for metric in metrics}
    cell = base_cell(study, study.tasks[0], FINAL)
    values = values_of(study, cell) | {"items": {"count": 400, "ids": "i"}}
    values["statistics"] = {name: columns.T.tolist() for name, columns in statistics.items()}
    path = write_result(Path(study.results), cell, values)
    assert path.name == f"spelling-base-{cell.key}.json"
    result = read_results(Path(study.results)).by_key[cell.key]
    for metric in metrics:
        columns = np.array(result.statistics(metric.name)).T
        if metric.name == "answer_loss":
            np.testing.assert_allclose(columns, statistics[metric.name], rtol=5e-5)
        else:
            np.testing.assert_array_equal(columns, statistics[metric.name])
    assert path.stat().st_size < 20_000


def test_a_file_of_another_kind_or_format_is_refused_with_all_others(study: Study) -> None:
    folder = Path(study.results)
    cell = base_cell(study, study.tasks[0], FINAL)
    path = write_result(folder, cell, values_of(study, cell))
    later = json.loads(path.read_text()) | {"format": FORMAT + 1}
    (folder / "a.json").write_text("{cut off")
    (folder / "b.json").write_text(json.dumps(later))
    (folder / "c.json").write_text("{}")
    (folder / "d.json").write_text(json.dumps({"format": FORMAT, "settings": {}}))
    whole = json.loads(path.read_text())
    (folder / "e.json").write_text(json.dumps(whole | {"scores": 5, "data": []}))
    (folder / "f.json").write_text(json.dumps(whole | {"scores": {}, "settings": {"task": "x"}}))
    with pytest.raises(ConfigError) as refused:
        read_results(folder)
    text = str(refused.value)
    assert f"{folder}/e.json: lacks data as a section, scores as a section; remove it" in text
    assert f"{folder}/f.json: lacks settings.base, scores.answer_loss; remove it" in text
    assert f"{folder}/a.json: cannot be read as a result of a study" in text
    assert f"{folder}/b.json: has format {FORMAT + 1}, this version reads {FORMAT}; remove it, or set results=" in text
    assert f"{folder}/c.json: is not a result of a study" in text
    assert f"{folder}/d.json: lacks data, scores" in text


def test_results_of_other_data_or_of_another_base_are_refused(study: Study) -> None:
    folder, task, lora = Path(study.results), study.tasks[0], study.method("lora")
    first, second = (method_cell(study, lora, task, FINAL, 0.01, seed) for seed in (1, 2))
    write_result(folder, first, values_of(study, first))
    path = write_result(folder, second, values_of(study, second, data="other"))
    with pytest.raises(ConfigError, match="spelling's test data has checksum othertest0, in spelling-lora-s1"):
        read_results(folder)
    write_result(folder, second, values_of(study, second) | {"base": "f2"})
    with pytest.raises(ConfigError, match=r"was made on a base with fingerprint f2, spelling-lora-s1.* on f1"):
        read_results(folder)
    path.rename(folder / "copy.json")
    write_result(folder, first, values_of(study, first))
    (folder / "copy.json").write_text(next(folder.glob("*-s1-*")).read_text())
    with pytest.raises(ConfigError, match=r"the same run as copy\.json; remove one of them"):
        read_results(folder)


def test_a_file_that_is_being_written_is_no_result(study: Study) -> None:
    cell = base_cell(study, study.tasks[0], FINAL)
    path = write_result(Path(study.results), cell, values_of(study, cell))
    path.rename(path.with_name(f".{path.name}.abcd1234"))
    assert read_results(Path(study.results)).by_key == {}


def test_a_study_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "x.json").write_text("{}")
    assert compare.main([f"results={folder}", "tasks.german_numbers.primary=bleu", "at_once=2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "x.json: is not a result of a study" in lines[1]
    assert "bleu is not a metric of this task" in lines[2]
    assert (
        "base.path=runs/quickstart/base.nemo: no such file; make it with: tied-lora quickstart model=tiny" in lines[3]
    )


def test_no_room_on_disk_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base.nemo"
    with base.open("wb") as file:
        file.truncate(1 << 42)  # a hole: it takes no room itself
    assert compare.main([f"base.path={base}"]) == 2
    text = capsys.readouterr().err
    assert "folder=runs/compare: 2 runs at a time need " in text
    assert "TMPDIR=" in text
    assert "lower at_once" in text


def test_a_place_that_cannot_be_written_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert compare.main(["results=file/results", "folder=file"]) == 2
    text = capsys.readouterr().err
    assert f"results=file/results: {tmp_path}/file is a file; name a folder" in text
    assert "folder=file: is a file; name a folder" in text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("at_once=0", "at_once=0: must be a whole number of at least 1"),
        ("limit=-1", "limit=-1: must be a whole number of at least 1"),
        ("minutes=0", "minutes=0: must be a positive number"),
        ("minutes=nan", "minutes=nan: must be a positive number"),
        ("page=pyproject.toml/page.md", "page=pyproject.toml/page.md: its folder is a file; name a folder"),
        ("methods.tl6.rates=[inf]", "methods.tl6.rates=[inf]: must be a list of positive numbers"),
        ("methods.tl6.rates=[true]", "methods.tl6.rates=[True]: must be a list of positive numbers"),
        ("methods.tl6.targets=[qkv]", "methods.tl6.targets: 'qkv' is unknown; choose from linear_qkv"),
        ("methods.tl6.seed=3", "methods.tl6.seed: not a key of methods.tl6; choose from preset, rank, targets, seeds"),
        ("model.optim.lr=1", "a key of finetune; write \"training.overrides=['model.optim.lr=1']\""),
        ("page=docs/page.txt", "page=docs/page.txt: must end in .md"),
        ("list=maybe", "list='maybe': must be true or false"),
        ("results=null", "results: missing; name a folder"),
        ("folder=7", "folder=7: is read as int, not as a path"),
    ],
)
def test_wrong_values_of_compare_are_refused(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([word]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert len(text.splitlines()) == 2  # no line that follows from another
