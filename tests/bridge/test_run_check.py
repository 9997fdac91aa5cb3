# SPDX-License-Identifier: Apache-2.0
"""One process: what is refused before a run of Bridge's loop, or a model of a script, is built."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig

from nemo_tied_lora import ConfigError, save_adapter
from nemo_tied_lora.bridge import TiedLoRA, check_run
from tests.bridge.bridge_model import build, fill_base, provider
from tests.bridge.training_loop import settings
from tests.harness.ranks import single_process


@pytest.fixture(autouse=True)
def one_rank() -> None:
    single_process()


def problems(cfg: Any) -> list[str]:
    try:
        check_run(cfg)
    except ConfigError as error:
        return list(error.problems)
    return []


def interleaved(config: Any, stages: int, overlap: bool) -> None:
    config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size = stages, 2
    config.overlap_p2p_comm, config.batch_p2p_comm = overlap, not overlap


@pytest.mark.parametrize(("stages", "overlap", "refused"), [(2, False, True), (2, True, False), (4, False, False)])
def test_an_interleaved_pipeline_of_two_stages_needs_overlapped_transfers(
    stages: int, overlap: bool, refused: bool, tmp_path: Path
) -> None:
    """Megatron's schedule would train it wrongly. In a recipe, when the method is applied, and before a model is built."""
    cfg, remedy = (
        settings(tmp_path, steps=1, peft=TiedLoRA(rank=3)),
        "set model.overlap_p2p_comm=true model.batch_p2p_comm",
    )
    interleaved(cfg.model, stages, overlap)
    found = problems(cfg)
    assert len(found) == refused
    assert all(line.startswith("model.virtual_pipeline_model_parallel_size=2: ") and remedy in line for line in found)
    model = build(fill_base, ddp=False)
    interleaved(model[0].config, stages, overlap)
    if refused:
        with pytest.raises(ConfigError, match=remedy):
            TiedLoRA(rank=3)(model)
        cfg.model.register_pre_wrap_hook(TiedLoRA(rank=3))
        with pytest.raises(ConfigError, match=remedy):
            cfg.model.provide_distributed_model(ddp_config=DistributedDataParallelConfig())
        TiedLoRA(rank=3)(model, training=False)
    else:
        TiedLoRA(rank=3)(model)


def test_fsdp_and_wrong_fields_of_the_adapter_are_refused_together_when_bridge_validates(tmp_path: Path) -> None:
    cfg = settings(tmp_path, steps=1, peft=TiedLoRA(layers=[1, 9], restore_from_path="/nope.nemo"))
    cfg.ddp.use_megatron_fsdp = cfg.dist.use_megatron_fsdp = cfg.dist.use_torch_fsdp2 = True  # the second by Bridge
    found = problems(cfg)
    starts = [
        "peft.restore_from_path=/nope.nemo: no such file",
        "peft.layers: [9] do not exist; the model has layers 0 to 3",
        "ddp.use_megatron_fsdp=true: not possible",
        "dist.use_torch_fsdp2=true: not possible",
    ]
    assert [line[: len(start)] for line, start in zip(found, starts, strict=True)] == starts
    cfg.ddp.use_megatron_fsdp = cfg.dist.use_megatron_fsdp = cfg.dist.use_torch_fsdp2 = False
    cfg.checkpoint.pretrained_checkpoint, cfg.peft = str(tmp_path), TiedLoRA(layers=[9])
    with pytest.raises(ConfigError, match=r"peft\.layers: \[9\] do not exist"):
        cfg.validate()
    cfg.peft = TiedLoRA(layers=[3])
    cfg.validate()


def test_the_check_gives_the_method_its_files_fields(tmp_path: Path) -> None:
    first = TiedLoRA(rank=3, alpha=5.0)
    build(fill_base, first, ddp=False)
    path = str(save_adapter(first.adapter, tmp_path / "adapter.nemo"))
    cfg = settings(tmp_path, steps=1, peft=TiedLoRA(restore_from_path=path))
    assert problems(cfg) == []
    assert (cfg.peft.rank, cfg.peft.alpha) == (3, 5.0)
    cfg.peft = TiedLoRA(rank=8, restore_from_path=path)
    assert problems(cfg) == [
        f"peft.rank=8: the adapter in {path} has 3; leave the field out, or set it to that",
    ]


def written_by(folder: Path, peft: Any, base: str = "/base") -> Path:
    """A folder as Bridge's loop leaves it after two steps, without tensors."""
    cfg = settings(folder, steps=2, peft=peft, pretrained_checkpoint=base)
    (folder / "iter_0000002").mkdir(parents=True)
    cfg.to_yaml(str(folder / "iter_0000002" / "run_config.yaml"))
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


@pytest.mark.parametrize(
    ("recorded", "now", "differ"),
    [
        (TiedLoRA(rank=3), TiedLoRA(rank=3), []),
        (TiedLoRA(targets=["attention"]), TiedLoRA(targets=["linear_proj", "linear_qkv"]), []),
        (TiedLoRA(rank=3), TiedLoRA(rank=5, alpha=7.0), ["rank", "alpha"]),
        (TiedLoRA(rank=3), TiedLoRA(rank=3, dropout=0.1, seed=7, dtype="float32"), ["dropout", "seed", "dtype"]),
        (TiedLoRA(), TiedLoRA.preset("vera", layers=[0]), ["layers", "trained"]),
    ],
)
def test_a_resume_needs_the_fields_of_the_run_that_it_continues(
    recorded: TiedLoRA, now: TiedLoRA, differ: list[str], tmp_path: Path
) -> None:
    folder = written_by(tmp_path, recorded)
    for load in (folder, folder / "iter_0000002"):
        found = problems(settings(folder, steps=4, peft=now, load=str(load)))
        assert [line.partition("=")[0] for line in found] == [f"peft.{name}" for name in differ]
        assert all(f"the run resumes from {folder / 'iter_0000002'}, which has " in line for line in found)
    assert problems(settings(folder, steps=4, peft=now, load=str(tmp_path / "new"))) == []


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    folder = written_by(tmp_path, None)
    (line,) = problems(settings(folder, steps=4, peft=TiedLoRA(), load=str(folder), ckpt_step=2))
    assert line == f"checkpoint.load={folder}: its checkpoint is of no adapter, not of TiedLoRA; name another folder"


def test_a_resume_on_another_base_or_with_another_file_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = written_by(tmp_path / "run", TiedLoRA(rank=3))
    first = TiedLoRA(rank=3)
    build(fill_base, first, ddp=False)
    path = str(save_adapter(first.adapter, tmp_path / "adapter.nemo"))
    with caplog.at_level(logging.WARNING):
        same = settings(folder, steps=4, peft=TiedLoRA(rank=3), load=str(folder), pretrained_checkpoint="/base/")
        caplog.clear()
        assert problems(same) == caplog.messages == []
        other = TiedLoRA(restore_from_path=path)
        assert problems(settings(folder, steps=4, peft=other, load=str(folder), pretrained_checkpoint="/new")) == []
    assert caplog.messages == [
        f"checkpoint.pretrained_checkpoint=/new: the adapter in {folder}/iter_0000002 was trained on /base, and is continued on "
        "another base",
        f"peft.restore_from_path={path}: no effect; the run resumes from {folder}/iter_0000002",
    ]


def test_a_hook_that_would_replace_the_one_that_loads_the_base_is_refused() -> None:
    """Megatron-Bridge would silently train on random weights."""
    made, peft = provider(), TiedLoRA(rank=3)
    made.register_pre_wrap_hook(fill_base)
    options: dict[str, Any] = {"ddp_config": DistributedDataParallelConfig(), "use_cpu_initialization": True}
    for hooks in (peft, [peft]):
        with pytest.raises(
            ConfigError, match=r"replaces the hooks that are registered \(1\), so the base is not loaded"
        ):
            made.provide_distributed_model(**options, pre_wrap_hook=hooks)
    assert peft.adapter is None
    made.provide_distributed_model(**options, fp16=False, bf16=False, pre_wrap_hook=[fill_base, peft])
    assert peft.adapter is not None


def test_a_script_that_asks_for_fsdp_is_refused() -> None:
    made, ddp = provider(), DistributedDataParallelConfig()
    made.register_pre_wrap_hook(TiedLoRA(rank=3))
    with pytest.raises(ConfigError, match=r"dist\.use_torch_fsdp2=true: not possible; FSDP would shard"):
        made.provide_distributed_model(ddp_config=ddp, use_torch_fsdp2=True)
    ddp.use_megatron_fsdp = True
    with pytest.raises(ConfigError, match=r"ddp\.use_megatron_fsdp=true: not possible; FSDP would shard"):
        made.provide_distributed_model(ddp_config=ddp)
