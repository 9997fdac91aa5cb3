# SPDX-License-Identifier: Apache-2.0
"""One process: the arguments and the recipe of examples/bridge/finetune_tied_lora.py, up to Bridge's own validation."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.bridge.example_folder import write_example_folder
from tests.harness.paths import ROOT

REFUSED = "finetune_tied_lora.py: not possible:\n"
Results = dict[str, tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("example")
    write_example_folder(made)
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    command = [sys.executable, "-m", "tests.bridge.example_runs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: Results = json.loads((folder / "results.json").read_text())
    return found


def test_help_says_what_to_type(results: Results) -> None:
    code, out, err = results["help"]
    assert (code, err) == (0, "")
    assert "usage: " in out
    for words in ("--hf-path FOLDER", "--check", "key=value ...", "model.tensor_model_parallel_size=8 peft.rank=16"):
        assert words in out


def test_the_recipe_with_overrides_passes_bridges_validation_and_leaves_its_record(
    results: Results, folder: Path
) -> None:
    code, _, err = results["right"]
    assert code == 0, err
    cfg = yaml.safe_load((folder / "right" / "config.yaml").read_text().replace("!!set", ""))
    assert (cfg["peft"]["rank"], cfg["peft"]["layers"], sorted(cfg["peft"]["trained"])) == (16, [0, 3], ["u", "v"])
    assert cfg["peft"]["_target_"].endswith(".TiedLoRA")
    assert (cfg["optimizer"]["lr"], cfg["train"]["train_iters"], cfg["train"]["exit_signal_handler"]) == (
        2e-3,
        7,
        True,
    )
    assert cfg["model"]["pipeline_model_parallel_size"] == 2
    assert cfg["checkpoint"]["pretrained_checkpoint"] == str(folder / "hf")
    assert cfg["checkpoint"]["save"] == cfg["checkpoint"]["load"] == str(folder / "run" / "checkpoints")
    record = json.loads((folder / "right" / "versions.json").read_text())
    assert "peft.rank=16" in record["arguments"]
    assert record["packages"]["megatron-core"] == "0.19.2"


def problems(result: tuple[int, str, str]) -> list[str]:
    code, _, err = result
    assert code == 2, err
    return err.split(REFUSED)[1].splitlines()


def test_wrong_overrides_are_refused_together_one_line_each(results: Results) -> None:
    lines = problems(results["wrong overrides"])
    assert len(lines) == 4, lines
    assert "dim=8: not a key of tied_lora; write rank" in lines[0]
    assert "dropout=2: must be in [0, 1)" in lines[1]
    assert "targets: 'linear_q' is unknown" in lines[2]
    assert "Could not override 'model.tensor_parallel'" in lines[3]


def test_an_override_that_cannot_be_read_is_refused_in_one_line(results: Results) -> None:
    (line,) = problems(results["unreadable override"])
    assert "peft.layers=[0," in line


def test_a_layout_that_does_not_fit_the_jobs_ranks_is_refused_before_the_ranks_start(results: Results) -> None:
    (line,) = problems(results["ranks that do not fit"])
    assert line.startswith("  3 ranks: world size (3) is not divisible by")


def test_missing_files_are_refused_together_before_bridge_is_imported(results: Results, folder: Path) -> None:
    lines = problems(results["missing files"])
    assert [line.partition(":")[0].strip() for line in lines] == [
        f"--hf-path={folder}",
        f"--data={folder}/training.jsonl",
        f"--data={folder}/validation.jsonl",
    ]


@pytest.mark.parametrize(("left", "code"), [(None, 0), (0, 75)])
def test_a_run_that_bridge_ends_early_is_to_be_started_again(
    left: int | None, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a SIGTERM Bridge saves, and leaves by sys.exit(0). Its loop is replaced here, with what it imports."""

    def loop(cfg: Any, forward_step: Any, callbacks: list[Any]) -> None:
        assert [hasattr(one, "on_train_end") for one in callbacks] == [True]
        if left is not None:
            sys.exit(left)

    monkeypatch.setitem(sys.modules, "megatron.bridge.training.finetune", SimpleNamespace(finetune=loop))
    main = runpy.run_path(str(ROOT / "examples" / "bridge" / "finetune_tied_lora.py"))["main"]
    assert main([f"--hf-path={folder / 'hf'}", f"--data={folder / 'data'}"]) == code
