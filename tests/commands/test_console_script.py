# SPDX-License-Identifier: Apache-2.0
"""The whole commands as a user types them: the installed script, which starts its ranks.

tests/slurm has `launch`, `report` and `status`. Forked processes have pretrain, which makes the base of these tests
(tests/harness/command_runs.py), quickstart and compare (tests/commands/test_demo.py).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.commands.main import COMMANDS
from tests.harness.command_runs import console_script, finetune_arguments, tied_lora


@pytest.fixture(scope="module")
def folder(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a tokenizer and a base."""
    folder = tmp_path_factory.mktemp("typed")
    for name in ("base.nemo", "tokenizer.model", "train.jsonl", "validation.jsonl"):
        shutil.copy(workshop / name, folder)
    return folder


@pytest.fixture(scope="module")
def finetuned(folder: Path) -> subprocess.CompletedProcess[str]:
    """`tied-lora finetune verbose=false` on two tensor-parallel ranks."""
    words = ["layout=tp2", "trainer.max_steps=2", "trainer.val_check_interval=2", "verbose=false"]
    words.append("trainer.enable_progress_bar=true")
    return console_script("finetune", *finetune_arguments("run"), *words, folder=folder)


@pytest.mark.parametrize("command", ["", "quickstart", "compare", "launch", "report"])
def test_help_names_the_command_and_writes_nothing(command: str, tmp_path: Path) -> None:
    done = console_script(*command.split(), "--help", folder=tmp_path)
    assert f"tied-lora {command or '<command>'}" in done.stdout
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_key_that_does_not_exist_is_refused_with_exit_code_2(command: str, tmp_path: Path) -> None:
    done = tied_lora(command, "nonsense=1", folder=tmp_path, ok=False)
    assert done.returncode == 2, done.stderr
    assert f"tied-lora {command}: not possible:" in done.stderr
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr


def test_finetune_trains_on_two_ranks(folder: Path, finetuned: subprocess.CompletedProcess[str]) -> None:
    assert "pre-flight: the same software and configuration on all 2 ranks" in finetuned.stdout
    assert "Tied-LoRA rank 4: trained v B u A, tied A B" in finetuned.stdout
    file = read_adapter(folder / "run" / "adapter.nemo")
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert [step["step"] for step in metrics["steps"]] == [1, 2]
    assert metrics["trained_parameters"] == sum(tensor.numel() for tensor in file.state.values())


def test_without_verbose_finetune_prints_its_own_lines_and_the_rest_is_in_the_runs_folder(
    folder: Path, finetuned: subprocess.CompletedProcess[str]
) -> None:
    """Progress is a line, because no terminal shows it."""
    assert finetuned.stderr == ""
    notes = r"tied-lora finetune: |pre-flight: |\S+\.jsonl|note: |answers|written: "
    table = r"Tied-LoRA rank|target |-+$|linear_|total |[\d.]+% of"
    steps = [r"step 1 of 2, loss \d", r"step 2 of 2, loss \d", r"step 2 of 2, validation loss \d"]
    found = [line for line in finetuned.stdout.splitlines() if not re.match(f"{notes}|{table}", line)]
    assert len(found) == len(steps), finetuned.stdout
    assert all(map(re.match, steps, found)), found
    logs = [(folder / "run" / f"finetune-rank-{rank}.log").read_text() for rank in range(2)]
    assert "Total params" in logs[0]  # Lightning's summary


@pytest.mark.usefixtures("finetuned")
def test_generate_prints_a_completion_per_prompt(folder: Path) -> None:
    words = ["base=base.nemo", "adapter=run/adapter.nemo", "trainer.precision=32", "tokens_to_generate=3"]
    done = console_script("generate", *words, "prompts=['1:','2:']", folder=folder)
    assert [line[:2] for line in done.stdout.splitlines()] == ["1:", "2:"]
    assert done.stderr == ""


@pytest.mark.usefixtures("finetuned")
def test_merge_writes_a_base_with_the_adapter_in_its_weights(folder: Path) -> None:
    """The comparison with base and adapter, on ranks, is in tests/conversion/test_hugging_face.py."""
    words = ["base=base.nemo", "adapter=run/adapter.nemo", "output=merged.nemo", "verify=false"]
    assert "written: merged.nemo" in console_script("merge", *words, folder=folder).stdout
    assert (folder / "merged.nemo").stat().st_size > 10_000


@pytest.mark.usefixtures("finetuned")
def test_show_status_export_import_and_convert_checkpoint_read_what_finetune_wrote(folder: Path) -> None:
    adapter = "adapter=run/adapter.nemo"
    shown = json.loads(console_script("show", adapter, "output=null", "format=json", folder=folder).stdout)
    assert (
        shown["trained_parameters"] == json.loads((folder / "run" / "metrics.json").read_text())["trained_parameters"]
    )
    assert "finished" in console_script("status", "run=run", folder=folder).stdout
    console_script("export", adapter, "to=nemo-lora", "output=lora.nemo", folder=folder)
    fit = ["path=lora.nemo", "base=base.nemo", "output=back.nemo", "rank=4"]
    assert "relative error" in console_script("import", "from=lora", *fit, folder=folder).stdout
    console_script("convert-checkpoint", "checkpoint=run", "output=converted.nemo", folder=folder)
    states = [read_adapter(folder / name).state for name in ("run/adapter.nemo", "converted.nemo")]
    assert all(states[0][name].equal(tensor) for name, tensor in states[1].items())


def test_plan_counts_the_papers_parameters(tmp_path: Path) -> None:
    words = [
        "model=llama2_7b",
        "preset=tl6",
        "model.peft.tied_lora.rank=8",
        "model.peft.tied_lora.targets=[linear_qkv]",
    ]
    plan = json.loads(console_script("plan", *words, "format=json", folder=tmp_path).stdout)
    assert (plan["trained_parameters"], plan["lora_parameters"]) == (524_544, 4_194_304)
