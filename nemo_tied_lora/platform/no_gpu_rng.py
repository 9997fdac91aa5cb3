# SPDX-License-Identifier: Apache-2.0
"""Megatron's random states without a GPU: torch's default CPU generator takes the place of the GPU's.

The named states keep their meaning: ``model-parallel-rng`` differs between tensor-parallel ranks, and the default state
is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["fork", "get_state", "seed_cpu", "set_state"]


def get_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    """Returns the default generator's state. Ignores the arguments for a GPU (device, clone, graph_safe)."""
    return torch.get_rng_state()


def set_state(new_state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    """Sets the default generator's state."""
    torch.set_rng_state(new_state)


def seed_cpu(seed: int) -> None:
    """Seeds only the default generator, as ``torch.cuda.manual_seed`` seeds only one GPU."""
    torch.default_generator.manual_seed(seed)


@contextmanager
def fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Draws from the tracker's state ``name`` inside the context, and restores the default state after it.

    Raises:
        KeyError: the state was never seeded.
    """
    if name not in tracker.states_:
        raise KeyError(f"the random state {name!r} was never seeded: call model_parallel_cuda_manual_seed(seed) first")
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)
