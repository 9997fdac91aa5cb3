# SPDX-License-Identifier: Apache-2.0
"""One process that has imported NeMo: each of NeMo's schedules scales the parameter groups, and resumes to the bit."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from nemo_tied_lora.planning.settings.lr_schedule import _SCHEDULES
from tests.harness.ranks import run_ranks

LR, STEPS, STOPPED = 0.01, 12, 5
MULTIPLIERS = (4.0, 1.0, 0.3)
OWN: dict[str, dict[str, Any]] = {
    "NoamAnnealing": {"d_model": 8},
    "NoamHoldAnnealing": {"hold_steps": 3},
    "WarmupHoldPolicy": {"hold_steps": 3},
    "PolynomialHoldDecayAnnealing": {"hold_steps": 3},
    "T5InverseSquareRootAnnealing": {"warmup_steps": None, "constant_steps": 3},
    "StepLR": {"step_size": 2, "gamma": 0.7, "warmup_steps": None, "min_lr": None},
    "CyclicLR": {
        "base_lr": LR / 5,
        "max_lr": LR,
        "step_size_up": 4,
        "cycle_momentum": False,
        "warmup_steps": None,
        "min_lr": None,
    },
    "CosineAnnealing with constant steps": {"constant_steps": 2},
}


def test_every_schedule_of_nemo_scales_each_group_and_resumes_to_the_bit() -> None:
    assert run_ranks(wrong_rates, [*_SCHEDULES, "CosineAnnealing with constant steps"], world_size=1) == [[]]


def test_without_the_multiplier_the_check_finds_every_schedule() -> None:
    (found,) = run_ranks(wrong_rates, ["CosineAnnealing", "StepLR"], False, world_size=1)
    assert {line.split(":")[0] for line in found} == {"CosineAnnealing", "StepLR"}


def wrong_rates(names: list[str], multiplied: bool = True) -> list[str]:
    """One line for each schedule whose rates are not the multiples of NeMo's own, or change when it resumes."""
    from nemo_tied_lora.nemo.learning_rates import scaled

    warnings.simplefilter("ignore")
    found = []
    for name in names:
        plain, ours = schedule(name, (1.0,)), schedule(name, MULTIPLIERS)
        if multiplied:
            scaled(ours)
        wanted, got = [], []
        for step in range(STEPS):
            if step == STOPPED and multiplied:  # as on another layout, where this rank has two groups
                state, ours = ours.state_dict(), scaled(schedule(name, MULTIPLIERS[:2]))
                ours.load_state_dict(state)
            wanted.append([plain.optimizer.param_groups[0]["lr"] * m for m in MULTIPLIERS])
            got.append([group["lr"] for group in ours.optimizer.param_groups])
            if step > 1 and got[-1] != ours.get_last_lr():
                found.append(f"{name}: step {step}: get_last_lr is {ours.get_last_lr()}")
            for each in (plain, ours):
                each.optimizer.step()
                each.step()
        wrong = [step for step in range(STEPS) if got[step] != wanted[step][: len(got[step])]]
        if wrong or len({tuple(rates) for rates in wanted}) < 3:
            found.append(f"{name}: steps {wrong}: {got} is not {wanted}")
    return found


def schedule(name: str, multipliers: tuple[float, ...]) -> Any:
    """NeMo's schedule on an optimizer with a group for each multiplier."""
    from nemo.core.optim.lr_scheduler import prepare_lr_scheduler

    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr_mult": multiplier} for multiplier in multipliers]
    kind = name.partition(" ")[0]
    fields = {"name": kind, "max_steps": STEPS - 2, "warmup_steps": 3, "min_lr": LR / 20, **OWN.get(name, {})}
    fields = {key: value for key, value in fields.items() if value is not None}
    made = prepare_lr_scheduler(torch.optim.SGD(groups, lr=LR), fields, None)
    assert made is not None, name
    return made["scheduler"]
