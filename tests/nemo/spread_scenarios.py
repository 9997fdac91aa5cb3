# SPDX-License-Identifier: Apache-2.0
"""Resumes a run of one rank on two ranks, which share its optimizer's state.

Rank 0 prints a JSON object last. `checkpoint_scenarios.distributed_optimizer` made the stopped run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.nemo import checkpoint_scenarios
from tests.nemo.checkpoint_runs import SHARDED, At, checkpoint, run, state, tensors_in

__all__ = ["main", "spread"]


def spread() -> dict[str, Any]:
    """The ranks' shards hold every tensor bit for bit; later steps agree to the rounding of sums."""

    def save_again(trainer: Any) -> dict[str, torch.Tensor]:
        trainer.save_checkpoint("again.ckpt")
        parameters = trainer.strategy._optimizer().mcore_optimizer.optimizer.param_groups[0]["params"]
        return {**without_random_states(Path("again")), "shard": torch.tensor(sum(p.numel() for p in parameters))}

    saved_again = At(3, save_again)
    run("spread", *SHARDED, "trainer.devices=2", callbacks=(saved_again,))
    shard, left = saved_again.result.pop("shard"), without_random_states(checkpoint("spread", 2))
    got, want = (state(Path(name, "adapter.nemo")) for name in ("spread", "distributed_straight"))
    return {
        "spread": bool(shard < sum(tensor.numel() for tensor in got.values())),
        "same tensors": saved_again.result.keys() == left.keys(),
        "budget": {f"rank_budget/{slot}" for slot in ("importance", "uncertainty", "mask")} <= left.keys(),
        "bits": [name for name in left if not torch.equal(left[name], saved_again.result[name])] or True,
        # float32; Adam divides by small second moments, so reordered sums show in the last digits.
        "resumes": all(torch.allclose(got[name], tensor, rtol=5e-3, atol=5e-5) for name, tensor in want.items()),
    }


def without_random_states(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_in(folder).items() if not name[0].isdigit()}


def main(argv: list[str]) -> None:
    """Runs on each rank, in the folder `argv[0]`."""
    checkpoint_scenarios.main(argv, {"spread": spread})
