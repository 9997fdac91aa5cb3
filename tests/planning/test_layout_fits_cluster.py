# SPDX-License-Identifier: Apache-2.0
"""Checks before a run, without ranks: each kind of problem is named, and a sound configuration passes. Pure Python."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tarfile
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, report
from nemo_tied_lora.planning import layout_fits_cluster
from nemo_tied_lora.planning.adapter_cost import Precision
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.data.data_files import check_training_files
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.planning.preflight import check_finetuning

BASE = {
    "mcore_gpt": True,
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "encoder_seq_length": 32,
    "max_position_embeddings": 32,
    "override_vocab_size": 128,
}


@pytest.fixture
def sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration that passes, with a base folder and data, outside SLURM."""
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID", "SLURM_STEP_NUM_NODES", "RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_config.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "base" / "model_weights.ckpt").write_bytes(b"weights")
    (tmp_path / "train.jsonl").write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    files = [f"model.data.{name}.file_names=[{tmp_path / 'train.jsonl'}]" for name in ("train_ds", "validation_ds")]
    sizes = ["model.data.train_ds.max_seq_length=32", "model.data.validation_ds.tokens_to_generate=8"]
    sizes += ["model.global_batch_size=8", "model.micro_batch_size=2"]
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
    ("changes", "text"),
    [
        (
            {"model.data.train_ds.max_seq_length": 64},
            "train_ds.max_seq_length=64: the base has learned positions for 32 tokens only; use at most 32",
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
    sound: dict[str, Any], changes: dict[str, Any], text: str
) -> None:
    assert any(text in problem for problem in refusals(sound, changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        # The world, layers, heads and groups, rank and batches against each other, and against the base's sizes.
        ({"trainer.devices": 3, "model.tensor_model_parallel_size": 2}, "world size 3 is not a multiple of tensor 2"),
        ({"trainer.devices": 3, "model.pipeline_model_parallel_size": 3}, "model.num_layers=4 is not divisible by it"),
        ({"trainer.devices": 8, "model.tensor_model_parallel_size": 8}, "num_attention_heads=4"),
        ({"trainer.devices": 4, "model.tensor_model_parallel_size": 4}, "num_query_groups=2"),
        ({"model.peft.tied_lora.rank": 33}, "rank=33: more than the 32"),
        (
            {"trainer.devices": 2, "model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
            "validation_ds.metric.name=exact_string_match: needs to generate",
        ),
        ({"trainer.devices": 3}, "global_batch_size=8: not divisible by micro_batch_size=2 x data-parallel size 3"),
        (
            {"exp_manager.create_mlflow_logger": True},
            "create_mlflow_logger=true: not possible; NeMo 2.4 names the run",
        ),
    ],
)
def test_sizes_that_do_not_fit_and_what_nemo_cannot_do_are_refused(
    sound: dict[str, Any], changes: dict[str, Any], text: str
) -> None:
    problems = refusals(sound, changes)
    assert any(text in problem for problem in problems), problems


IMPOSSIBLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fsdp": ({"model.fsdp": True}, {}, "model.fsdp=true: not possible"),
    "interleaved": (
        {
            "trainer.devices": 2,
            "model.pipeline_model_parallel_size": 2,
            "model.virtual_pipeline_model_parallel_size": 2,
        },
        {},
        "model.virtual_pipeline_model_parallel_size: NeMo 2.4's model cannot be interleaved; set it to null",
    ),
    "mixture": ({}, {"num_moe_experts": 4}, "model.num_moe_experts=4: a mixture is not tested through NeMo yet"),
    "distributed_fused_adam": (
        {"model.optim.name": "distributed_fused_adam"},
        {},
        "model.optim.name=distributed_fused_adam: not possible; it would leave tied gradients unsummed",
    ),
}
"""Changes of the run, changes of the base, and how the message starts."""


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_trained_through_nemo_is_refused(sound: dict[str, Any], case: str) -> None:
    changes, of_the_base, text = IMPOSSIBLE[case]
    base = Path(sound["model"]["restore_from_path"])
    (base / "model_config.yaml").write_text(yaml.safe_dump({**BASE, **of_the_base}))
    (problem,) = refusals(sound, changes)
    assert problem.startswith(text)


def test_missing_data_is_refused(sound: dict[str, Any], tmp_path: Path) -> None:
    """tests/planning/test_data_lines.py has what is wrong inside of files."""
    data = tmp_path / "other.jsonl"
    (problem,) = refusals(sound, {"model.data.validation_ds.file_names": [str(data)]})
    assert problem == f"model.data.validation_ds.file_names: {data}: no such file"


def test_data_that_cannot_be_read_is_refused(sound: dict[str, Any]) -> None:
    sound["model"]["data"]["train_ds"]["file_names"] = ["/proc/self/mem"]
    with pytest.raises(ConfigError, match="/proc/self/mem: cannot be read: "):
        check_training_files(sound)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (None, "no such file"),
        ("", "its model_config.yaml holds no keys"),
        ("a: [", "its model_config.yaml is not YAML"),
        ("num_layers: 4\nmcore_gpt: true", "model.hidden_size: missing"),
        (yaml.safe_dump({**BASE, "num_attention_heads": 5}), "not divisible by model.num_attention_heads=5"),
    ],
)
def test_a_missing_base_or_one_without_architecture_is_refused(
    sound: dict[str, Any], tmp_path: Path, config: str | None, text: str
) -> None:
    base = tmp_path / "other.nemo"
    if config is not None:
        (tmp_path / "model_config.yaml").write_text(config)
        with tarfile.open(base, "w") as tar:
            tar.add(tmp_path / "model_config.yaml", "./model_config.yaml")
            tar.add(tmp_path / "base" / "model_weights.ckpt", "./model_weights.ckpt")
    assert any(text in problem for problem in refusals(sound, {"model.restore_from_path": str(base)}))


def test_a_truncated_base_is_refused(sound: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cut.nemo").write_bytes(b"\x1f\x8b\x08 and no more")
    (problem,) = refusals(sound, {"model.restore_from_path": str(tmp_path / "cut.nemo")})
    assert "cut.nemo: not a whole .nemo file" in problem


def test_folders_of_indices_and_predictions_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, problems in (("file", 1), ("made later", 0)):
        for key in ("index_mapping_dir", "output_file_path_prefix"):
            written = str(tmp_path / place / "inner" / "x")
            section = {"file_names": ["a"], "write_predictions_to_file": True, key: written}
            cfg = {
                "exp_manager": {"explicit_log_dir": str(tmp_path)},
                "model": {"data": {"validation_ds": section, "test_ds": {**section, "file_names": None}}},
            }
            found = list(layout_fits_cluster.folder_problems(cfg))
            assert len(found) == problems
            assert all(f"model.data.validation_ds.{key}={written}" in one and "writable" in one for one in found)


def test_a_folder_that_is_not_writable_is_refused(sound: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (problem,) = refusals(sound, {"exp_manager.exp_dir": str(tmp_path / "file" / "runs")})
    assert f"{tmp_path / 'file'} is not a writable folder" in problem
    (tmp_path / "shut").mkdir()
    (tmp_path / "shut").chmod(0o555)
    root = os.getuid() == 0
    if root:  # root may write everywhere; access(2) checks the real user
        os.setreuid(65534, 0)
    try:
        (problem,) = refusals(sound, {"exp_manager.exp_dir": str(tmp_path / "shut" / "runs")})
    finally:
        if root:
            os.setreuid(0, 0)
    assert f"{tmp_path / 'shut'} is not a writable folder" in problem


def test_a_folder_that_cannot_be_entered_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o000)
    root = os.getuid() == 0
    if root:  # root may enter everywhere
        os.setresuid(65534, 65534, 0)
    try:
        (problem,) = layout_fits_cluster.folder_problems(
            {"exp_manager": {"explicit_log_dir": str(tmp_path / "theirs" / "run")}}
        )
    finally:
        if root:
            os.setresuid(0, 0, 0)
        tmp_path.chmod(0o700)
    assert "is not a writable folder" in problem


def test_one_message_has_all_problems(
    sound: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = refusals(
        sound,
        {
            "model.restore_from_path": str(tmp_path / "none.nemo"),
            "model.tensor_model_parallel_size": 3,
            "model.data.train_ds.file_names": [str(tmp_path / "none.jsonl")],
            "model.peft.tied_lora.alpha": 0,
            "trainer.precision": 8,
            "output": "adapter.zip",
            "exp_manager.exp_dir": "/proc/self/mem/runs",
        },
    )
    assert report("finetune", ConfigError(problems)) == 2
    text = capsys.readouterr().err
    assert text.count("not possible") == 1
    for part in (
        "none.nemo: no such file",
        "is not a multiple of tensor 3",
        "none.jsonl: no such file",
        "alpha=0",
        "precision='8'",
        "must end in .nemo",
        "mem is not a writable folder",
    ):
        assert text.count(part) == 1, text


def test_a_base_with_rotary_positions_accepts_longer_sequences(sound: dict[str, Any], tmp_path: Path) -> None:
    rotary = {**BASE, "position_embedding_type": "rope"}
    (tmp_path / "base" / "model_config.yaml").write_text(yaml.safe_dump(rotary))
    sound["model"]["data"]["train_ds"]["max_seq_length"] = 64
    check_finetuning(sound)


def test_too_little_disk_space_is_refused_with_the_space_needed(
    sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 10 * 2**20, 10 * 2**20))
    (problem,) = refusals(sound, {})
    assert "10.0 MiB free, but 3 checkpoints of" in problem
    assert "save_top_k" in problem


def test_the_estimate_of_a_checkpoint_is_an_upper_bound_of_its_tensors() -> None:
    arch, config = Architecture.from_model_config(BASE), TiedLoraConfig.preset("tl6", rank=4)
    precision = Precision.from_names("bf16", amp_O2=True)
    single = layout_fits_cluster.checkpoint_bytes(arch, Layout(), config, precision)
    trained = 4 * (32 + 64) + 4 * (32 + 32) + 4 * (32 + 48) + 4 * (48 + 32)  # A and B
    trained += 4 * (4 * 4 + 64 + 32 + 48 + 32)  # u and v of four layers
    assert single == trained * (2 + 4 + 8)
    assert (
        layout_fits_cluster.checkpoint_bytes(arch, Layout(tp_size=2, pp_size=2, devices=4), config, precision)
        >= single
    )
    assert arch.num_parameters is not None
    assert layout_fits_cluster.checkpoint_bytes(arch, Layout(), None, precision) == arch.num_parameters * 14


def test_a_job_that_ends_before_it_can_save_is_refused(sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    check_finetuning(sound)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 10))
    (problem,) = refusals(sound, {})
    assert "one save takes about 30 s" in problem
    assert "--time" in problem


def test_only_rank_0_asks_squeue_for_the_time_left(
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


def test_a_rank_budget_that_the_run_does_not_reach_is_refused(sound: dict[str, Any]) -> None:
    """A section of nulls is no budget, also beside the adapter of another file."""
    budget = {"target_rank": 2, "start_step": None, "final_step": 900, "every": None}
    (problem,) = refusals(sound, {"model.peft.tied_lora.rank_budget": budget, "trainer.max_steps": 800})
    assert problem == (
        "rank_budget.final_step=900: trainer.max_steps=800 ends the run before the budget is reached; set it to at most 800"
    )
    (problem,) = refusals(sound, {"model.peft.tied_lora.rank_budget": {"target_rank": 9}})
    assert problem.startswith("rank_budget.target_rank=9: more than rank=8")
    found = refusals(sound, {"model.peft.restore_from_path": "none.nemo"})
    assert [line for line in found if "rank_budget" in line] == []
    found = refusals(sound, {"model.peft.restore_from_path": "none.nemo", "model.peft.tied_lora.rank_budget": budget})
    assert [line for line in found if "model.peft.tied_lora (rank_budget)" in line]
