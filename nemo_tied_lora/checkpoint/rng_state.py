# SPDX-License-Identifier: Apache-2.0
"""Captures and restores this rank's random states: torch, the GPU, NumPy, Python, and Megatron's tracker (dropout)."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

__all__ = ["capture", "restore"]

_TRACKED = "megatron."


def capture(device: torch.device) -> dict[str, torch.Tensor]:
    """Returns every generator's state as a tensor on the CPU. `device`: the model's."""
    _, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    version, numbers, next_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy.asarray(keys, dtype=numpy.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python.gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[_TRACKED + name] = state.get_state() if isinstance(state, torch.Generator) else state
    return states


def restore(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Sets every generator to the state that `capture` returned."""
    torch.set_rng_state(states["torch"])
    position, has_gauss = states["numpy.position"].tolist()
    numpy.random.set_state(
        ("MT19937", states["numpy"].numpy().astype(numpy.uint32), position, has_gauss, states["numpy.gauss"].item())
    )
    version, *numbers = states["python"].tolist()
    random.setstate((version, tuple(numbers), next(iter(states["python.gauss"].tolist()), None)))
    if "device" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
    tracker = get_cuda_rng_tracker()
    tracked = dict(tracker.get_states())
    for name, state in states.items():
        if not name.startswith(_TRACKED):
            continue
        current = tracked.get(name.removeprefix(_TRACKED))
        if isinstance(current, torch.Generator):
            current.set_state(state)
        else:
            tracked[name.removeprefix(_TRACKED)] = state
    tracker.set_states(tracked)
