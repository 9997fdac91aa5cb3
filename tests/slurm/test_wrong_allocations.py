# SPDX-License-Identifier: Apache-2.0
"""The whole command on the private SLURM: jobs that cannot work are refused in one message before a model is loaded.

The job's first step finds what one process can find, without torch and before any rank starts. One array tests it: each of
its tasks has a mistake. The ranks find the rest when they exchange reports.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import nemo_tied_lora
from nemo_tied_lora.launching.cluster_config import Cluster
from nemo_tied_lora.launching.slurm_script import Job, render
from nemo_tied_lora.launching.sweep import Point, index_file
from nemo_tied_lora.planning.config_folder import config_folder
from tests.harness.paths import ROOT
from tests.slurm.private_cluster import PrivateCluster
from tests.slurm.real_runs import PP2, Run, launch, rank_arguments

# Mistake: (its overrides, words that its message must contain). On 2 nodes x 4 ranks, with a time limit of 5 minutes.
MISTAKES = {
    "world-size-and-data": (
        [
            "model.tensor_model_parallel_size=3",
            "model.data.train_ds.file_names=[missing.jsonl]",
            "model.data.validation_ds.file_names=[damaged.jsonl]",
        ],
        [
            "world size 8 is not a multiple of tensor 3",
            "missing.jsonl: no such file",
            "damaged.jsonl: line 1: is cut off",
        ],
    ),
    "base": (["model.restore_from_path=missing.nemo"], ["missing.nemo: no such file"]),
    "heads-and-rank": (
        ["layout=tp8", "model.peft.tied_lora.rank=8192"],
        ["num_attention_heads=4", "num_query_groups=2", "rank=8192"],
    ),
    "layers": (["model.pipeline_model_parallel_size=8"], ["num_layers=4"]),
    "batch": (["model.global_batch_size=4"], ["global_batch_size=4"]),
    "room-and-time": (
        [
            "model.restore_from_path=huge.nemo",
            "preset=lora",
            "model.peft.tied_lora.rank=2048",
            "model.global_batch_size=16",
            "exp_manager.checkpoint_callback_params.save_top_k=1000",
        ],
        ["free, but 1002 checkpoints of", "SLURM's time limit: ", "one save takes about"],
    ),
    "unwritable": ([], ["cannot be written"]),
}


def submit(slurm: PrivateCluster, workshop: Path, runs: Sequence[Point], arguments: list[str]) -> str:
    """Submits an array as `tied-lora launch` does, without its checks of the files."""
    settings = {"kind": "slurm", "time": "5", "save_seconds": 60, "max_requeues": 3, "at_once": 8}
    cluster = Cluster.from_mapping({**settings, "python": sys.executable})
    job = Job(
        name="mistakes",
        folder="runs/mistakes",
        arguments=arguments,
        cluster=cluster,
        nodes=2,
        ranks_per_node=4,
        num_runs=len(runs),
    )
    (workshop / job.folder / "logs").mkdir(parents=True)
    index = index_file(job.folder, runs).replace(f"{job.folder}/unwritable", "/proc/unwritable")
    (workshop / str(job.index)).write_text(index)
    script = workshop / job.folder / "job.sbatch"
    script.write_text(render(job))
    return slurm.run("sbatch", "--parsable", str(script), cwd=workshop, PYTHONPATH=str(ROOT))


@pytest.fixture(scope="module")
def mistakes(slurm: PrivateCluster, workshop: Path) -> Run:
    (workshop / "damaged.jsonl").write_text('{"input": "1", \n')
    sizes = {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64}
    config = json.dumps({**sizes, "encoder_seq_length": 4096, "activation": "fast-swiglu", "mcore_gpt": True}).encode()
    with tarfile.open(workshop / "huge.nemo", "w") as tar:
        for file, content in (("model_config.yaml", config), ("model_weights.ckpt", b"weights")):
            member = tarfile.TarInfo(file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    runs = [Point(name, tuple(overrides)) for name, (overrides, _) in MISTAKES.items()]
    batch = ["model.global_batch_size=16", "model.micro_batch_size=2"]
    arguments = [*rank_arguments("mistakes"), "model.data.train_ds.global_batch_size=16", *batch, *VALIDATION]
    return Run(slurm, workshop / "runs" / "mistakes", submit(slurm, workshop, runs, arguments))


VALIDATION = ["model.data.validation_ds.global_batch_size=16"]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_in_one_message_and_starts_no_rank_and_is_not_tried_again(
    mistakes: Run, name: str
) -> None:
    task = f"{mistakes.job}_{list(MISTAKES).index(name)}"
    fields = mistakes.slurm.wait_for_state(task, seconds=300)
    log = mistakes.script_log(task)
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "2:0"), log
    for part in MISTAKES[name][1]:
        assert part in log, log
    assert log.count("not possible") == (name != "unwritable")
    assert "Traceback" not in log
    assert "starting" not in log
    assert not list((mistakes.folder / name).rglob("node-*.log"))


def test_nodes_with_other_software_are_named(slurm: PrivateCluster, workshop: Path, tmp_path: Path) -> None:
    """n2 has a copy of the package with one more line, and metadata of another numpy."""
    shutil.copytree(Path(nemo_tied_lora.__file__).parent, tmp_path / "nemo_tied_lora")
    (tmp_path / "configs").symlink_to(config_folder())
    with (tmp_path / "nemo_tied_lora" / "config.py").open("a") as source:
        source.write("# edited\n")
    (tmp_path / "numpy-0.1.dist-info").mkdir()
    (tmp_path / "numpy-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[[ $SLURMD_NODENAME == n1 ]] || export PYTHONPATH={tmp_path}\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    job = launch(slurm, workshop, "software", *PP2, f"cluster.python={python}")
    run = Run(slurm, workshop / "runs" / "software", job)
    fields = slurm.wait_for_state(job, seconds=300)
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "2:0"), run.script_log()
    assert "refused by the ranks; not tried again" in run.script_log()
    logs = run.log() + run.log(node=1)
    assert logs.count("not possible") == 1
    for name in ("numpy: ", "nemo_tied_lora's code: "):
        [line] = [line for line in logs.splitlines() if name in line]
        assert "on node n" in line
        assert "make them the same" in line


def test_preflight_only_stops_before_the_model_is_loaded(slurm: PrivateCluster, workshop: Path) -> None:
    job = launch(slurm, workshop, "only_checked", *PP2, "preflight=only")
    run = Run(slurm, workshop / "runs" / "only_checked", job)
    run.finish()
    assert "0: pre-flight: all is well" in run.log()
    assert "megatron" not in run.log().lower()
    assert not list(run.folder.glob("*.nemo"))
    assert run.status == {}


def test_a_users_own_srun_that_does_not_match_the_configuration_is_refused(
    slurm: PrivateCluster, workshop: Path
) -> None:
    finetune = ["env", "RANK=0", "WORLD_SIZE=1", sys.executable, "-m", "nemo_tied_lora.commands.finetune"]
    words = [*rank_arguments("own_step"), "layout=pp2", "trainer.num_nodes=2", "trainer.devices=1"]
    command = " ".join(f"'{word}'" for word in [*finetune, *words])
    printed = slurm.run("bash", "-c", f"srun -N1 -n1 {command} 2>&1; echo code $?", cwd=workshop, PYTHONPATH=str(ROOT))
    assert "= 2, but the launcher started 1 ranks; set trainer.num_nodes=1" in printed, printed
    assert "code 2" in printed
