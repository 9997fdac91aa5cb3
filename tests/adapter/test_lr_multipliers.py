# SPDX-License-Identifier: Apache-2.0
"""Pure maths, then one process: the rate of each factor in torch's optimizers and Megatron's, on both releases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject
from nemo_tied_lora.adapter import lr_multipliers
from nemo_tied_lora.adapter.factor_names import FactorName
from nemo_tied_lora.adapter.lr_multipliers import ByRank, factor_multipliers, without_effect
from nemo_tied_lora.adapter.rate_groups import groups_by_multiplier
from nemo_tied_lora.config import FACTORS, PRESETS
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt, full_tensor

GIVEN = {"A": 0.5, "B": 2, "u": 1, "v": 4}
LR = 0.01


@pytest.mark.parametrize("preset", PRESETS)
def test_a_factor_without_a_multiplier_has_the_presets_default_at_the_rank(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lr_multipliers.DEFAULTS, preset, {"A": ByRank(0.5), "u": ByRank(3.0, -0.5)})
    config = TiedLoraConfig.preset(preset, rank=32, targets=["linear_qkv"])
    expected = {"v": 1.0, "B": 1.0, "u": 1.5, "A": 0.5}  # 3 (32 / 8)^-0.5
    assert factor_multipliers(config) == {factor: expected[factor] for factor in config.trained}
    assert factor_multipliers(config, {"A": None, "u": 7}) == {
        factor: {**expected, "u": 7.0}[factor] for factor in config.trained
    }


def test_the_default_is_that_of_the_fields_however_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lr_multipliers.DEFAULTS, "vera", {"v": ByRank(2.0)})
    assert factor_multipliers(TiedLoraConfig(trained=["u", "v"]))["v"] == 2.0
    assert factor_multipliers(TiedLoraConfig(trained=["v"]))["v"] == 1.0


def test_the_table_names_only_presets_and_the_factors_that_they_train() -> None:
    for preset, factors in lr_multipliers.DEFAULTS.items():
        assert set(factors) <= set(PRESETS[preset]["trained"]) <= set(FACTORS)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"a": 2}, ["lr_multipliers.a=2: a is no factor (did you mean A?)", "A, B, u, v"]),
        ({"lora_B": 2}, ["did you mean B?"]),
        ({"U": 2}, ["did you mean u?"]),
        ({"R": 2}, ["lr_multipliers.R=2: R is no factor; the factors are"]),
        *(({"B": value}, ["lr_multipliers.B=", "finite number greater than 0"]) for value in (0, -1, "4", True)),
        *(({"u": value}, ["leave it out of model.peft.tied_lora.trained"]) for value in (math.inf, math.nan)),
        ([1, 2], ["lr_multipliers=[1, 2]: must give a number for each factor"]),
    ],
)
def test_what_is_no_multiplier_is_refused_in_one_line(given: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        factor_multipliers(TiedLoraConfig(), given)
    (problem,) = refusal.value.problems
    assert all(part in problem for part in parts), problem


def test_all_problems_are_reported_together_and_a_factor_that_is_not_trained_is_named() -> None:
    with pytest.raises(ConfigError) as refusal:
        factor_multipliers(TiedLoraConfig(), {"a": 2, "B": 0, "x": 1})
    assert len(refusal.value.problems) == 3
    assert without_effect(TiedLoraConfig.preset("lora"), {"A": 1, "u": 2, "v": None}) == ["u"]


def adapted(**fields: Any) -> tuple[Any, Any]:
    single_process()
    model = build_gpt(num_layers=2, dtype=torch.float32)
    adapter = inject(model, TiedLoraConfig(rank=3, **fields))
    adapter.load_full_state({name: full_tensor(name, tuple(t.shape)) for name, t in adapter.full_state().items()})
    return model, adapter


def test_torchs_groups_hold_each_parameter_once_and_schedules_keep_their_ratio() -> None:
    _, adapter = adapted()
    groups = adapter.parameter_groups(LR, GIVEN)
    assert [(group["lr"], group["lr_mult"]) for group in groups] == [
        (0.04, 4.0),
        (0.02, 2.0),
        (0.01, 1.0),
        (0.005, 0.5),
    ]
    listed = [parameter for group in groups for parameter in group["params"]]
    assert len(listed) == len({id(parameter) for parameter in listed}) == len(list(adapter.parameters()))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    before = [parameter.detach().clone() for parameter in listed]
    for parameter in listed:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = iter(float((now - then).abs().max()) for now, then in zip(listed, before, strict=True))
    for group in groups:
        assert all(math.isclose(next(moved), group["lr"], rel_tol=1e-4) for _ in group["params"])
    schedule.step()
    assert [group["lr"] / group["lr_mult"] for group in optimizer.param_groups] == [
        optimizer.param_groups[2]["lr"]
    ] * 4


def test_factors_with_one_multiplier_share_a_group_and_a_stage_without_them_has_an_empty_one() -> None:
    _, adapter = adapted()
    same = adapter.parameter_groups(LR, dict.fromkeys(FACTORS, 2))
    assert [len(group["params"]) for group in same] == [len(list(adapter.parameters()))]
    tied = [(name, p) for name, p in adapter.named_parameters() if not name.startswith("layers.")]
    groups = groups_by_multiplier(tied, factor_multipliers(adapter.config, GIVEN))
    assert [(group["lr_mult"], bool(group["params"])) for group in groups] == [
        (4.0, False),
        (2.0, True),
        (1.0, False),
        (0.5, True),
    ]
    torch.optim.AdamW(groups, lr=LR).step()


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("given", [GIVEN, {"B": 2}, {}, {"A": 3, "B": 3}], ids=str)
def test_megatrons_groups_and_its_scheduler_scale_each_factor(distributed: bool, given: dict[str, float]) -> None:
    model, adapter = adapted()
    multipliers = factor_multipliers(adapter.config, given)
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), model
    )
    settings = {"optimizer": "adam", "lr": LR, "min_lr": LR / 10, "weight_decay": 0.1, "clip_grad": 0.0}
    config = OptimizerConfig(**settings, use_distributed_optimizer=distributed)
    optimizer = adapter.megatron_optimizer(config, [wrapped], given)
    # Adam's first step moves every element by its rate.
    before = adapter.full_state()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for parameter in adapter.parameters():
        parameter.main_grad.fill_(1.0)
    optimizer.step()
    rates = {name: float((before[name] - tensor).abs().max()) for name, tensor in adapter.full_state().items()}
    for name, rate in rates.items():
        assert math.isclose(rate, LR * multipliers[FactorName.parse(name).factor], rel_tol=1e-3), name

    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=LR,
        min_lr=LR / 10,
        lr_warmup_steps=4,
        lr_decay_steps=20,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=20,
        wd_incr_style="constant",
    )
    wanted = {round(multiplier, 9) for multiplier in multipliers.values()}
    for step, base in ((2, LR / 2), (2, LR), (16, LR / 10), (5, LR / 10)):
        scheduler.step(step)
        found = {group["lr"] / base for group in optimizer.param_groups}
        assert {round(ratio, 9) for ratio in found} == wanted
    # Checkpoints of Megatron tell groups apart by these.
    keys = [
        (g["wd_mult"], g["lr_mult"], g["is_expert_parallel"], g["is_decoupled_lr"]) for g in optimizer.param_groups
    ]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(("preset", "zero"), [("tl6", "v"), ("vera", "v"), ("lora", "B"), ("tl5", "B")])
def test_under_adam_alpha_is_a_multiplier_of_the_factor_that_starts_at_0(preset: str, zero: str) -> None:
    """float64, and a small epsilon: it is what Adam adds to the size of a gradient, which the scale changes."""
    plain = trained(preset, {zero: 2.0})
    for fields in ({"alpha": 6.0}, {"alpha": 2 * math.sqrt(3), "alpha_rule": "sqrt"}):
        scaled = trained(preset, {}, **fields)
        for name, tensor in plain.items():
            factor = 2.0 if name.endswith(f".{zero}") else 1.0
            assert torch.allclose(scaled[name] * factor, tensor, rtol=1e-6, atol=1e-9), name
    name = "linear_qkv.B" if preset == "tl5" else f"layers.1.linear_qkv.{zero}"
    assert not torch.allclose(trained(preset, {})[name], plain[name], rtol=1e-3)


def trained(preset: str, multipliers: dict[str, float], **fields: Any) -> dict[str, torch.Tensor]:
    """The adapter after three steps from its own start, where the zero factor is 0."""
    single_process()
    model = build_gpt(num_layers=2)
    adapter = inject(model, TiedLoraConfig.preset(preset, rank=3, targets=["linear_qkv"], **fields))
    groups = adapter.parameter_groups(LR, {**dict.fromkeys(FACTORS, 1.0), **multipliers})
    optimizer = torch.optim.AdamW(groups, eps=1e-14, weight_decay=0.0)
    tokens = torch.arange(2 * SEQUENCE).view(2, SEQUENCE) % VOCAB
    positions = torch.arange(SEQUENCE).expand(2, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean().backward()
        optimizer.step()
    return adapter.full_state()
