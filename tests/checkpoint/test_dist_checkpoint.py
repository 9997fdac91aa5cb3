# SPDX-License-Identifier: Apache-2.0
"""Two ranks: megatron-core's distributed checkpoint of an injected model, saved at TP 2 and loaded at PP 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_tied_lora import TiedLoraConfig, inject
from nemo_tied_lora.adapter.factor_names import expected_shapes
from tests.harness.ranks import run_ranks
from tests.harness.tiny_gpt import build_gpt, full_tensor


def save(folder: str) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    model = build_gpt(llama=True, groups=2, dtype=torch.float32)
    adapter = inject(model, TiedLoraConfig.preset("tl6", rank=3))
    shapes = expected_shapes(adapter.config, adapter.shapes)
    adapter.load_full_state({name: full_tensor(f"saved {name}", shape) for name, shape in shapes.items()})
    dist_checkpointing.save(model.sharded_state_dict(), folder)
    return adapter.full_state()


def load(folder: str) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    model = build_gpt(llama=True, groups=2, dtype=torch.float32)
    adapter = inject(model, TiedLoraConfig.preset("tl6", rank=3))
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
    return adapter.full_state()


@pytest.mark.parametrize("layouts", [({"tp": 2}, {"pp": 2}), ({"pp": 2}, {"tp": 2})], ids=["tp2-pp2", "pp2-tp2"])
def test_an_adapter_in_megatrons_own_checkpoint_changes_layout(
    layouts: tuple[dict[str, int], dict[str, int]], tmp_path: Path
) -> None:
    saved = run_ranks(save, str(tmp_path), world_size=2, **layouts[0])
    loaded = run_ranks(load, str(tmp_path), world_size=2, **layouts[1])
    assert saved[0].keys() == loaded[0].keys()
    for rank in (0, 1):
        assert [name for name in saved[0] if not torch.equal(saved[0][name], loaded[rank][name])] == []
