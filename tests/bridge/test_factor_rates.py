# SPDX-License-Identifier: Apache-2.0
"""One process: each factor's learning rate in the optimizer and scheduler that Bridge sets up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.bridge.training.config import OptimizerConfigOverrideProvider, SchedulerConfig
from megatron.bridge.training.optim import setup_optimizer
from megatron.core.optimizer import OptimizerConfig

from nemo_tied_lora import ConfigError, TiedLoraConfig
from nemo_tied_lora.adapter.lr_multipliers import factor_multipliers
from nemo_tied_lora.bridge import FactorRates, TiedLoRA
from tests.bridge.bridge_model import build, fill_base, train
from tests.harness.ranks import single_process

RATE, LEAST = 1e-2, 1e-3


def rates(provider: OptimizerConfigOverrideProvider, steps: int) -> dict[str, set[float]]:
    """Each factor's rates, after so many steps of Bridge's scheduler."""
    peft = TiedLoRA(rank=3)
    model = build(fill_base, peft)
    options = OptimizerConfig(optimizer="adam", lr=RATE, min_lr=LEAST, weight_decay=0.0)
    schedule = SchedulerConfig(lr_warmup_iters=2, lr_decay_iters=4, lr_decay_style="linear")
    schedule.lr_warmup_steps, schedule.lr_decay_steps, schedule.wd_incr_steps = 2, 4, 4
    schedule.start_weight_decay = schedule.end_weight_decay = 0.0
    optimizer, scheduler = setup_optimizer(
        options, schedule, model, optimizer_config_override_provider=provider, use_gloo_process_groups=True
    )
    train(model, optimizer, 1)
    for _ in range(steps):
        scheduler.step(1)
    names = {parameter: name.rpartition(".")[2] for name, parameter in peft.adapter.named_parameters()}
    found: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found.setdefault(names[parameter], set()).add(group["lr"])
    return found


@pytest.fixture(autouse=True)
def one_rank() -> None:
    single_process()


@pytest.mark.parametrize(("steps", "rate"), [(1, RATE / 2), (2, RATE), (4, LEAST)], ids=["warm-up", "peak", "end"])
def test_a_multiplier_scales_the_warm_up_the_peak_and_the_least_rate(steps: int, rate: float) -> None:
    found = rates(FactorRates({"A": 1.0, "B": 4.0, "u": 0.5, "v": 1.0}), steps)
    assert all(len(values) == 1 for values in found.values())
    expected = {"A": rate, "B": 4 * rate, "u": rate / 2, "v": rate}
    assert {factor: values.pop() for factor, values in found.items()} == pytest.approx(expected)


def test_a_factor_without_a_multiplier_has_its_presets() -> None:
    found = rates(FactorRates({"B": 1.0}), 2)
    expected = {name: RATE * m for name, m in factor_multipliers(TiedLoraConfig(rank=3), {"B": 1.0}).items()}
    assert {factor: values.pop() for factor, values in found.items()} == pytest.approx(expected)


def test_bridges_own_provider_gives_one_rate() -> None:
    assert len(set.union(*rates(OptimizerConfigOverrideProvider(), 2).values())) == 1


def test_wrong_multipliers_are_refused_when_they_are_written() -> None:
    with pytest.raises(ConfigError, match=r"lr_multipliers\.b=4: b is no factor .*did you mean B"):
        FactorRates({"b": 4})
    with pytest.raises(ConfigError, match=r"lr_multipliers\.A=0: must be a finite number greater than 0"):
        FactorRates({"A": 0})


def test_a_model_without_an_adapter_is_refused() -> None:
    context = SimpleNamespace(model=build(fill_base), optimizer_config=OptimizerConfig(lr=RATE))
    with pytest.raises(ConfigError, match=r"the model has no adapter; set cfg\.peft = TiedLoRA"):
        FactorRates().build_config_overrides(context)
