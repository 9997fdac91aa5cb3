# SPDX-License-Identifier: Apache-2.0
"""Hydra's flags on every command: each works or is answered in one line. The whole command, without ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_tied_lora.commands import distributed_command
from nemo_tied_lora.commands.main import COMMANDS, main
from nemo_tied_lora.planning.composing.compose import compose_config
from nemo_tied_lora.planning.composing.yaml_sources import YamlSources
from nemo_tied_lora.planning.rank_variables import LAUNCHER
from tests.harness.nemo_yamls import FINETUNING, GENERATION

MINE = ["--config-path=conf", "--config-name=mine"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two YAMLs for NeMo's scripts."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(yaml.safe_dump(FINETUNING))
    (tmp_path / "conf" / "gen.yaml").write_text(yaml.safe_dump(GENERATION))
    for name in ("RANK", "WORLD_SIZE", LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(*words: str) -> int:
    """The exit code, however the command ends."""
    try:
        return main(list(words))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--multirun", "seed=1,2"], "tied-lora launch with several values"),
        (["-m"], "tied-lora launch"),
        (["--info", "defaults"], "--cfg job"),
        (["-i"], "--cfg job"),
        (["--shell-completion"], "--help"),
        (["--experimental-rerun", "x.pickle"], "resumes by itself"),
        (["--confg-name=mine"], "did you mean --config-name?"),
        (["--cfgs", "job"], "did you mean --cfg?"),
        (["--verbose"], "unknown flag"),
        (["--config", "conf/mine.yaml"], "--config-name=FILE"),
        (["--model.seed=5"], "write model.seed=5"),
        (["--cfg", "hydra"], "choose from"),
        (["--config-path"], "expected one argument"),
    ],
)
def test_a_flag_that_does_not_work_is_answered_in_one_line(
    command: str, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(command, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tied-lora {command}: ")
    assert told in line


@pytest.mark.parametrize("command", ["plan", "finetune", "generate", "pretrain", "show", "launch"])
def test_the_flags_that_work_work_together(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(command, "--run", "hydra.run.dir=/tmp", "hydra/job_logging=none", "--cfg", "job", "--resolve") in (
        0,
        2,
    )
    assert ended(command, "-r", "hydra.run.dir=.", "--cfg", "job") == 0
    assert yaml.safe_load(capsys.readouterr().out)
    assert ended(command, "--hydra-help") == 0
    assert "--multirun" in capsys.readouterr().out


def test_cfg_prints_one_section_of_a_users_yaml_and_the_notes_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("finetune", "-cp", "conf", "-cn", "mine", "-c", "job", "-p", "model.peft", "--resolve") == 0
    printed = capsys.readouterr()
    peft = yaml.safe_load(printed.out)
    assert (peft["peft_scheme"], peft["tied_lora"]["rank"]) == ("tied_lora", 32)
    assert all(line.startswith("tied-lora finetune: ") for line in printed.err.splitlines())
    assert "lora_tuning: taken as model.peft.tied_lora.rank=32" in printed.err
    assert ended("finetune", *MINE, "--cfg", "job", "--package", "model.nothing") == 2
    assert "--package=model.nothing" in capsys.readouterr().err
    assert ended("launch", *MINE, "--cfg", "job", "--package=model.peft.tied_lora") == 0
    assert yaml.safe_load(capsys.readouterr().out)["rank"] == 32
    assert ended("generate", "-cp=conf", "-cn=gen", "--cfg", "job", "--package=tokens_to_generate") == 0
    assert capsys.readouterr().out == "32\n"


def test_the_ranks_get_the_same_arguments_and_only_their_parent_tells_the_notes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def start(module: str, arguments: list[str], ranks: int) -> int:
        capsys.readouterr()
        words = [*arguments[1:], "--cfg", "job"]
        monkeypatch.setenv(LAUNCHER, "1")  # as start_ranks does
        started.append((ranks, ended(arguments[0], *words), capsys.readouterr()))
        return 0

    monkeypatch.setattr(distributed_command, "start_ranks", start)
    # Its own checks need files; this test is about the arguments.
    monkeypatch.setattr("nemo_tied_lora.commands.finetune.check_finetuning", lambda values: None)
    monkeypatch.setattr("nemo_tied_lora.commands.finetune.check_training_files", lambda values: None)
    assert ended("finetune", *MINE, "model.peft.lora_tuning.adapter_dim=4", "layout=tp2") == 0
    ((ranks, code, printed),) = started
    assert (ranks, code, printed.err) == (2, 0, "")
    own = YamlSources(own=folder / "conf" / "mine.yaml")
    same = compose_config("finetune", ["model.peft.lora_tuning.adapter_dim=4", "layout=tp2"], own)
    assert yaml.safe_load(printed.out) == OmegaConf.to_container(same)
