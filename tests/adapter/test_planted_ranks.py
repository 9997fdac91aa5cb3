# SPDX-License-Identifier: Apache-2.0
"""Layers that need different ranks are learned by a tied adapter with a rank budget: it finds each layer's rank. One process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_tied_lora import TiedLoraConfig
from nemo_tied_lora.adapter.rank_budget.pruning import RankPruning
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.tied_factors import ChunkFactors
from nemo_tied_lora.adapter.tied_linear import LinearAdapter
from tests.harness.ranks import single_process

CPU = torch.device("cpu")
PLANTED, LAYERS, WIDTH, STEPS = (0, 1, 1, 2, 3, 5, 6, 6), 8, 24, 600


def planted(seed: int, *, returns: bool = True) -> tuple[int, float, int]:
    """Layers that truly use 0 to 6 of 8 shared directions are learned by a tied adapter of rank 12.

    Returns:
        The sum over the layers of |found rank - planted rank|; the relative error of the layers' updates; the directions
        that at least one layer keeps.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.tensor(PLANTED)[torch.randperm(LAYERS, generator=generator)]
    true_A, true_B = (torch.linalg.qr(torch.randn(WIDTH, 8, generator=generator))[0] for _ in "AB")
    truth = torch.zeros(LAYERS, WIDTH, WIDTH)
    for layer, rank in enumerate(ranks.tolist()):
        used, sizes = torch.randperm(8, generator=generator)[:rank], torch.rand(rank, generator=generator) + 0.7
        signs = torch.randint(0, 2, (rank,), generator=generator) * 2 - 1
        truth[layer] = (true_B[:, used] * sizes * signs) @ true_A[:, used].t()
    shapes = {"linear_qkv": LinearShape("column", WIDTH, WIDTH, 1, tuple(range(LAYERS)))}
    config = TiedLoraConfig(
        rank=12,
        targets=["linear_qkv"],
        trained=["B", "u", "A"],
        seed=seed,
        init_u=0,
        init_A="normal",
        init_B="normal",
        init_std=WIDTH**-0.5,
        rank_budget={"target_rank": sum(PLANTED) / LAYERS, "start_step": 100, "final_step": 400, "every": 5},
    )
    options: dict[str, Any] = {"tp_rank": 0, "tp_size": 1, "device": CPU, "dtype": torch.float32}
    factors = ChunkFactors(config, shapes, {"linear_qkv": list(range(LAYERS))}, **options)
    linears = [
        LinearAdapter(config, "column", factors.tied("linear_qkv"), factors.of_layer(i, "linear_qkv"), 1, False)
        for i in range(LAYERS)
    ]
    pruning, optimizer = RankPruning(config, shapes, [factors]), torch.optim.Adam(factors.parameters(), lr=2e-2)
    if not returns:
        pruning._returns = pruning._importance._returns = False
    pruning.follow(optimizer, STEPS)

    def updates() -> torch.Tensor:
        return torch.stack([B @ A for A, _, B in (linear.folded(torch.float32) for linear in linears)])

    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 2e-2 * min(1, 2 * (STEPS - step) / STEPS)
        x = torch.randn(LAYERS, 64, WIDTH, generator=generator)
        noise = 0.05 * torch.randn(LAYERS, 64, WIDTH, generator=generator)
        optimizer.zero_grad()
        (x @ (truth - updates()).transpose(1, 2) + noise).square().mean().backward()
        optimizer.step()
    masks = torch.stack(list(pruning.masks().values()))
    error = (updates() - truth).norm() / truth.norm()
    return int((masks.sum(1) - ranks).abs().sum()), float(error.detach()), int(masks.any(0).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_ranks_are_found_again(seed: int) -> None:
    """46 of the seeds 0 to 59 find them all. The others end with 2 to 6 wrong ranks in all."""
    single_process()
    wrong, error, directions = planted(seed)
    assert wrong == 0
    assert error < 0.02
    assert directions <= 9


def test_if_pruned_entries_could_not_return_planted_ranks_would_be_missed() -> None:
    """The negative control, and the reason for the gradient of pruned entries."""
    single_process()
    wrong, error, _ = planted(2, returns=False)
    assert wrong > 0
    assert error > 0.05
