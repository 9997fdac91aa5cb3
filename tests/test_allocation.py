# SPDX-License-Identifier: Apache-2.0
"""The configuration against the allocation, without ranks: each kind of misfit is named, and sound ones pass."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_tied_lora.allocation import fitting
from nemo_tied_lora.commands.composing import compose_config, plain
from nemo_tied_lora.config import ConfigError, TiedLoraConfig
from nemo_tied_lora.layout import Architecture, Layout
from nemo_tied_lora.planning import Precision
from nemo_tied_lora.preflight import check_finetuning

BASE = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "encoder_seq_length": 32,
    "max_position_embeddings": 32,
    "override_vocab_size": 128,
}
STEP = {"RANK": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}


@pytest.fixture
def sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration that passes, with a base folder and data, and no SLURM around."""
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID", "SLURM_STEP_NUM_NODES", "RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_config.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "train.jsonl").write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    files = [f"model.data.{name}.file_names=[{tmp_path / 'train.jsonl'}]" for name in ("train_ds", "validation_ds")]
    sizes = ["model.data.train_ds.max_seq_length=32", "model.global_batch_size=8", "model.micro_batch_size=2"]
    place = [f"model.restore_from_path={tmp_path / 'base'}", f"exp_manager.exp_dir={tmp_path / 'runs'}"]
    cfg = plain(compose_config("finetune", [*files, *sizes, *place]))
    check_finetuning(cfg)
    return cfg


def refusals(cfg: dict[str, Any], changes: dict[str, Any]) -> list[str]:
    changed = copy.deepcopy(cfg)
    for key, value in changes.items():
        *path, last = key.split(".")
        node = changed
        for part in path:
            node = node[part]
        node[last] = value
    with pytest.raises(ConfigError) as caught:
        check_finetuning(changed)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.data.train_ds.max_seq_length": 64},
            "train_ds.max_seq_length=64: the base has learned only 32 positions; use at most 32",
        ),
        (
            {"trainer.devices": 2, "model.context_parallel_size": 2, "model.data.train_ds.max_seq_length": 30},
            "train_ds.max_seq_length=30: not divisible by 2 x context_parallel_size = 4; use 32",
        ),
        (
            {
                "trainer.devices": 2,
                "model.tensor_model_parallel_size": 2,
                "model.sequence_parallel": True,
                "model.data.train_ds.max_seq_length": 31,
            },
            "train_ds.max_seq_length=31: not divisible by tensor_model_parallel_size x context_parallel_size "
            "(sequence_parallel) = 2; use 32",
        ),
        (
            {"trainer.devices": 2, "model.data.validation_ds.global_batch_size": 6},
            "validation_ds.global_batch_size=6: not divisible by micro_batch_size=2 x data-parallel size 2; use 8",
        ),
        ({"model.data.train_ds.max_seq_length": None}, "train_ds.max_seq_length=None: must be a whole number"),
    ],
)
def test_data_that_does_not_fit_the_layout_or_the_base_is_refused(
    sound: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    assert any(said in problem for problem in refusals(sound, changes))


def test_a_base_with_rotary_positions_takes_longer_sequences(sound: dict[str, Any], tmp_path: Path) -> None:
    rotary = {**BASE, "position_embedding_type": "rope"}
    (tmp_path / "base" / "model_config.yaml").write_text(yaml.safe_dump(rotary))
    sound["model"]["data"]["train_ds"]["max_seq_length"] = 64
    check_finetuning(sound)


@pytest.mark.parametrize(
    ("step", "layout", "said"),
    [
        ({}, {"num_nodes": 2, "devices": 8}, []),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, {"num_nodes": 2, "devices": 8}, []),
        ({}, {"num_nodes": 1, "devices": 16}, ["trainer.num_nodes=1: SLURM runs this on 2 nodes; set it to 2"]),
        ({}, {"num_nodes": 2, "devices": 4}, ["8 ranks, but srun started 16 tasks; one task a rank: --ntasks=8"]),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "9,7"},
            {"num_nodes": 2, "devices": 8},
            ["SLURM_STEP_TASKS_PER_NODE=[9, 7]: nodes hold different numbers of ranks; --ntasks-per-node=8"],
        ),
        ({"SLURM_GPUS_ON_NODE": "4"}, {"num_nodes": 2, "devices": 8}, ["SLURM gave this node 4 GPUs"]),
    ],
)
def test_ranks_that_slurm_did_not_start_are_named(
    step: dict[str, str], layout: dict[str, int], said: list[str]
) -> None:
    problems = list(fitting.slurm_problems(Layout(**layout), {**STEP, **step}))
    assert len(problems) == len(said), problems
    assert all(part in problem for part, problem in zip(said, problems, strict=True))


def test_outside_of_a_rank_slurms_step_says_nothing() -> None:
    environment = {name: value for name, value in STEP.items() if name != "RANK"}
    assert not list(fitting.slurm_problems(Layout(), environment))


def test_too_little_room_is_refused_with_what_is_needed(
    sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 10 * 2**20, 10 * 2**20))
    (problem,) = refusals(sound, {})
    assert "10.0 MiB free, but 3 checkpoints of" in problem
    assert "save_top_k" in problem


def test_a_checkpoints_estimate_is_an_upper_bound_of_its_tensors() -> None:
    arch, config = Architecture.from_model_config(BASE), TiedLoraConfig.preset("tl6", rank=4)
    precision = Precision.from_names("bf16", amp_O2=True)
    single = fitting.checkpoint_bytes(arch, Layout(), config, precision)
    trained = 4 * (32 + 64) + 4 * (32 + 32) + 4 * (32 + 48) + 4 * (48 + 32)  # A and B
    trained += 4 * (4 * 4 + 64 + 32 + 48 + 32)  # u and v of four layers
    assert single == trained * (2 + 4 + 8)
    assert fitting.checkpoint_bytes(arch, Layout(tp_size=2, pp_size=2, devices=4), config, precision) >= single
    assert arch.num_parameters is not None
    assert fitting.checkpoint_bytes(arch, Layout(), None, precision) == arch.num_parameters * 14


def test_a_job_that_ends_before_it_could_save_is_refused(
    sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    check_finetuning(sound)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 10))
    (problem,) = refusals(sound, {})
    assert "one save takes about 30 s" in problem
    assert "--time" in problem


def test_squeue_is_asked_for_the_time_left_by_one_rank_alone(
    sound: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho 0:20\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (problem,) = refusals(sound, {})
    assert "20 s are left" in problem
    monkeypatch.setenv("RANK", "1")
    check_finetuning(sound)
    assert len((tmp_path / "asked").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20", 20),
        ("1:20", 80),
        ("2:00:03", 7203),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_slurms_times_are_read(text: str, seconds: float | None) -> None:
    assert fitting._seconds(text) == seconds
