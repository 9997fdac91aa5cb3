# SPDX-License-Identifier: Apache-2.0
"""Three ranks: what an adapter does on a pipeline stage without parameters. tests/parity trains such a stage."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter.nonfinite_grads import find_nonfinite
from nemo_tied_lora.adapter.replica_check import check_ties
from tests.adapter.test_inject import randomise
from tests.adapter.test_inject_refused import description
from tests.harness.ranks import run_ranks, single_process
from tests.harness.tiny_gpt import build_gpt

PRESETS = ("tl6", "vera", "lora")


def _on_a_rank(folder: str) -> dict[str, Any]:
    """The whole life of each preset's adapter, on the layout in which the second stage is empty."""
    model = build_gpt(num_layers=2, pipeline_model_parallel_layout="Et||tL")
    rank, before = torch.distributed.get_rank(), description(model)
    found: dict[str, Any] = {"base": sum(1 for _ in model.parameters())}
    with pytest.raises(ConfigError, match="layers: \\[7\\] do not exist"):
        inject(model, TiedLoraConfig(layers=[7]))
    for preset in PRESETS:
        adapter = inject(model, TiedLoraConfig.preset(preset, rank=3))
        randomise(adapter)
        parameters = list(adapter.parameters())
        optimizer = torch.optim.AdamW([{"params": parameters}], lr=1e-2)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        assert find_nonfinite(adapter.named_parameters()) is None
        norm = float(adapter.clip_gradients(1.0))
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        check_ties(adapter)
        sharded = [key for key in model.sharded_state_dict() if ".tied_lora." in key]
        adapter.merge()
        with pytest.raises(RuntimeError, match="merged already"):
            adapter.merge()
        adapter.unmerge()
        path = Path(folder) / f"{preset}.nemo"
        save_adapter(adapter, path)
        state = adapter.full_state()
        adapter.remove()
        assert description(model) == before
        adapter = load_adapter(model, path)
        assert all(torch.equal(tensor, state[name]) for name, tensor in adapter.full_state().items())
        adapter.detach()
        adapter.attach()
        found[preset] = (len(parameters), norm, len(sharded), adapter.num_parameters())
        adapter.remove()
        assert description(model) == before
    with pytest.raises(ValueError, match="optimizer got an empty parameter list") if rank == 1 else _nothing():
        adapter = inject(model, TiedLoraConfig.preset("lora", rank=3))
        torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    return found


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_a_stage_without_parameters_takes_part_in_everything() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(_on_a_rank, folder, world_size=3, pp=3)
        single_process()
        assert [rank["base"] > 0 for rank in ranks] == [True, False, True]
        for preset in PRESETS:
            whole = build_gpt(num_layers=2)
            adapter = load_adapter(whole, Path(folder) / f"{preset}.nemo")
            for parameter in adapter.parameters():
                parameter.grad = torch.ones_like(parameter)
            expected = float(adapter.gradient_norm())
            # A stage without layers holds the tied A and B of four targets, which vera does not train.
            held = {"tl6": 8, "vera": 0, "lora": 0}[preset]
            stored = {"tl6": 8, "vera": 8, "lora": 0}[preset]
            assert [rank[preset][0] for rank in ranks][1] == held
            assert [rank[preset][2] for rank in ranks][1] == stored
            assert [rank[preset][1] for rank in ranks] == pytest.approx([expected] * 3, rel=1e-9)
            assert [rank[preset][3] for rank in ranks] == [adapter.num_parameters()] * 3
