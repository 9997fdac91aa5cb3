# SPDX-License-Identifier: Apache-2.0
"""`tied-lora finetune task=NAME`: one process makes the files, after all else is right and before they are read. Pure Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.commands import finetune, launch, record
from nemo_tied_lora.commands.task_data import check_task, make_task_files
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.data.data_checks import data_problems
from nemo_tied_lora.planning.data.data_files import check_training_files, checked_already, mark_checked
from nemo_tied_lora.tasks.task import Task

TASK = ["task=nli_wordnet_senses", "task.limits={train: 30, validation: 10, test: 10}"]
MADE = Path("runs/tasks/nli_wordnet_senses/train.jsonl")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIED_LORA_CHECKED_DATA", "")
    return tmp_path


def config(*overrides: str) -> dict[str, Any]:
    return plain(compose_config("finetune", [*TASK, *overrides]))


def test_files_need_not_be_there_before_and_are_right_after() -> None:
    values = config()
    assert list(data_problems(values)) == []
    make_task_files(values)
    check_training_files(values)
    assert len(MADE.read_text().splitlines()) == 30
    mark_checked(values)
    assert checked_already(values), "the ranks neither make nor read them again"


def test_only_the_tasks_own_files_may_be_missing() -> None:
    found = list(data_problems(config("model.data.validation_ds.file_names=[mine.jsonl]")))
    assert found == ["model.data.validation_ds.file_names: mine.jsonl: no such file"]


def test_keys_of_the_data_still_override_the_task() -> None:
    values = config("model.data.train_ds.max_seq_length=64", "model.data.train_ds.file_names=[a.jsonl]")
    train = values["model"]["data"]["train_ds"]
    assert (train["max_seq_length"], train["file_names"]) == (64, ["a.jsonl"])
    assert values["model"]["data"]["validation_ds"]["max_seq_length"] == 64


def test_a_refused_run_makes_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main([*TASK, "task.metrics=[f2]", "model.restore_from_path=none.nemo"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].strip() for line in said[1:]] == ["task.metrics", "model.restore_from_path=none.nemo"]
    assert not MADE.parent.exists()


def test_a_slurm_jobs_first_step_makes_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record.main(["log", *TASK, "model.restore_from_path=none.nemo"]) == 2
    assert not MADE.exists()
    monkeypatch.setattr(record, "check_finetuning", lambda values: [])
    assert record.main(["log", *TASK]) == 0
    assert MADE.exists()


def test_launch_refuses_a_wrong_task(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("nemo_tied_lora.launching.submit.check_finetuning", lambda values, runs_here: [])
    assert launch.main(["cluster=slurm", "dry_run=true", *TASK]) == 0
    assert launch.main(["cluster=slurm", "dry_run=true", *TASK, "task.label=null"]) == 2
    assert "task.label: missing" in capsys.readouterr().err
    assert not MADE.exists()


def test_the_pages_own_task_works_as_it_is_written(folder: Path) -> None:
    from nemo_tied_lora.planning.composing.yaml_sources import YamlSources
    from tests.harness.paths import ROOT

    page = (ROOT / "docs" / "tasks.md").read_text()
    (folder / "my_configs" / "task").mkdir(parents=True)
    (folder / "my_configs" / "task" / "mine.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    (folder / "train.jsonl").write_text("".join(f'{{"question": "{n}?", "answer": {n}}}\n' for n in range(150)))
    (folder / "test.jsonl").write_text('{"question": "how many?", "answer": 3}\n')
    sources = YamlSources(config_dir=folder / "my_configs")
    values = plain(compose_config("finetune", ["task=mine"], sources))
    make_task_files(values)
    check_training_files(values)
    assert len(Path("runs/tasks/mine/train.jsonl").read_text().splitlines()) == 50


def test_an_own_task_that_is_not_yaml_or_lacks_its_first_line_is_one_line(folder: Path) -> None:
    from nemo_tied_lora.planning.composing.yaml_sources import YamlSources

    own = folder / "my_configs" / "task" / "mine.yaml"
    own.parent.mkdir(parents=True)
    sources = YamlSources(config_dir=folder / "my_configs")
    own.write_text("# @package _global_\ntask: [\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: line 3: not YAML: ") as caught:
        compose_config("evaluate", ["task=mine"], sources)
    assert len(caught.value.problems) == 1
    own.write_text("defaults: [base, _self_]\ntask:\n  name: mine\n")
    with pytest.raises(ConfigError) as caught:
        Task.from_config(plain(compose_config("evaluate", ["task=mine"], sources))["task"])
    assert caught.value.problems == ("task.task: the task's YAML must begin with the line # @package _global_",)


def test_a_run_without_a_task_is_as_before() -> None:
    values = plain(compose_config("finetune", []))
    check_task(values)
    make_task_files(values)
    with pytest.raises(ConfigError):
        check_task({"task": {}})


def test_launch_knows_the_tasks_files_by_their_paths_in_the_container(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def check(values: dict[str, Any], runs_here: bool) -> list[str]:
        seen.extend(data_problems(values))
        return []

    monkeypatch.setattr("nemo_tied_lora.launching.submit.check_finetuning", check)
    inside = [
        "cluster.container.image=a.sqsh",
        f"cluster.container.mounts=['{folder}:/data', '{folder}:{folder}']",
        f"exp_manager.explicit_log_dir={folder}/run",
        "task.folder=/data/task",
    ]
    assert launch.main(["cluster=slurm", "dry_run=true", *TASK, *inside]) == 0
    assert seen == []
    assert (
        launch.main(["cluster=slurm", "dry_run=true", *TASK, *inside, "model.data.train_ds.file_names=[/data/x]"]) == 0
    )
    assert seen == [f"model.data.train_ds.file_names: {folder}/x: no such file"]
