# SPDX-License-Identifier: Apache-2.0
"""`tied-lora plan`: its output, its refusals, and several adapters on one model. The whole command, without ranks."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_tied_lora.commands.plan import SUMMARY, main
from nemo_tied_lora.config import TARGETS
from tests.harness.paths import ROOT
from tests.harness.small_architecture import SMALL


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command in a separate process, in `folder`."""
    command = [sys.executable, "-m", "nemo_tied_lora.commands.main", "plan", *arguments]
    root = str(ROOT)
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": root}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=env)


def refusals(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Returns the problems that the command prints. It must exit with 2 and print nothing else."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *problems = captured.err.splitlines()
    assert first == "tied-lora plan: not possible:"
    assert "Traceback" not in captured.err
    return [problem.removeprefix("  ") for problem in problems]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Returns the command's JSON."""
    assert main([*arguments, "format=json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return dict(json.loads(captured.out))


def test_the_command_prints_the_papers_counts_as_json(tmp_path: Path) -> None:
    arguments = "model=llama2_7b model.peft.tied_lora.preset=tl6 model.peft.tied_lora.rank=8"
    done = run(*arguments.split(), "model.peft.tied_lora.targets=[linear_qkv]", "format=json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["trained_parameters"] == 524_544
    assert result["lora_parameters"] == 4_194_304
    assert list(result["targets"]) == ["linear_qkv"]
    assert result["file_bytes"] >= 2 * 524_544
    assert result["reduced_bytes_per_step"] == 0
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


def test_a_refusal_is_one_message_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = run("trainer.devices=3", "layout=tp2", "format=xml", "model.peft.tied_lora.adapter_dim=8", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == "tied-lora plan: not possible:"
    assert len(done.stderr.splitlines()) == 4
    assert "Traceback" not in done.stderr


def test_the_command_imports_neither_torch_nor_nemo() -> None:
    code = (
        "import sys; from nemo_tied_lora.commands.plan import main; main(['model=tiny']); "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'nemo', 'megatron', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_help_shows_examples_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert SUMMARY[1:] in " ".join(text.split())
    examples = [line.strip() for line in text.splitlines() if line.startswith("  tied-lora plan ")]
    assert len(examples) >= 3
    for example in examples:
        if "--config-dir" not in example:
            assert main(shlex.split(example)[2:]) == 0
    assert "\n" not in SUMMARY


def test_cfg_job_prints_the_composed_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "job", "layout=tp8pp4", "trainer.num_nodes=8"]) == 0
    cfg = yaml.safe_load(capsys.readouterr().out)
    assert cfg["model"]["tensor_model_parallel_size"] == 8
    assert cfg["model"]["pipeline_model_parallel_size"] == 4
    assert cfg["trainer"]["num_nodes"] == 8
    assert cfg["model"]["peft"]["peft_scheme"] == "tied_lora"


def test_config_dir_adds_a_folder_of_yamls(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "my configs" / "model").mkdir(parents=True)
    (tmp_path / "my configs" / "model" / "mine.yaml").write_text(yaml.safe_dump(SMALL))
    result = planned(capsys, "--config-dir", str(tmp_path / "my configs"), "model=mine")
    assert result["architecture"]["hidden_size"] == 20
    (problem,) = refusals(capsys, "--config-dir", str(tmp_path / "other"), "model=mine")
    assert "no such folder" in problem


def test_the_table_shows_the_numbers_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=llama2_7b", "layout=tp2pp2", "model.peft.tied_lora.rank=8"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    result = planned(capsys, *arguments)
    row = next(line.split() for line in lines if line.startswith("trained parameters "))
    assert row[2:4] == [f"{result['trained_parameters']:,}", f"{result['lora_parameters']:,}"]
    for target in TARGETS:
        row = next(line.split() for line in lines if line.strip().startswith(target))
        assert row[1] == f"{result['targets'][target]['trained_parameters']:,}"
    tied = next(line for line in lines if line.startswith("sent per step: tied gradients"))
    assert f"{result['reduced_bytes_per_step'] / 2**20:.2f} MiB" in tied
    assert tied.endswith(" -"), "LoRA sends nothing, so there is no share"
    assert "tensor 2 x pipeline 2 x context 1 x data 1 = 4 ranks" in lines[1]
    assert all(len(line) < 130 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["format=xml"], ["format='xml'", "table, json"]),
        (["model=llama3"], ["model=llama3", "gpt_2b, llama2_13b"]),
        (["layout=tp5"], ["layout=tp5", "tp2pp2"]),
        (["trainer.device=2"], ["trainer.device=2", "did you mean trainer.devices?"]),
        (["model.hiddensize=2"], ["model.hiddensize=2", "did you mean model.hidden_size?"]),
        (["format"], ["'format'", "key=value"]),
        (["model.num_layers=[1"], ["'model.num_layers=[1'", "not an override"]),
        (["layout=tp2,pp2"], ["layout=tp2,pp2", "a sweep"]),
        (["~trainer.nothing"], ["~trainer.nothing"]),
        (["model.peft.peft_scheme=lora"], ["peft_scheme='lora'", "only tied_lora"]),
        (["model.peft.tied_lora.adapter_dim=8"], ["adapter_dim=8", "write rank"]),
        (["model.peft.tied_lora.weight_tying=true"], ["weight_tying=True", "tied: [A, B]"]),
        (["+model.peft.tied_lora.rnk=8"], ["rnk=8", "did you mean rank?"]),
        (["model.peft.tied_lora.preset=tl9"], ["preset='tl9'", "lora, vera, tl5, tl6, adalora"]),
        (["model.peft.tied_lora=8"], ["model.peft.tied_lora=8", "section"]),
        (["trainer=8"], ["trainer=8", "section"]),
        (["model.hidden_size=???"], ["hidden_size"]),
        (["model.num_layers=null"], ["model.num_layers: missing"]),
        (["trainer.precision=fp8"], ["trainer.precision='fp8'", "bf16"]),
        (["trainer.precision=32"], ["model.megatron_amp_O2=true", "precision=bf16"]),
        (["layout=tp8pp4", "trainer.num_nodes=3"], ["trainer.num_nodes=3", "= 32"]),
        (["trainer.devices=auto"], ["trainer.devices='auto'", "whole number"]),
        (["model.peft.tied_lora.rank=4097"], ["rank=4097", "4096", "linear_proj"]),
        (["model.peft.tied_lora.layers=[32]"], ["layers: [32]", "0 to 31"]),
    ],
)
def test_a_wrong_setting_is_refused_with_its_value_and_remedy(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(refusals(capsys, *arguments))
    for word in words:
        assert word in text


def test_a_section_is_no_value_even_if_nemo_has_made_it_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    import nemo.core.config.pytorch_lightning  # noqa: F401

    assert "trainer=8: trainer is a section" in "\n".join(refusals(capsys, "trainer=8"))


def test_all_bad_overrides_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    problems = refusals(capsys, "model=llama3", "trainer.device=2", "format", "layout=tp5", "trainer.num_nodes=1")
    assert len(problems) == 4


def test_bad_values_of_all_parts_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    problems = refusals(
        capsys,
        "format=xml",
        "model.num_layers=31",
        "layout=tp2pp2",
        "trainer.devices=3",
        "trainer.precision=8",
        "model.peft.tied_lora.rank=0",
        "model.peft.tied_lora.r=8",
    )
    assert [problem.split("=")[0] for problem in problems] == [
        *("format", "r", "rank", "trainer.precision", "trainer.num_nodes", "model.pipeline_model_parallel_size"),
    ]


def test_adapters_of_llama2_7b_counted_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    several = planned(capsys, "model=llama2_7b", "preset=vera", "model.peft.tied_lora.rank=8")["several"]
    # 32 layers; out: qkv 12288, proj 4096, fc1 22016, fc2 4096; in: 4096, 4096, 4096, 11008; 2 bytes.
    u_and_v, A_and_B = 32 * (4 * 8 + 42_496) * 2, 8 * (42_496 + 23_296) * 2
    assert several["numbers"] == [1, 10, 1000]
    wanted = {
        "this adapter": (u_and_v, A_and_B),
        "lora": (32 * A_and_B, 0),
        "vera": (u_and_v, A_and_B),
        "tl5": (A_and_B, 0),
        "tl6": (u_and_v + A_and_B, 0),
        "adalora": (32 * A_and_B + 32 * 4 * 8 * 2, 0),
    }
    assert list(several["adapters"]) == list(wanted)
    for name, (own, shared) in wanted.items():
        entry = several["adapters"][name]
        assert (entry["own_bytes"], entry["shared_bytes"]) == (own, shared), name
        assert entry["bytes"] == entry["bytes_per_rank"] == [shared + number * own for number in (1, 10, 1000)]


def test_adapters_over_stages_and_tensor_parallel_ranks_counted_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama2_7b", "layout=tp2pp2", "preset=vera", "model.peft.tied_lora.rank=8", "adapters=[3]"]
    targets = ["model.peft.tied_lora.targets=[linear_qkv,linear_proj]", "model.peft.tied_lora.layers=[0,1,20]"]
    entry = planned(capsys, *words, *targets)["several"]["adapters"]["this adapter"]
    # qkv: A whole, B and v halved; proj: A halved, B and v whole. Two of the three layers are in the first stage.
    shared = 2 * 8 * (4096 + 12_288 // 2 + 4096 // 2 + 4096)
    a_layer = 2 * (8 + 12_288 // 2 + 8 + 4096)
    assert (entry["own_bytes"], entry["shared_bytes"]) == (2 * a_layer, shared)
    assert entry["bytes_per_rank"] == [shared + 3 * 2 * a_layer]
    assert entry["bytes"] == [2 * (2 * shared + 3 * 3 * a_layer)]


def test_the_plan_names_a_rank_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=llama2_7b", "model.peft.tied_lora.rank_budget.target_rank=2.5"]) == 0
    assert "tied A B, pruned to a mean rank of 2.5; the numbers are those before" in capsys.readouterr().out
    found = planned(capsys, "model=llama2_7b", "preset=adalora", "model.peft.tied_lora.rank=12")["adapter"][
        "rank_budget"
    ]
    assert found == {"target_rank": 8, "start_step": None, "final_step": None, "every": 10}


def test_the_table_shows_several_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=llama2_7b", "preset=vera", "model.peft.tied_lora.rank=8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("adapters on one model"))
    assert head.split()[-3:] == ["1", "10", "1,000"]
    (row,) = [line for line in lines if line.startswith("per rank: this adapter")]
    assert row.split()[-6:] == ["3.60", "MiB", "26.96", "MiB", "2.54", "GiB"]
    assert sum(line.startswith("all ranks: ") for line in lines) == 6


@pytest.mark.parametrize("numbers", ["null", "[]", "[0]", "[1.5]", "12", "[true]", "some"])
def test_wrong_numbers_of_adapters_are_refused(capsys: pytest.CaptureFixture[str], numbers: str) -> None:
    (problem,) = refusals(capsys, f"adapters={numbers}")
    assert problem.startswith("adapters=")
    assert "whole numbers of at least 1" in problem


def test_the_table_of_adapters_on_the_page_is_the_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=llama2_7b", "preset=vera", "model.peft.tied_lora.rank=8"]) == 0
    printed = {
        line.split()[2]: [" ".join(cells) for cells in zip(*[iter(line.split()[3:])] * 2, strict=True)]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("all ranks: ") and "this adapter" not in line
    }
    page = (ROOT / "docs" / "several_adapters.md").read_text()
    for position, number in enumerate(("1", "10", "1,000")):
        cells = [printed[preset][position] for preset in ("lora", "vera", "tl5", "tl6")]
        assert f"| {number} | {' | '.join(cells)} |" in page
