# SPDX-License-Identifier: Apache-2.0
"""The whole command on a tiny model: real NeMo, real ranks, real files.

That each layout gives the same adapter is in tests/nemo: test_quantised_base.py, on codes, and test_resume.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile, read_adapter
from nemo_tied_lora.planning.base_config import base_model_config
from nemo_tied_lora.resilience.status_file import read_status
from tests.harness.command_runs import SHORT, console_script, finetune, finetune_arguments, tied_lora, user_environment
from tests.harness.forks import free_port
from tests.harness.nemo_yamls import FINETUNING, GENERATION
from tests.harness.paths import ROOT


@pytest.fixture(scope="module")
def single(workshop: Path) -> tuple[AdapterFile, dict, str]:
    return finetune(workshop, "single")


def test_training_moves_the_adapter_and_records_what_it_did(
    workshop: Path, single: tuple[AdapterFile, dict, str]
) -> None:
    file, metrics, printed = single
    assert file.state["layers.3.linear_fc2.v"].abs().max() > 0
    assert [step["step"] for step in metrics["steps"]] == [1, 2, 3, 4]
    assert all({"loss", "lr", "grad_norm", "seconds", "tokens"} <= step.keys() for step in metrics["steps"])
    assert metrics["tokens_per_second"] > 0
    assert {"validation_loss", "validation_exact_string_match"} <= metrics["validations"][-1].keys()
    assert metrics["trained_parameters"] == sum(file.state[name].numel() for name in file.state)
    assert f"{metrics['trained_parameters']:,}" in printed
    assert (workshop / "single" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((workshop / "single").glob("events.out.tfevents.*"))


def test_a_short_run_validates_at_its_end_and_says_what_its_learning_rates_do(workshop: Path) -> None:
    words = ["trainer.max_steps=3", "trainer.val_check_interval=200", "model.optim.sched.constant_steps=1"]
    words += ["preset=lora", "model.optim.lr_multipliers={B: 4, v: 2}"]
    _, metrics, printed = finetune(workshop, "short", *words, "trainer.logger=true")
    assert [validation["step"] for validation in metrics["validations"]] == [3]
    assert [step["lr"] for step in metrics["steps"]][:2] == [0, pytest.approx(1e-2, rel=1e-6)]  # float32
    assert [step["lr_B"] for step in metrics["steps"]] == [4 * step["lr"] for step in metrics["steps"]]
    assert metrics["lr_multipliers"] == {"B": 4.0, "A": 1.0}
    (events,) = (workshop / "short").glob("events.out.tfevents.*")
    assert [name for name in (b"lr_A", b"lr_B", b"lr_v") if name in events.read_bytes()] == [b"lr_A", b"lr_B"]
    for line in (
        "model.optim.lr=0.01: with model.optim.lr_multipliers, the factors have A 0.01, B 0.04",
        "model.optim.lr_multipliers.v=2: has no effect, because v is not trained",
        "trainer.val_check_interval=200: more than trainer.max_steps=3; validates once, after the last step",
        "model.optim.sched.constant_steps=1: NeMo's warmup then starts at 0, so step 1 changes nothing",
        "trainer.logger=true: taken as false, because exp_manager makes its own",
    ):
        assert printed.count(f"tied-lora finetune: {line}\n") == 1


def test_a_bases_file_has_no_key_of_the_optimizer_with_which_stock_nemo_would_fail(workshop: Path) -> None:
    optim = base_model_config(workshop / "base.nemo")["optim"]
    assert {"name", "lr", "betas"} <= set(optim) <= {"name", "lr", "betas", "weight_decay", "sched"}


def test_a_run_resumes_where_it_stopped(workshop: Path, single: tuple[AdapterFile, dict, str]) -> None:
    _, metrics, _ = finetune(workshop, "single", "trainer.max_steps=6")
    assert [step["step"] for step in metrics["steps"]] == [1, 2, 3, 4, 5, 6]
    assert [step["loss"] for step in metrics["steps"][:4]] == [step["loss"] for step in single[1]["steps"]]


def test_generate_completes_prompts_on_another_layout(workshop: Path, single: tuple[AdapterFile, dict, str]) -> None:
    common = ["base=base.nemo", "trainer.precision=32", "tokens_to_generate=4"]
    adapter = "adapter=single/adapter.nemo"
    done = tied_lora("generate", *common, adapter, "prompts=['1:','2:']", "layout=pp2", folder=workshop)
    assert [line[:2] for line in done.stdout.splitlines()[-2:]] == ["1:", "2:"]
    (workshop / "gen.yaml").write_text(yaml.safe_dump(GENERATION))  # NeMo's own file, with NeMo's keys
    nemos = ["--config-name=gen", "model.restore_from_path=base.nemo", "model.data.test_ds.tokens_to_generate=4"]
    nemos += ["model.data.test_ds.file_names=[validation.jsonl]", "model.data.test_ds.write_predictions_to_file=true"]
    nemos += ["model.data.test_ds.output_file_path_prefix=answers", "inference.min_tokens_to_generate=1"]
    tied_lora("generate", *nemos, "trainer.precision=32", "trainer.enable_progress_bar=false", folder=workshop)
    answers = [json.loads(line) for line in (workshop / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers[:2]] == ["0:", "1:"]
    assert all(isinstance(answer["completion"], str) for answer in answers)


def test_a_run_that_a_guard_stops_fails_with_the_reason_and_keeps_an_older_file(
    workshop: Path, single: tuple[AdapterFile, dict, str]
) -> None:
    older = (workshop / "single" / "adapter.nemo").read_bytes()
    data = [
        f"model.data.{ds}.file_names=[{n}.jsonl]" for ds, n in (("train_ds", "train"), ("validation_ds", "validation"))
    ]
    fixed = ["model.restore_from_path=base.nemo", "output=single/adapter.nemo", "model.optim.lr=1e30", "name=stopped"]
    done = tied_lora("finetune", *SHORT, *data, *fixed, "trainer.gradient_clip_val=0", folder=workshop, ok=False)
    assert done.returncode == 3
    assert "tied-lora finetune: step " in done.stderr
    assert "holds NaN or infinity on rank 0" in done.stderr
    assert (workshop / "single" / "adapter.nemo").read_bytes() == older


def test_a_sweep_of_a_users_own_yaml_runs_on_this_machine_and_is_reported(workshop: Path) -> None:
    """The YAML has every key of NeMo's, with NeMo's default: its values reach the ranks through launch."""
    own = OmegaConf.merge(FINETUNING, {"model": {"optim": {"weight_decay": 0.125}}})
    OmegaConf.save(own, workshop / "nemos.yaml")
    arguments = [one for one in finetune_arguments("sweep") if "rank=" not in one and not one.startswith("output=")]
    short = ["trainer.max_steps=2", "cluster=local", "layout=single"]
    tied_lora("launch", "--config-name=nemos", *arguments, *short, "rank=2,4", folder=workshop)
    for name, rank in (("0_rank-2", 2), ("1_rank-4", 4)):
        run = workshop / "sweep" / name
        assert read_adapter(run / "adapter.nemo").config.rank == rank
        config = OmegaConf.load(next(run.rglob("config.yaml")))
        assert config.exp_manager.explicit_log_dir == f"sweep/{name}"
        assert config.model.peft.tied_lora.rank == rank
        assert read_adapter(run / "adapter.nemo").config.targets == ("linear_qkv",)  # its lora_tuning
        assert (config.model.optim.weight_decay, config.name) == (0.125, "megatron_gpt_peft_tied_lora_tuning")
        assert json.loads(next(run.rglob("versions.json")).read_text())["packages"]["nemo_toolkit"]
    shown = tied_lora("report", "folder=sweep", folder=workshop).stdout
    losses = [json.loads((workshop / "sweep" / n / "metrics.json").read_text()) for n in ("0_rank-2", "1_rank-4")]
    for metrics, line in zip(losses, shown.splitlines()[2:4], strict=True):
        assert f"{metrics['validations'][-1]['validation_loss']:.4f}" in line
        assert line.endswith("| finished |")
    assert (workshop / "sweep" / "report.png").exists()


def test_a_second_run_in_the_folder_of_a_running_one_is_refused_and_changes_nothing(workshop: Path) -> None:
    """By the command, and by a rank that srun has started."""
    folder = workshop / "taken"
    folder.mkdir()
    (folder / "status.json").write_text('{"pid": 77, "node": "n1", "state": "training", "step": 40}')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    holder = os.open(folder, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(free_port())
    try:
        for variables in ({}, alone):
            done = tied_lora("finetune", *finetune_arguments("taken"), folder=workshop, ok=False, planted=variables)
            assert done.returncode == 2
            line = "exp_manager: another run works in taken (process 77 on node n1, training, step 40); wait for it"
            assert done.stderr.count(line) == 1, done.stderr
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    finally:
        os.close(holder)


def test_the_recipe_for_large_bases_trains(workshop: Path) -> None:
    """bfloat16 with O2 and sequence parallelism, as docs/cluster.md recommends them."""
    own = ("trainer.precision=", "model.micro_batch_size=")
    arguments = [one for one in finetune_arguments("recipe") if not one.startswith(own)]
    arguments += ["recipe=llama2", "layout=tp2", "trainer.max_steps=2"]
    tied_lora("finetune", *arguments, folder=workshop)
    metrics = json.loads((workshop / "recipe" / "metrics.json").read_text())
    assert [step["step"] for step in metrics["steps"]] == [1, 2]
    assert all(0 < step["loss"] < 10 and step["grad_norm"] > 0 for step in metrics["steps"])
    assert 0 < metrics["validations"][-1]["validation_loss"] < 10
    assert read_adapter(workshop / "recipe" / "adapter.nemo").state["layers.3.linear_fc2.v"].abs().max() > 0


def test_every_mistake_is_reported_at_once_before_torch_is_imported(workshop: Path) -> None:
    wrong = [
        "layout=tp8",
        "model.restore_from_path=base.nemo",
        "model.peft.tied_lora.adapter_dim=8",
        "model.peft.tied_lora.weight_tying=true",
        "model.peft.tied_lora.alpha=0",
        "model.data.train_ds.file_names=[missing.jsonl]",
        "output=adapter.zip",
    ]
    done = console_script("finetune", *wrong, folder=workshop, ok=False)
    assert done.returncode == 2
    messages = [
        "adapter_dim=8: not a key of tied_lora; write rank",
        "tied: [A, B]",
        "alpha=0",
        "missing.jsonl: no such file",
    ]
    messages += ["validation_ds.file_names", "must end in .nemo", "num_attention_heads"]
    assert [part for part in messages if part not in done.stderr] == []
    assert "Traceback" not in done.stderr


def test_the_shipped_torchrun_script_starts_ranks_that_meet_or_explains_how(workshop: Path) -> None:
    """torchrun holds the ranks' store. `preflight=only` needs no NeMo."""
    script = str(ROOT / "launch" / "torchrun.sh")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**user_environment(), "PATH": path, "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    bare = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert bare.returncode == 2
    assert "NODE_RANK" in bare.stdout
    command = ["bash", script, "finetune", *finetune_arguments("torchrun"), "layout=tp2", "preflight=only"]
    done = subprocess.run(command, cwd=workshop, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pre-flight: the same software and configuration on all 2 ranks") == 1
    assert "pre-flight: all is well" in done.stdout


PLANTED = """
import os, sys
from nemo_tied_lora.nemo import training_runs

setup = training_runs.MegatronGPTTiedLoraModel.setup

def planted(model, *args, **kwargs):
    if os.environ["RANK"] == "1":
        raise KeyError("layer 3")
    return setup(model, *args, **kwargs)

training_runs.MegatronGPTTiedLoraModel.setup = planted
"""


@pytest.mark.parametrize(("watchdog", "code"), [("120", 70), ("0", 1)])
def test_an_error_that_no_check_has_foreseen_ends_all_ranks_with_one_line(
    workshop: Path, tmp_path: Path, watchdog: str, code: int
) -> None:
    """With the watchdog, all ranks end at once. Without it, the launcher ends the others."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    words = [
        f"exp_manager.explicit_log_dir={tmp_path}/run",
        "layout=tp2",
        "verbose=false",
        f"watchdog.timeout_s={watchdog}",
    ]
    planted = {"PYTHONPATH": str(tmp_path)}
    done = tied_lora("finetune", *finetune_arguments("unforeseen"), *words, folder=workshop, ok=False, planted=planted)
    assert done.returncode == code, done.stderr
    start = "tied-lora: rank 1: the run ends: " if code == 70 else "tied-lora finetune: "
    found = re.fullmatch(
        start + r"rank 1 on node \S+ failed: KeyError: 'layer 3'; the traceback is in (\S+)\n", done.stderr
    )
    assert found, done.stderr
    assert found[1] == f"{tmp_path}/run/finetune-rank-1.traceback"
    assert "in planted" in Path(found[1]).read_text()
    assert "KeyError: 'layer 3'" in (read_status(tmp_path / "run") or {})["reason"]
