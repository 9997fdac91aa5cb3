# SPDX-License-Identifier: Apache-2.0
"""Trains the factors of a form, and measures the answers' loss. The recipe is the study's: docs/study.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from .batches import Pair, evaluation_batches
from .factors import Factors
from .llama import Apply, Batch, FrozenLlama, at_least_float32

__all__ = ["Recipe", "answer_losses", "learning_rate", "train"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a run trains: AdamW, linear warm-up and a cosine to 0, as NeMo's CosineAnnealing, gradients clipped."""

    learning_rate: float
    multipliers: Mapping[str, float]
    """Factor (A, B, u, R, v, V) to what its learning rate is multiplied with; 1 if it is missing."""
    steps: int
    warmup_steps: int
    weight_decay: float = 0.0
    clip: float = 1.0
    """The largest norm of the gradient of all factors together. 0: any."""
    betas: tuple[float, float] = (0.9, 0.98)


def learning_rate(recipe: Recipe, step: int) -> float:
    """The share of the learning rate at a step, counted from 0."""
    warm = recipe.warmup_steps
    if step <= warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (recipe.steps - warm)))


def train(
    model: FrozenLlama,
    factors: Factors,
    batches: Sequence[Batch],
    recipe: Recipe,
    before: Callable[[], None] = lambda: None,
) -> list[float]:
    """Trains one step on each batch. Returns the losses; the last one is not finite if the run diverged.

    Args:
        before: called before each step of the optimizer, when all gradients are there.
    """
    optimizer = _optimizer(factors, recipe)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = list(factors.trained.values())
    losses: list[float] = []
    for step, batch in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate(recipe, step)
        factors.prepare()
        loss = functional.cross_entropy(at_least_float32(model.answer_logits(batch, factors.apply)), batch.targets)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        before()
        optimizer.step()
    return losses


def answer_losses(
    model: FrozenLlama, apply: Apply, pairs: Sequence[Pair], marks: Sequence[Sequence[int]] | None = None
) -> tuple[list[tuple[float, int]], list[int]]:
    """Nats and tokens of each item's answer.

    Args:
        marks: of a choice task: for each item the place in its answer at which the endings differ, then the token that
            each ending has there.

    Returns:
        (nats, tokens) of each item, and the number of the ending whose token is likeliest (of a choice task).
    """
    losses: list[tuple[float, int]] = [(0.0, 0)] * len(pairs)
    chosen = [0] * len(pairs) if marks is not None else []
    with torch.no_grad():
        for numbers, batch in evaluation_batches(pairs):
            logits = model.answer_logits(batch, apply).float()
            each = functional.cross_entropy(logits, batch.targets, reduction="none").double()
            sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, batch.owners, each)
            begin = 0
            for number, nats in zip(numbers, sums.tolist(), strict=True):
                tokens = len(pairs[number][1])
                losses[number] = (nats, tokens)
                if marks is not None:
                    place, *endings = marks[number]
                    chosen[number] = int(logits[begin + place, list(endings)].argmax())
                begin += tokens
    return losses, chosen


def _optimizer(factors: Factors, recipe: Recipe) -> torch.optim.Optimizer:
    groups: dict[str, list[torch.Tensor]] = {}
    for (_, factor), tensor in factors.trained.items():
        groups.setdefault(factor, []).append(tensor)
    return torch.optim.AdamW(
        [
            {"params": tensors, "lr": recipe.learning_rate * recipe.multipliers.get(factor, 1.0)}
            for factor, tensors in groups.items()
        ],
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
