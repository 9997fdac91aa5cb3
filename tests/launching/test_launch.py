# SPDX-License-Identifier: Apache-2.0
"""`tied-lora launch` without a SLURM: what would be submitted, as golden files, and what is refused.

After a wanted change of a script: WRITE_GOLDEN=1 pytest tests/launching/test_launch.py, and read the difference.
tests/slurm runs the scripts on a real SLURM.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_tied_lora.commands import launch, record, report
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.launching.cluster_config import Cluster, Container, looks_secret, seconds
from nemo_tied_lora.launching.run_record import resolved_yaml, write_record
from nemo_tied_lora.launching.slurm_script import Job, render
from nemo_tied_lora.launching.sweep import index_file, points, read_index, split_sweep
from nemo_tied_lora.planning.data import data_checks
from tests.harness.nemo_yamls import FINETUNING
from tests.harness.paths import ROOT

GOLDEN = Path(__file__).with_name("golden")
DATA = ["model.data.train_ds.file_names=[train.jsonl]", "model.data.validation_ds.file_names=[validation.jsonl]"]
BASE = "model.restore_from_path=llama2_7b.nemo"
SLURM = ["cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.python=python3", "layout=tp8"]
SETTINGS = ["cluster.partition=gpu", "cluster.account=nlp", "cluster.environment.NCCL_DEBUG=INFO", "name=two nodes"]
CONTAINER = [
    "cluster.container.image=/lustre/images/nemo-tied-lora.sqsh",
    "cluster.container.mounts=[/lustre:/lustre,/home/me/data:/data:ro]",
    "exp_manager.explicit_log_dir=/lustre/runs/german",
    "cluster.setup=[ulimit -l unlimited]",
    "cluster.srun=[--no-container-mount-home]",
    "+cluster.sbatch.comment=nightly",
]
SWEEP = ["rank=2,8,32,128", "preset=tl5,tl6", "name=ranks", "cluster.at_once=3"]
SLURM_DEFAULTS = yaml.safe_load((ROOT / "configs" / "cluster" / "slurm.yaml").read_text())
LAUNCHES = {
    "one_run": [*SLURM, *SETTINGS, "exp_manager.explicit_log_dir=runs/two_nodes", "model=llama2_7b", "rank=16"],
    "container": [*SLURM, *CONTAINER, "cluster=infiniband", "cluster.gpu_request=gres"],
    "sweep": [*SLURM, *SWEEP],
    "local": ["cluster=local", "layout=tp2", "rank=2,8"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base of LLaMA2-7B's sizes and the data."""
    sizes = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32}
    config = json.dumps({**sizes, "encoder_seq_length": 4096, "activation": "fast-swiglu", "mcore_gpt": True}).encode()
    with tarfile.open(tmp_path / "llama2_7b.nemo", "w") as tar:
        for file, content in (("model_config.yaml", config), ("model_weights.ckpt", b"weights")):
            member = tarfile.TarInfo(file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"input": "1", "output": "one"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert launch.main([BASE, *DATA, "dry_run=true", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def compare(path: Path, text: str) -> None:
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; see the head of this file"


def test_what_the_jobs_machine_must_have_need_not_be_installed_here(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_checks.importlib.util, "find_spec", lambda name: None)
    (folder / "packed.npy").write_bytes(b"read by the job")
    train = ["model.data.train_ds.packed_sequence=true", "model.data.train_ds.file_names=[packed.npy]"]
    packed = [*train, "model.micro_batch_size=1", "+model.transformer_engine=true"]
    assert launch.main([BASE, *DATA, *packed, "dry_run=true", *SLURM]) == 0
    capsys.readouterr()
    assert "needs the attention of Transformer Engine" in refused(capsys, *packed, "cluster=local")


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert launch.main([BASE, *DATA, "dry_run=true", *LAUNCHES[name]]) == 0
    compare(GOLDEN / f"{name}.txt", capsys.readouterr().out)
    assert sorted(folder.rglob("*")) == before


def test_a_users_own_yaml_goes_into_the_script_by_its_absolute_path(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "conf").mkdir()
    (folder / "conf" / "mine.yaml").write_text(yaml.safe_dump(FINETUNING))
    own = ["--config-path=conf", "--config-name=mine", "model.data.train_ds.global_batch_size=128", "name=mine"]
    assert launch.main([BASE, *DATA, *SLURM, *own, "dry_run=true"]) == 0
    printed = capsys.readouterr()
    assert f"    --config-path={folder}/conf\n    --config-name=mine.yaml\n    {BASE}\n" in printed.out
    assert "tied-lora launch: model.peft.lora_tuning: taken as model.peft.tied_lora.rank=32" in printed.err
    assert "--config-path" in refused(capsys, *SLURM, *own, *CONTAINER)
    (folder / "conf" / "mine.yaml").write_text("output: a.nemo")
    assert "output=a.nemo: all runs of a sweep" in refused(capsys, *SLURM, *own, "rank=2,4")
    (folder / "conf" / "mine.yaml").write_text("model: {optim: {learning_rate: 1}}")
    assert "write model.optim.lr" in refused(capsys, *SLURM, *own)


def test_the_shipped_script_is_what_launch_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [BASE, *DATA, *SLURM, "cluster.log=%x-%j.log", "dry_run=true"]
    assert launch.main(arguments) == 0
    script = capsys.readouterr().out.split("# ----- runs/tied_lora/job.sbatch\n")[1]
    compare(ROOT / "launch" / "slurm" / "finetune.sbatch", script)


def test_the_shipped_script_for_megatron_bridge_is_the_same_with_another_program() -> None:
    """Its variables are what Bridge's recipes set for every run (tests/bridge compares), and what Megatron's TP layers ask for."""
    cluster = {
        **{key: value for key, value in SLURM_DEFAULTS.items() if key != "environment"},
        "python": "python3",
        "log": "%x-%j.log",
        "environment": {
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "NCCL_GRAPH_REGISTER": "0",
            "NCCL_NVLS_ENABLE": "0",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
            "TORCH_NCCL_HIGH_PRIORITY": "1",
        },
    }
    job = Job(
        name="tied_lora",
        folder="runs/tied_lora",
        arguments=["--hf-path=my-base", "--data=my-data", "model.tensor_model_parallel_size=8"],
        cluster=Cluster.from_mapping(cluster),
        nodes=2,
        ranks_per_node=8,
        script="examples/bridge/finetune_tied_lora.py",
    )
    compare(ROOT / "launch" / "slurm" / "bridge.sbatch", render(job))


def test_sbatch_receives_what_a_dry_run_printed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses an sbatch that stores its arguments; tests/slurm has the real one."""
    (folder / "sbatch").write_text('#!/bin/sh\ncp "$2" given.sbatch && echo "$@" > asked && echo "4242;cluster"\n')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-value")
    arguments = [BASE, *DATA, *SLURM, "rank=2,8", "name=ranks"]
    assert launch.main([*arguments, "dry_run=true"]) == 0
    head, script, index = capsys.readouterr().out.split("# ----- ")
    assert launch.main(arguments) == 0
    assert "submitted: job 4242, 2 nodes x 8 ranks, 2 run(s)" in capsys.readouterr().out
    assert head == f"# sbatch {(folder / 'asked').read_text()}"
    assert script == f"runs/ranks/job.sbatch\n{(folder / 'given.sbatch').read_text()}"
    assert index == f"runs/ranks/sweep.tsv\n{(folder / 'runs' / 'ranks' / 'sweep.tsv').read_text()}"
    for name, rank in (("0_rank-2", 2), ("1_rank-8", 8)):
        record = folder / "runs" / "ranks" / name
        assert OmegaConf.load(record / "config.yaml").model.peft.tied_lora.rank == rank
        assert json.loads((record / "versions.json").read_text()).keys() >= {"packages", "git_commit", "arguments"}
    assert not any(b"s3cret" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    (folder / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    assert launch.main(arguments) == 2
    assert "invalid partition specified" in capsys.readouterr().err


def test_bash_parses_the_scripts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one_run", "container", "sweep"):
        assert launch.main([BASE, *DATA, "dry_run=true", *LAUNCHES[name]]) == 0
        script = capsys.readouterr().out.split("# ----- ")[1].partition("\n")[2]
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_nothing_names_a_host(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = []
    batch = "model.global_batch_size=8000"
    for nodes in (1, 2000):
        assert launch.main([BASE, *DATA, "dry_run=true", *SLURM, f"cluster.nodes={nodes}", batch]) == 0
        scripts.append(capsys.readouterr().out)
    assert scripts[0].replace("--nodes=1\n", "--nodes=2000\n") == scripts[1]


def test_every_problem_is_reported_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["trainer.devices=4", "rank=2,8192", "output=a.nemo", "model=llama2_13b", "cluster.at_once=2"]
    wrong.append("model.data.train_ds.file_names=[none.jsonl]")
    printed = refused(capsys, *SLURM, *wrong)
    for part in (
        "trainer.devices: follows from the allocation; set cluster.gpus_per_node",
        "output: all runs of a sweep would write it",
        "1_rank-8192: rank=8192: more than the 4096",
        "hidden_size is 4096, but 5120 in model=",
        "none.jsonl: no such file",
    ):
        assert part in printed, printed


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["cluster.nodes=0"], "cluster.nodes=0: must be a whole number of at least 1"),
        (["cluster.time=soon"], "cluster.time='soon': write minutes"),
        (["cluster.time=5", "cluster.save_seconds=300"], "must be longer than cluster.save_seconds=300"),
        (["cluster.save_seconds=20"], "a save takes about 30 s; raise it"),
        (["+cluster.gpus=8"], "cluster.gpus: not a key of cluster"),
        (["cluster.gpu_request=gpus"], "choose one of gpus-per-node, gres, null"),
        (["+cluster.environment.HF_TOKEN=abc"], "HF_TOKEN: a secret"),
        (["+exp_manager.wandb_logger_kwargs.api_key=abc"], "api_key: a secret"),
        (["cluster.container.mounts=[/data:/data]"], "mounts and workdir need an image"),
        (["cluster.container.image=x", "cluster.container.mounts=[data]"], "write SOURCE:TARGET"),
        (["cluster.container.image=x"], "shows at the same place"),
        (["layout=tp8pp4", "model.tensor_model_parallel_size=6"], "not a multiple of tensor 6"),
        (["model.data.train_ds.file_names=[missing.jsonl]"], "missing.jsonl: no such file"),
        (["exp_manager.explicit_log_dir='a b'"], "letters, digits and"),
        (['name="a\\"b"', "exp_manager.explicit_log_dir=a"], "cannot stand in an #SBATCH line"),
        (["layout=glob(*)"], "not an override"),
    ],
)
def test_a_launch_that_cannot_work_is_refused(
    arguments: list[str], part: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refused(capsys, *[argument for argument in SLURM if "cluster=" not in argument], *arguments)


def test_several_nodes_are_refused_on_one_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cluster=local is one machine" in refused(capsys, "cluster=local", "layout=tp8pp4")


def test_files_are_checked_at_the_source_of_the_mounts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = [
        f"cluster.container.mounts=[{folder}:/data,{folder}/runs:{folder}/runs]",
        "cluster.container.image=image.sqsh",
        f"exp_manager.explicit_log_dir={folder}/runs/a",
        "model.restore_from_path=/data/llama2_7b.nemo",
        "model.data.train_ds.file_names=[/data/train.jsonl]",
    ]
    seen = "model.data.validation_ds.file_names=[/data/validation.jsonl]"
    unseen = "model.data.validation_ds.file_names=[/elsewhere/validation.jsonl]"
    assert launch.main([*SLURM, *inside, seen, "dry_run=true"]) == 0
    assert launch.main([*SLURM, *inside, unseen, "dry_run=true"]) == 0
    capsys.readouterr()
    missing = "model.data.validation_ds.file_names=[/data/missing.jsonl]"
    assert "missing.jsonl: no such file" in refused(capsys, *SLURM, *inside, missing)


def test_a_sweep_has_every_combination_in_order_and_its_index_can_be_read() -> None:
    fixed, swept = split_sweep(["a=1", "model.peft.tied_lora.rank=2,8", "preset=tl5,tl6", "b=[1,2]"])
    assert fixed == ["a=1", "b=[1,2]"]
    runs = points(swept)
    assert [run.name for run in runs] == [
        "0_rank-2_preset-tl5",
        "1_rank-2_preset-tl6",
        "2_rank-8_preset-tl5",
        "3_rank-8_preset-tl6",
    ]
    lines = list(read_index(index_file("runs/x", runs)))
    assert lines[3] == ("runs/x/3_rank-8_preset-tl6", ["model.peft.tied_lora.rank=8", "preset=tl6"])
    assert [point.name for point in points([])] == ["0"]
    rates = points(split_sweep([f"model.optim.lr_multipliers.{factor}=1,4" for factor in "AB"])[1])
    assert [run.name for run in rates] == ["0_A-1_B-1", "1_A-1_B-4", "2_A-4_B-1", "3_A-4_B-4"]
    names = [run.name for run in points([[f"r={n}" for n in range(11)]])]
    assert names == sorted(names)


def test_secrets_tabs_and_line_breaks_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        split_sweep(["a='x\ty'", "x.api_key=1,2", "a"])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("limit", "want"),
    [
        ("30", 1800),
        (30, 1800),
        ("30:15", 1815),
        ("1:02:03", 3723),
        ("2-3", 183600),
        ("1-00:30", 88200),
        ("1-0:0:5", 86405),
    ],
)
def test_time_limits_mean_what_they_mean_to_slurm(limit: str | int, want: int) -> None:
    assert seconds(limit) == want


def test_secrets_are_recognised_by_their_names() -> None:
    assert all(
        map(looks_secret, ["WANDB_API_KEY", "HF_TOKEN", "a.b.api_key", "password", "AWS_SECRET_ACCESS_KEY", "token"])
    )
    assert not any(
        map(looks_secret, ["tokens_to_generate", "label_key", "model.tokenizer.type", "NCCL_DEBUG", "monkey"])
    )


def test_the_record_resolves_everything_except_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-value")
    cfg = OmegaConf.create(
        {"a": 1, "b": "${a}", "c": {"key": "${oc.env:WANDB_API_KEY}", "x": ["${c.key}", "v-${c.key}"]}, "d": "???"}
    )
    text = resolved_yaml(cfg)
    assert "s3cret" not in text
    assert OmegaConf.to_container(OmegaConf.create(text), resolve=False) == {
        "a": 1,
        "b": 1,
        "c": {"key": "${oc.env:WANDB_API_KEY}", "x": ["${oc.env:WANDB_API_KEY}", "v-${oc.env:WANDB_API_KEY}"]},
        "d": "???",
    }
    write_record(tmp_path, cfg, ["a=1"])
    assert json.loads((tmp_path / "versions.json").read_text())["packages"]["torch"]


def test_the_first_step_of_a_job_writes_the_record_and_checks_the_configuration_and_the_data(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record.main(["logs", BASE, *DATA, "layout=tp8"]) == 0
    assert OmegaConf.load("logs/config.yaml").model.tensor_model_parallel_size == 8
    assert json.loads(Path("logs/versions.json").read_text())["arguments"] == [BASE, *DATA, "layout=tp8"]
    assert record.main(["refused", BASE, *DATA, "layout=tp8", "trainer.num_nodes=0"]) == 2
    assert "num_nodes" in capsys.readouterr().err
    Path("train.jsonl").write_text('{"input": "1", \n')
    assert record.main(["refused", BASE, *DATA, "layout=tp8"]) == 2
    assert "train.jsonl: line 1: is cut off" in capsys.readouterr().err


def test_a_path_belongs_to_the_deepest_mount() -> None:
    container = Container(image="x", mounts=("/a:/data", "/b:/data/inner:ro"), workdir="/data/inner")
    assert container.host_path("/data/inner/f") == "/b/f"
    assert container.host_path("/data/innermost") == "/a/innermost"
    assert container.host_path("f") == "/b/f"
    assert container.host_path("/database") is None


def test_cluster_values_of_a_wrong_kind_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Cluster.from_mapping({"kind": "slurm", "srun": "x", "environment": 3, "container": {"path": "x"}})
    assert len(caught.value.problems) == 3


def test_a_report_has_one_line_per_run_in_the_order_of_the_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = points([["model.peft.tied_lora.rank=2", "model.peft.tied_lora.rank=8"], ["preset=tl5", "preset=tl6"]])
    sweep = tmp_path / "ranks"
    sweep.mkdir()
    (sweep / "sweep.tsv").write_text(index_file("/where/it/ran/ranks", runs))
    for number, run in enumerate(runs[:2]):
        (sweep / run.name).mkdir()
        validations = [{"validation_loss": 9.0}, {"validation_loss": 0.5, "validation_exact_string_match": 0.25}]
        metrics = {"trained_parameters": 1000 * (number + 1), "lora_parameters": 8000, "validations": validations}
        metrics |= {"steps": [{"step": 1, "loss": 1.25}], "tokens_per_second": 12.0, "wall_seconds": 3.0}
        (sweep / run.name / "metrics.json").write_text(json.dumps(metrics))
    (sweep / runs[2].name / "logs").mkdir(parents=True)
    assert report.main([f"folder={sweep}"]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[:6]]
    assert lines[0][:5] == ["run", "rank", "preset", "trained", "of LoRA"]
    assert lines[2][:8] == ["0_rank-2_preset-tl5", "2", "tl5", "1,000", "12.5%", "0.5000", "25.0%", "1.2500"]
    assert [line[-1] for line in lines[2:]] == ["finished", "finished", "started, not finished", "not started"]
    assert json.loads((sweep / "report.json").read_text())["runs"][1]["validation_loss"] == 0.5
    assert (sweep / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report.main([f"folder={tmp_path}"]) == 2
    assert "name a sweep's folder" in capsys.readouterr().err
