# SPDX-License-Identifier: Apache-2.0
"""examples/bridge/finetune_tied_lora.py from its command line to its adapter file: on one rank, and on two pipeline stages.

On two stages it also gets the signal that SLURM sends before the time limit, and is then called again.
"""

from __future__ import annotations

import os
import runpy
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile, read_adapter
from nemo_tied_lora.platform import prepare
from tests.bridge.example_folder import write_example_folder
from tests.harness.paths import ROOT
from tests.harness.ranks import run_ranks

LENGTH, STEPS, STOP = 24, 4, 2
ARGUMENTS = [
    *(f"model.seq_length={LENGTH}", f"dataset.seq_length={LENGTH}", f"train.train_iters={STEPS}", "peft.rank=3"),
    *("train.global_batch_size=4", "scheduler.lr_warmup_iters=1", "optimizer.lr=1e-2", "validation.eval_iters=1"),
    *("mixed_precision=null", "dist.distributed_backend=gloo"),
]


@dataclass
class Run:
    """What a rank saw of one call of the example.

    Attributes:
        code: its exit code.
        steps: how many it trained.
        adapters: the adapter files in its folder.
    """

    code: int
    steps: int
    adapters: list[str]


def called(folder: str, name: str, arguments: list[str], stop_after: int | None = None) -> Run:
    """A rank: calls the example with layers that a CPU can run. After `stop_after` steps, the last rank gets SIGTERM."""
    prepare(bridge=True)
    from tests.bridge.hugging_face_model import on_a_cpu
    from tests.bridge.training_loop import prepare_loop

    prepare_loop()
    from megatron.bridge.training import train

    main = runpy.run_path(str(ROOT / "examples" / "bridge" / "finetune_tied_lora.py"))["main"]
    recipe, train_step, run = main.__globals__["recipe"], train.train_step, Run(-1, 0, [])

    def recipe_for_a_cpu(*given: str) -> Any:
        cfg = recipe(*given)
        on_a_cpu(cfg.model)
        return cfg

    def counted(*given: Any, **options: Any) -> Any:
        result = train_step(*given, **options)
        run.steps += 1
        if run.steps == stop_after and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    main.__globals__["recipe"], train.train_step = recipe_for_a_cpu, counted
    files = [f"--hf-path={folder}/hf", f"--data={folder}/data", f"--folder={folder}/{name}"]
    run.code = main([*files, *ARGUMENTS, *arguments])
    train.train_step = train_step
    run.adapters = [path.name for path in Path(folder, name).glob("*.nemo")]
    return run


def called_on_two_stages(folder: str) -> dict[str, Run]:
    """A rank: a whole run, and one that is stopped and started again."""
    stages = ["model.pipeline_model_parallel_size=2"]
    return {
        "whole": called(folder, "whole", stages),
        "stopped": called(folder, "stopped", stages, stop_after=STOP),
        "started again": called(folder, "stopped", stages),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("example")
    write_example_folder(made)
    return made


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> AdapterFile:
    arguments = ["checkpoint.also_save_hf_checkpoint=true"]
    assert run_ranks(called, str(folder), "one", arguments, world_size=1) == [Run(0, STEPS, ["adapter.nemo"])]
    return read_adapter(folder / "one" / "adapter.nemo")


@pytest.fixture(scope="module")
def stages(folder: Path) -> list[dict[str, Run]]:
    return run_ranks(called_on_two_stages, str(folder), world_size=2, pp=2)


def test_two_stages_end_with_the_adapter_of_one_rank(
    one_rank: AdapterFile, stages: list[dict[str, Run]], folder: Path
) -> None:
    assert [found["whole"] for found in stages] == [Run(0, STEPS, ["adapter.nemo"])] * 2
    whole = read_adapter(folder / "whole" / "adapter.nemo")
    assert whole.state.keys() == one_rank.state.keys()
    assert all(tensor.any() for name, tensor in whole.state.items() if name.endswith(".v")), "they start at zero"
    for name, tensor in whole.state.items():
        torch.testing.assert_close(
            tensor, one_rank.state[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_index_of_the_data_is_in_the_runs_folder(one_rank: AdapterFile, folder: Path) -> None:
    """Where it cannot become that of an older file with the same name, and the data's folder need not be writable."""
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["training.jsonl", "validation.jsonl"]
    assert len(list((folder / "one" / "data_index").rglob("training.jsonl.idx.npy"))) == 1


def test_bridges_own_export_beside_each_checkpoint_is_the_adapter_for_peft(
    one_rank: AdapterFile, folder: Path
) -> None:
    (written,) = (folder / "one" / "checkpoints").rglob("adapter_model.safetensors")
    assert written.parent.joinpath("adapter_config.json").is_file()


def test_near_the_time_limit_all_ranks_save_and_ask_for_another_start(stages: list[dict[str, Run]]) -> None:
    assert [found["stopped"] for found in stages] == [Run(75, STOP, [])] * 2


def test_the_same_command_resumes_and_ends_as_the_whole_run_bit_for_bit(
    stages: list[dict[str, Run]], folder: Path
) -> None:
    assert [found["started again"] for found in stages] == [Run(0, STEPS - STOP, ["adapter.nemo"])] * 2
    whole, resumed = (read_adapter(folder / name / "adapter.nemo").state for name in ("whole", "stopped"))
    assert [name for name, tensor in whole.items() if not torch.equal(resumed[name], tensor)] == []
