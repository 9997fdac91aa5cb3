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

from nemo_tied_lora.errors import ConfigError
from tests.bridge.example_folder import write_example_folder, write_wrong_folders
from tests.bridge.example_runs import REFUSED as REFUSALS
from tests.harness.paths import ROOT

REFUSED = "finetune_tied_lora.py: not possible:\n"
Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("example")
    write_example_folder(made)
    write_wrong_folders(made)
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
    assert code == 0, (code, err)
    cfg = yaml.safe_load((folder / "records" / "right" / "config.yaml").read_text().replace("!!set", ""))
    assert (cfg["peft"]["rank"], cfg["peft"]["layers"], sorted(cfg["peft"]["trained"])) == (16, [0, 3], ["u", "v"])
    assert cfg["peft"]["_target_"].endswith(".TiedLoRA")
    assert (cfg["optimizer"]["lr"], cfg["train"]["train_iters"], cfg["train"]["exit_signal_handler"]) == (
        2e-3,
        7,
        True,
    )
    assert cfg["model"]["pipeline_model_parallel_size"] == 2
    assert cfg["model"]["bf16"] is True, "set by bf16_mixed, in Bridge's own update"
    assert cfg["dataset"]["dataset_kwargs"]["tokens_to_generate"] == 0
    assert cfg["checkpoint"]["pretrained_checkpoint"] == str(folder / "hf")
    assert cfg["checkpoint"]["save"] == cfg["checkpoint"]["load"] == str(folder / "run" / "checkpoints")
    record = json.loads((folder / "records" / "right" / "versions.json").read_text())
    assert record["arguments"][:2] == [f"--hf-path={folder / 'hf'}", f"--data={folder / 'data'}"]
    assert {"--preset=vera", "+peft.rank=16"} <= set(record["arguments"])
    assert record["packages"]["megatron-core"] == "0.19.2"
    assert all(record["packages"][name] for name in ("megatron-bridge", "transformers"))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_wrong_is_refused_together_one_line_each(name: str, results: Results, folder: Path) -> None:
    _, _, beginnings = REFUSALS[name]
    code, _, err = results[name]
    assert code == 2, (code, err)
    lines = err.split(REFUSED)[1].splitlines()
    assert len(lines) == len(beginnings), lines
    for line, beginning in zip(lines, beginnings, strict=True):
        assert line.startswith("  " + beginning.replace("{folder}", str(folder)))
        assert len(line) < 500, "Bridge's essay on a model that it does not know"
    assert not (folder / "records" / name).exists(), "a refused run leaves no record"


def test_rows_in_columns_that_are_named_pass(results: Results) -> None:
    code, _, err = results["other columns"]
    assert code == 0, (code, err)


def test_rows_that_are_added_between_two_runs_are_trained_on(results: Results, folder: Path) -> None:
    """Bridge's own place for the index of the rows is beside the data, under the same name for every version of a file."""
    assert results["rows"] == [16, 17]
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["training.jsonl", "validation.jsonl"]


@pytest.mark.parametrize(
    ("left", "code"), [(None, 0), (SystemExit(0), 75), (ConfigError(["peft.rank: of another run"]), 2)]
)
def test_how_bridges_loop_ends_decides_whether_the_job_starts_again(
    left: BaseException | None, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a SIGTERM Bridge saves, and leaves by sys.exit(0). Its loop is replaced here, with what it imports."""

    def loop(cfg: Any, forward_step: Any, callbacks: list[Any]) -> None:
        assert [hasattr(one, "on_train_end") for one in callbacks] == [True]
        if left is not None:
            raise left

    monkeypatch.setitem(sys.modules, "megatron.bridge.training.finetune", SimpleNamespace(finetune=loop))
    main = runpy.run_path(str(ROOT / "examples" / "bridge" / "finetune_tied_lora.py"))["main"]
    assert main([f"--hf-path={folder / 'hf'}", f"--data={folder / 'data'}", f"--folder={folder / 'run'}"]) == code
