# SPDX-License-Identifier: Apache-2.0
"""The whole commands, in forked processes: quickstart and compare, on a base of two steps, with two steps each."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from nemo_tied_lora.commands import compare, quickstart
from nemo_tied_lora.commands.demo.tasks import write_quickstart_data
from nemo_tied_lora.planning.composing.compose import compose_config
from tests.harness.command_runs import tied_lora

PLACE = Path("runs", "quickstart")
EXAMPLES = 10
"""Test examples: of the 200, the first ones. Generation takes most of the time."""
SHORT = ["trainer.max_steps=2", "trainer.val_check_interval=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart has made its data and its base before."""
    folder = tmp_path_factory.mktemp("quickstart")
    data = folder / PLACE / "data"
    write_quickstart_data(data)
    test = data / "finetune_test.jsonl"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:EXAMPLES]))
    files = [f"model.data.{ds}_ds.file_names=[{data}/pretrain_{name}.jsonl]" for ds, name in SPLITS]
    words = ["recipe=quickstart_base", f"output={PLACE}/base.nemo", f"model.tokenizer.model={data}/tokenizer.model"]
    words += [f"exp_manager.explicit_log_dir={PLACE}/pretraining", "trainer.devices=1"]
    tied_lora("pretrain", *words, *files, *SHORT, folder=folder)
    return folder


SPLITS = (("train", "train"), ("validation", "validation"))


def test_the_quickstart_trains_on_two_ranks_and_reports_what_it_measured(folder: Path) -> None:
    printed = tied_lora("quickstart", "model=tiny", f"overrides={SHORT}", folder=folder).stdout
    place = folder / PLACE
    numbers = json.loads((place / "metrics.json").read_text())
    assert (len(numbers["steps"]), numbers["layout"], numbers["preset"]) == (2, "tp1pp2", "tl6")
    assert (numbers["trained_parameters"], numbers["lora_parameters"]) == (25_856, 131_072)
    assert "$ tied-lora pretrain" not in printed
    before, after = (found["metrics"]["exact_match"]["value"] for found in numbers["evaluation"]["adapters"].values())
    assert 0 <= before <= after <= 100
    assert numbers["peak_memory_bytes"] > 2**27
    assert numbers["evaluation"]["items"] == EXAMPLES
    report = (place / "report.md").read_text()
    assert report.strip() in printed
    assert "Trained parameters: 25,856, **19.7%** of LoRA's 131,072" in report
    assert report.count("| no: ") + report.count("| yes") == 5
    assert (place / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (place / "tl6.nemo").exists()
    assert not list(place.glob("tl6-*/checkpoints"))


def test_compare_trains_each_method_and_keeps_the_runs_that_have_finished(folder: Path) -> None:
    """One method is trained on the base as it is, the other on codes of 4 bits; the base is measured both ways."""
    words = ["~methods.tl5", "~methods.vera", "methods.lora.seeds=1", "methods.tl6.seeds=1", "at_once=1"]
    words += ["tasks.german_numbers.steps=2", "training.warmup_steps=1", "claim.pairs={base_nf4: base}"]
    words += ["+methods.tl6.base_quantization=nf4"]
    printed = tied_lora("compare", *words, folder=folder).stdout
    place = folder / "runs" / "compare"
    assert "german_numbers-tl6-s1: done in " in printed
    assert "tiny: 4 of 4 runs are done" in printed
    methods = json.loads((place / "page.json").read_text())["tasks"]["german_numbers"]["methods"]
    trained = {"base": 0, "base_nf4": 0, "lora": 131_072, "tl6": 25_856}
    assert {name: found["trained"] for name, found in methods.items()} == trained
    assert len({found["loss"]["value"] for found in methods.values()}) == 4
    table = (place / "page.md").read_text()
    assert "| numbers in words | exact match | 0.0 |" in table
    assert "| base, nf4 minus base |" in table
    assert (place / "page.png").read_bytes().startswith(b"\x89PNG")
    results = {path: path.stat().st_mtime_ns for path in (place / "results").glob("*.json")}
    assert len(results) == 4
    again = tied_lora("compare", *words, folder=folder).stdout
    assert ": done in" not in again
    assert {path: path.stat().st_mtime_ns for path in (place / "results").glob("*.json")} == results


@pytest.mark.parametrize("command", [quickstart, compare])
def test_the_examples_of_the_help_are_accepted_as_typed(command: ModuleType) -> None:
    name = command.__name__.rpartition(".")[2]
    for line in command._EXAMPLES.splitlines():
        _, typed, *words = shlex.split(line)
        assert typed == name
        assert compose_config(name, words)


def test_a_stage_that_fails_is_named_with_its_command(folder: Path) -> None:
    words = ["model=tiny", "overrides=['model.peft.tied_lora.adapter_dim=8']"]
    done = tied_lora("quickstart", *words, folder=folder, ok=False)
    assert done.returncode == 2  # the code of the stage
    assert "tied-lora quickstart: tied-lora finetune failed with exit code 2" in done.stderr
