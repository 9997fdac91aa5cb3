# SPDX-License-Identifier: Apache-2.0
"""One process: a checkpoint's folder, JSON and random states. Several ranks: moments move to other layouts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from nemo_tied_lora import TiedLoraConfig, inject
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.checkpoint import rng_state, training_checkpoint
from nemo_tied_lora.checkpoint.checkpoint_to_adapter import differences
from nemo_tied_lora.checkpoint.full_optimizer_state import (
    gather_options,
    gather_tensors,
    scatter_options,
    scatter_slot,
)
from nemo_tied_lora.checkpoint.json_values import decode, encode
from nemo_tied_lora.checkpoint.local_optimizer_state import LocalState, read_optimizer, write_optimizer
from nemo_tied_lora.checkpoint.training_checkpoint import CheckpointError, CheckpointWriter
from nemo_tied_lora.commands.convert_checkpoint import _find_checkpoint
from nemo_tied_lora.platform.group_step_adam import GroupStepAdamW
from tests.harness.ranks import run_ranks, single_process
from tests.harness.relayout import relayout
from tests.harness.tiny_gpt import build_gpt, full_tensor

# Tied and untied factors, and a stage without parameters.
ADAPTERS = {
    "tl6": {"preset": "tl6", "rank": 3},
    "vera": {"preset": "vera", "rank": 3},
    # The first stage has a group with A and one with B, and empty ones for u and v.
    "tl6 on the last layer": {"preset": "tl6", "rank": 3, "targets": ["linear_qkv"], "layers": [3]},
    "lora on the first layer": {"preset": "lora", "rank": 3, "targets": ["linear_qkv", "linear_fc1"], "layers": [0]},
}


def step(adapter: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Takes a step on gradients that are the same whole tensors on every layout."""
    trained = {n: s for n, s in whole_shapes(adapter).items() if n.rsplit(".", 1)[-1] in adapter.config.trained}
    parts = scatter_slot(adapter, {n: full_tensor(f"gradient {number} {n}", s) for n, s in trained.items()})
    for parameter, part in parts.items():
        parameter.grad = part.to(parameter.dtype)
    optimizer.step()


def whole_shapes(adapter: Any) -> dict[str, tuple[int, ...]]:
    return expected_shapes(adapter.config, adapter.shapes)


def gathered(adapter: Any, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], Any]:
    state = read_optimizer(optimizer, adapter.parameters())
    options, scalars = gather_options(adapter, state)
    tensors: dict[str, torch.Tensor] = {}
    for _, some in gather_tensors(adapter, state):
        tensors |= some
    return tensors, (options, scalars)


def build(config: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer]:
    adapter = inject(build_gpt(llama=True, groups=2), TiedLoraConfig.from_mapping(config))
    adapter.load_full_state({n: full_tensor(f"start {n}", shape) for n, shape in whole_shapes(adapter).items()})
    return adapter, fresh(adapter)


def fresh(adapter: Any) -> torch.optim.Optimizer:
    """An optimizer that has stepped nothing. One kind counts steps for each parameter, the other for each group."""
    kind = torch.optim.AdamW if adapter.config.layers is None else GroupStepAdamW
    return kind(adapter.parameter_groups(1e-2, {"A": 0.5, "B": 2, "v": 4}))


def move(config: dict[str, Any], *, fault: bool = False) -> dict[str, Any]:
    """Takes two steps at TP 2, one at PP 2, one at DP 2, one at PP 2, one at TP 2.

    `fault` does not move the moments at the first change of layout.
    """
    saved: Any = None
    for number, layout in enumerate([{"tp": 2}, {"pp": 2}, {}, {"pp": 2}, {"tp": 2}]):
        relayout(**layout)
        adapter, optimizer = build(config)
        if saved is not None:
            tensors, (options, scalars) = saved
            adapter.load_full_state(part(tensors, "adapter"))
            slots = {} if fault else {s: scatter_slot(adapter, part(tensors, s)) for s in ("exp_avg", "exp_avg_sq")}
            write_optimizer(optimizer, LocalState(slots, scatter_options(adapter, scalars), options))
        else:
            step(adapter, optimizer, 100)
        if fault and saved is not None:
            optimizer = fresh(adapter)
        step(adapter, optimizer, number)
        saved = gathered(adapter, optimizer)
    return saved[0]


def part(tensors: dict[str, torch.Tensor], slot: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{slot}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{slot}/")}


def move_all(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    moved = {name: move(config) for name, config in configs.items()}
    return moved | {"fault": move(configs["tl6"], fault=True)}


def unmoved(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    adapter, optimizer = build(config)
    for number in (100, 0, 1, 2, 3, 4):
        step(adapter, optimizer, number)
    return gathered(adapter, optimizer)[0]


def test_moments_and_step_counts_move_over_layouts_bit_for_bit() -> None:
    single_process()
    ranks = run_ranks(move_all, ADAPTERS, world_size=2, tp=2)
    for name, config in ADAPTERS.items():
        want = unmoved(config)
        for got in ranks:
            assert got[name].keys() == want.keys()
            assert [key for key in want if not torch.equal(got[name][key], want[key])] == [], name
        slots = {key.split("/")[0] for key in want}
        assert slots == {"adapter", "exp_avg", "exp_avg_sq"}
    assert not torch.equal(ranks[0]["fault"]["adapter/linear_qkv.A"], ranks[0]["tl6"]["adapter/linear_qkv.A"])


def test_random_states_are_restored_whole() -> None:
    single_process()
    draws = lambda: (torch.rand(3).tolist(), numpy.random.normal(), random.gauss(0, 1), dropped())  # noqa: E731
    random.gauss(0, 1)  # keeps the second number of its pair for the next call
    numpy.random.normal()
    states = {key: tensor.clone() for key, tensor in rng_state.capture(torch.device("cpu")).items()}
    first = draws()
    assert first != draws()
    rng_state.restore(states, torch.device("cpu"))
    assert first == draws()


def dropped() -> list[float]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        return torch.rand(3).tolist()


def test_lightnings_dictionaries_go_through_json_bit_for_bit() -> None:
    value = {
        "lr": 0.1 + 0.2,
        "betas": (0.9, 0.98),
        "best": torch.tensor(1.1),
        "scores": {"a": torch.tensor([1.0, float("inf")], dtype=torch.bfloat16)},
        "numbered": {3: [None, True, -1]},
        "nothing": float("nan"),
    }
    back = decode(json.loads(json.dumps(encode(value))))
    assert torch.equal(back.pop("best"), value["best"])
    assert torch.equal(back["scores"].pop("a"), value["scores"]["a"])
    assert back["scores"] == {}
    assert numpy.isnan(back.pop("nothing"))
    assert back == {"lr": value["lr"], "betas": (0.9, 0.98), "scores": {}, "numbered": {3: [None, True, -1]}}
    with pytest.raises(TypeError, match=r"state.hook: a function cannot be kept"):
        encode({"hook": encode})


def write(path: Path, number: int = 1) -> None:
    writer = CheckpointWriter(path)
    writer.add("linear_qkv", {"adapter/linear_qkv.A": torch.full((2, 2), float(number))})
    writer.finish({"step": number})


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x-last"
    writer = CheckpointWriter(path)
    writer.add("linear_qkv", {"adapter/linear_qkv.A": torch.ones(2, 2)})
    assert not path.exists()
    assert [p.name for p in tmp_path.glob("*last")] == []
    writer.finish({"step": 1})
    assert training_checkpoint.read_tensors(path, "adapter")["linear_qkv.A"].sum() == 4
    write(path, 2)
    assert training_checkpoint.read_description(path)["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-last"]
    training_checkpoint.remove(path)
    assert list(tmp_path.iterdir()) == []


def test_cleaning_leaves_one_last_checkpoint_and_no_leftovers(tmp_path: Path) -> None:
    write(tmp_path / "step=4-last", 4)
    write(tmp_path / "step=6-last", 6)
    write(tmp_path / "step=6", 6)
    CheckpointWriter(tmp_path / "step=8-last").add("linear_qkv", {})
    (tmp_path / "step=6-last-unfinished").touch()
    (tmp_path / "step=8-last-unfinished").touch()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / "theirs-unfinished").touch()
    with pytest.raises(CheckpointError, match="rank 0 has not removed them"):
        training_checkpoint.remove_leftovers(tmp_path, first=False, timeout=0.2)
    training_checkpoint.remove_leftovers(tmp_path, first=True)
    training_checkpoint.remove_leftovers(tmp_path, first=False, timeout=0.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=6", "step=6-last", "theirs", "theirs-unfinished"]


def test_a_checkpoint_that_was_being_replaced_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "step=6-last"
    write(path)
    CheckpointWriter(path)
    path.rename(tmp_path / ".step=6-last.removed")  # the state of a `finish` that was killed
    training_checkpoint.remove_leftovers(tmp_path, first=True)
    assert [p.name for p in tmp_path.iterdir()] == ["step=6-last"]
    assert training_checkpoint.read_description(path)["step"] == 1


def test_a_half_written_or_half_removed_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "step=6")
    for hidden in (".step=8.partial", ".step=4.removed"):
        shutil.copytree(tmp_path / "step=6", tmp_path / hidden)
        assert not training_checkpoint.is_checkpoint(tmp_path / hidden)
        with pytest.raises(CheckpointError, match="not a training checkpoint"):
            training_checkpoint.read_description(tmp_path / hidden)
    (tmp_path / ".step=4.removed" / "linear_qkv.safetensors").unlink()
    assert _find_checkpoint(tmp_path).name == "step=6"


def test_a_damaged_last_checkpoint_is_named_before_a_run_resumes_from_it(tmp_path: Path) -> None:
    write(tmp_path / "step=6-last")
    (tmp_path / "step=6-last" / "linear_qkv.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step=6-last/linear_qkv.safetensors: has 0 bytes, not \d+"):
        training_checkpoint.remove_leftovers(tmp_path, first=True)


@pytest.mark.parametrize("damage", ["cut", "missing", "json", "version"])
def test_a_damaged_checkpoint_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path)
    file, description = path / "linear_qkv.safetensors", path / "checkpoint.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "json":
        description.write_text(description.read_text()[:-5])
    else:
        description.write_text(description.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(CheckpointError, match=r"x(/|:)"):
        training_checkpoint.read_description(path)


def test_a_checkpoint_that_is_older_than_a_field_belongs_to_the_same_adapter(tmp_path: Path) -> None:
    now = {"adapter": TiedLoraConfig(alpha=8).as_dict(), "targets": {}, "facts": {}}
    saved = {**now, "adapter": {key: value for key, value in now["adapter"].items() if key != "alpha_rule"}}
    assert differences(tmp_path, saved, now) == []
    other = {**now, "adapter": TiedLoraConfig(alpha=8, alpha_rule="sqrt").as_dict()}
    (problem,) = differences(tmp_path, saved, other)
    assert "model.peft.tied_lora.alpha_rule: 'rank' in the checkpoint, 'sqrt' in this run" in problem


def test_a_failed_write_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "x", 1)
    writer = CheckpointWriter(tmp_path / "x")
    (tmp_path / ".x.partial" / "linear_qkv.safetensors").mkdir()  # a file cannot replace a folder
    with pytest.raises(OSError, match="linear_qkv"):
        writer.add("linear_qkv", {"adapter/linear_qkv.A": torch.ones(2)})
    writer.abandon()
    assert training_checkpoint.read_description(tmp_path / "x")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
