# SPDX-License-Identifier: Apache-2.0
"""Pure maths, no torch: what a configuration means, what it refuses, and the paper's parameter counts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest

from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.param_count import factor_numel, parameter_counts
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import FACTORS, INIT_METHODS, PRESETS, TARGETS, RankBudget, TiedLoraConfig
from nemo_tied_lora.errors import ConfigError

SUBSETS = [c for n in range(5) for c in itertools.combinations("vBuA", n)]
TIES = [(), ("A",), ("B",), ("A", "B")]
LLAMA2_7B_QKV = LinearShape("column", 4096, 3 * 4096, 1, tuple(range(32)))

# paper.md's table: (model, rank) to LoRA, TL6, TL5, VeRA.
PAPER = [
    (4096, 32, 2, (1_048_576, 426_048, 32_768, 393_280)),
    (4096, 32, 8, (4_194_304, 524_544, 131_072, 393_472)),
    (4096, 32, 32, (16_777_216, 918_528, 524_288, 394_240)),
    (4096, 32, 128, (67_108_864, 2_494_464, 2_097_152, 397_312)),
    (2048, 24, 8, (1_572_864, 213_184, 65_536, 147_648)),
]


def problems_of(**values: Any) -> tuple[str, ...]:
    """The problems that the class reports; empty if it accepts the values."""
    try:
        TiedLoraConfig(**values)
    except ConfigError as error:
        return error.problems
    return ()


def problems_of_mapping(mapping: Mapping[str, Any]) -> tuple[str, ...]:
    """The problems that `from_mapping` reports."""
    try:
        TiedLoraConfig.from_mapping(mapping)
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("tied", TIES, ids=lambda tied: "tied" + "".join(tied))
@pytest.mark.parametrize("trained", SUBSETS, ids=lambda trained: "".join(trained) or "nothing")
def test_counts_of_every_combination_equal_the_formula(trained: tuple[str, ...], tied: tuple[str, ...]) -> None:
    if not trained:
        assert problems_of(trained=trained, tied=tied) == (
            "trained=[]: nothing would be trained; name at least one of v, B, u, A",
        )
        return
    config = TiedLoraConfig(rank=3, trained=trained, tied=tied)
    shapes = {
        "linear_qkv": LinearShape("column", 10, 14, 1, tuple(range(5))),
        "linear_fc2": LinearShape("row", 40, 10, 1, tuple(range(5))),
    }
    for target, (inputs, outputs) in {"linear_qkv": (10, 14), "linear_fc2": (40, 10)}.items():
        trains, stores = 0, 0
        for factor, numel in (("A", 3 * inputs), ("B", outputs * 3), ("u", 3), ("v", outputs)):
            total = numel if factor in tied else 5 * numel
            trains += total if factor in trained else 0
            stores += total if factor in trained or factor in "AB" else 0
        assert parameter_counts(shapes, config)[target] == trains
        stored = expected_shapes(config, {target: shapes[target]})
        assert sum(math.prod(shape) for shape in stored.values()) == stores


@pytest.mark.parametrize("tied", TIES)
@pytest.mark.parametrize("trained", [s for s in SUBSETS if s])
def test_every_combination_starts_with_exactly_one_trained_factor_at_zero(
    trained: tuple[str, ...], tied: tuple[str, ...]
) -> None:
    config = TiedLoraConfig(trained=trained, tied=tied)
    at_zero = [factor for factor in FACTORS if config.init_of(factor) in ("zero", 0.0)]
    assert at_zero == [next(factor for factor in ("v", "B", "u", "A") if factor in trained)] == [config.zero_factor]
    for factor in "uv":
        assert config.init_of(factor) == (0.0 if factor in at_zero else 1.0)
    for factor in "AB":
        assert config.init_of(factor) == ("zero" if factor in at_zero else "xavier")


@pytest.mark.parametrize(("hidden", "layers", "rank", "counts"), PAPER)
def test_presets_reproduce_the_papers_table(hidden: int, layers: int, rank: int, counts: tuple[int, ...]) -> None:
    shapes = {"linear_qkv": LinearShape("column", hidden, 3 * hidden, 1, tuple(range(layers)))}
    for name, expected in zip(("lora", "tl6", "tl5", "vera"), counts, strict=True):
        config = TiedLoraConfig.preset(name, rank=rank, targets=["linear_qkv"])
        assert sum(parameter_counts(shapes, config).values()) == expected, name


def test_tl6_at_rank_256_is_the_papers_4_60_million() -> None:
    config = TiedLoraConfig.preset("tl6", rank=256, targets=["linear_qkv"])
    assert parameter_counts({"linear_qkv": LLAMA2_7B_QKV}, config) == {"linear_qkv": 4_595_712}


def test_counting_skips_targets_that_are_not_selected_or_not_in_the_model() -> None:
    shapes = {"linear_qkv": LLAMA2_7B_QKV, "linear_proj": LinearShape("row", 4096, 4096, 1, tuple(range(32)))}
    assert list(parameter_counts(shapes, TiedLoraConfig(targets=("linear_proj", "linear_fc1")))) == ["linear_proj"]


def test_tying_shares_a_factor_over_all_layers_and_u_v_are_never_shared() -> None:
    config = TiedLoraConfig(rank=8, tied=("A",))
    numel = {factor: factor_numel(factor, LLAMA2_7B_QKV, config) for factor in FACTORS}
    assert numel == {"A": 8 * 4096, "B": 32 * 12288 * 8, "u": 32 * 8, "v": 32 * 12288}


def test_the_default_is_tl6_with_alpha_equal_to_rank() -> None:
    config = TiedLoraConfig()
    assert config == TiedLoraConfig.preset("tl6") == TiedLoraConfig.from_mapping({})
    assert (config.trained, config.tied, config.targets, config.layers) == (FACTORS, ("A", "B"), TARGETS, None)
    assert config.scale == 1.0
    assert TiedLoraConfig(rank=4, alpha=8).scale == 2.0


def test_alpha_rule_sqrt_divides_alpha_by_the_square_root_of_the_rank() -> None:
    config = TiedLoraConfig(rank=16, alpha=8, alpha_rule="sqrt")
    assert (config.scale, config.alpha_by_rank) == (2.0, 32.0)
    for rank in (1, 3, 128):
        config = TiedLoraConfig(rank=rank, alpha=6, alpha_rule="sqrt")
        assert config.scale == 6 / math.sqrt(rank)
        assert math.isclose(TiedLoraConfig(rank=rank, alpha=config.alpha_by_rank).scale, config.scale)
    assert (TiedLoraConfig(rank=5).alpha_by_rank, TiedLoraConfig(rank=5, alpha=3).alpha_by_rank) == (5, 3)


@pytest.mark.parametrize(
    ("name", "trained", "tied"),
    [
        ("lora", ("B", "A"), ()),
        ("vera", ("v", "u"), ("A", "B")),
        ("tl5", ("B", "A"), ("A", "B")),
        ("tl6", ("v", "B", "u", "A"), ("A", "B")),
        ("adalora", ("B", "u", "A"), ()),
    ],
)
def test_presets_mean_what_the_paper_says(name: str, trained: tuple[str, ...], tied: tuple[str, ...]) -> None:
    config = TiedLoraConfig.preset(name, rank=2)
    assert (config.trained, config.tied, config.rank) == (trained, tied, 2)


def test_a_preset_can_be_overridden() -> None:
    config = TiedLoraConfig.preset("tl6", tied=["A"], trained=["A", "B"])
    assert (config.trained, config.tied) == (("B", "A"), ("A",))
    assert set(PRESETS) == {"lora", "vera", "tl5", "tl6", "adalora"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["attention_qkv"], ("linear_qkv",)),
        (["attention_dense"], ("linear_proj",)),
        (["mlp_fc1"], ("linear_fc1",)),
        (["mlp_fc2"], ("linear_fc2",)),
        (["attention"], ("linear_qkv", "linear_proj")),
        (["mlp"], ("linear_fc1", "linear_fc2")),
        (["all"], TARGETS),
        ("all", TARGETS),
        (["mlp_fc1", "attention", "linear_qkv"], ("linear_qkv", "linear_proj", "linear_fc1")),
    ],
)
def test_nemos_target_names_are_translated(given: Any, expected: tuple[str, ...]) -> None:
    assert TiedLoraConfig(targets=given).targets == expected


def test_lists_are_sorted_without_repetitions() -> None:
    given = {"trained": ["A", "u", "A"], "tied": ["B", "A"], "layers": [3, 1, 3], "targets": ["mlp", "mlp_fc1"]}
    config = TiedLoraConfig(**given)  # type: ignore[arg-type]
    assert (config.trained, config.tied) == (("u", "A"), ("A", "B"))
    assert (config.layers, config.targets) == ((1, 3), ("linear_fc1", "linear_fc2"))


@pytest.mark.parametrize(
    "config",
    [
        TiedLoraConfig(),
        TiedLoraConfig.preset("lora", rank=5, alpha=2.5, dropout=0.1, layers=[0, 2], seed=7),
        TiedLoraConfig(tied=(), trained=("A",), init_B="xavier", init_std=0.5, targets=("mlp",)),
        TiedLoraConfig(init_v=1, init_B="zero", init_u=0.5, init_A="normal"),
        TiedLoraConfig(alpha=16, alpha_rule="sqrt"),
        TiedLoraConfig(rank_budget={"target_rank": 2.5, "every": 3}),
        TiedLoraConfig.preset("adalora", rank=6),
    ],
)
def test_as_dict_and_from_mapping_are_inverse(config: TiedLoraConfig) -> None:
    values = config.as_dict()
    assert TiedLoraConfig.from_mapping(values) == config
    assert not any(isinstance(value, tuple) for value in values.values())


def test_null_means_the_default() -> None:
    assert TiedLoraConfig.from_mapping({"preset": None, "rank": None, "tied": None, "adapter_dim": None}) == (
        TiedLoraConfig()
    )


def test_the_configuration_cannot_be_changed_and_takes_keywords_only() -> None:
    with pytest.raises(AttributeError):
        TiedLoraConfig().rank = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        TiedLoraConfig(8)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "field", "reason"),
    [
        ({"rank": 0}, "rank=0", "at least 1"),
        ({"rank": -3}, "rank=-3", "at least 1"),
        ({"rank": 2.0}, "rank=2.0", "whole number"),
        ({"rank": True}, "rank=True", "whole number"),
        ({"rank": "8"}, "rank='8'", "whole number"),
        ({"alpha": 0}, "alpha=0", "switch the adapter off"),
        ({"alpha": math.nan}, "alpha=nan", "finite"),
        ({"alpha": math.inf}, "alpha=inf", "finite"),
        ({"alpha": "8"}, "alpha='8'", "finite"),
        ({"alpha_rule": "sqrt"}, "alpha_rule=sqrt", "needs alpha"),
        ({"alpha_rule": "rslora", "alpha": 8}, "alpha_rule='rslora'", "choose one of rank, sqrt"),
        ({"dropout": 1.0}, "dropout=1.0", "[0, 1)"),
        ({"dropout": -0.1}, "dropout=-0.1", "[0, 1)"),
        ({"dropout": math.nan}, "dropout=nan", "[0, 1)"),
        ({"init_std": 0}, "init_std=0", "greater than 0"),
        ({"init_std": math.nan}, "init_std=nan", "greater than 0"),
        ({"seed": -1}, "seed=-1", "at least 0"),
        ({"seed": 1.5}, "seed=1.5", "whole number"),
        ({"targets": []}, "targets=[]", "nothing would be adapted"),
        ({"targets": ["linear_q"]}, "targets: 'linear_q'", "did you mean linear_q"),
        ({"targets": 3}, "targets: 3", "choose from"),
        ({"trained": []}, "trained=[]", "nothing would be trained"),
        ({"trained": ["w"]}, "trained: 'w'", "choose from v, B, u, A"),
        ({"tied": ["u"]}, "tied: 'u'", "choose from A, B"),
        ({"tied": True}, "tied=True", "must be a list drawn from A, B"),
        ({"layers": []}, "layers=()", "non-empty"),
        ({"layers": [-1, 2]}, "layers: [-1]", "counted from 0"),
        ({"layers": [1.5, True]}, "layers: [1.5, True]", "counted from 0"),
        ({"init_A": "zeros"}, "init_A='zeros'", "choose one of normal, xavier, kaiming, zero"),
        ({"init_B": "ones"}, "init_B='ones'", "choose one of"),
        ({"init_u": math.nan}, "init_u=nan", "finite"),
        ({"init_v": "0"}, "init_v='0'", "finite"),
        ({"init_u": 2, "trained": ["A", "B"]}, "init_u=2", "add u to trained"),
        ({"init_v": 0, "trained": ["A", "B"]}, "init_v=0", "add v to trained"),
    ],
)
def test_a_bad_value_is_named_with_its_bound(values: dict[str, Any], field: str, reason: str) -> None:
    problems = problems_of(**values)
    assert len(problems) == 1
    assert problems[0].startswith(field)
    assert reason in problems[0]


@pytest.mark.parametrize(
    ("values", "field", "reason"),
    [
        ({"init_v": 1}, "init_v=1", "would not start at 0"),
        ({"trained": ["B", "A"], "init_B": "normal"}, "init_B='normal'", "would not start at 0"),
        ({"init_A": "zero"}, "init", "v and A"),
        ({"init_B": "zero", "init_u": 0}, "init", "v and B and u"),
        ({"trained": ["u", "v"], "init_A": "zero", "init_v": 1}, "init_A", "frozen at 0"),
        ({"trained": ["A"], "init_B": "zero", "init_A": "normal"}, "init_B", "frozen at 0"),
    ],
)
def test_an_update_that_does_not_start_at_zero_or_cannot_leave_it_is_refused(
    values: dict[str, Any], field: str, reason: str
) -> None:
    problems = problems_of(**values)
    assert len(problems) == 1
    assert problems[0].startswith(field)
    assert reason in problems[0]


def test_adaloras_start_is_its_papers_lambda_of_zero_with_a_budget_of_two_thirds() -> None:
    config = TiedLoraConfig.preset("adalora", rank=12)
    assert [config.init_of(factor) for factor in ("B", "u", "A")] == ["normal", 0, "normal"]
    assert config.budget == RankBudget(target_rank=8)
    chosen = TiedLoraConfig.preset("adalora", rank=12, rank_budget={"target_rank": 3, "start_step": None, "every": 5})
    assert chosen.budget == RankBudget(target_rank=3, every=5)
    assert TiedLoraConfig.preset("adalora", rank=12, rank_budget={"every": 5}).budget == RankBudget(
        target_rank=8, every=5
    )


def test_a_budget_of_nulls_is_none() -> None:
    keys = [field.name for field in dataclasses.fields(RankBudget)]
    assert TiedLoraConfig.from_mapping({"rank_budget": dict.fromkeys(keys)}).budget is None


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        ({"target_rank": 9}, "rank_budget.target_rank=9: more than rank=8"),
        ({"target_rank": 0.5}, "rank_budget.target_rank=0.5: must be a number of at least 1"),
        ({"target_rank": math.nan}, "rank_budget.target_rank=nan: must be a number"),
        ({"target_rank": "4"}, "rank_budget.target_rank='4': must be a number"),
        (
            {"target_rank": 2, "start_step": 0},
            "rank_budget.start_step=0: must be a whole number of at least 1; in the first",
        ),
        (
            {"target_rank": 2, "start_step": 9, "final_step": 9},
            "rank_budget.final_step=9: must be a whole number of at least 10",
        ),
        ({"target_rank": 2, "final_step": 1}, "rank_budget.final_step=1: must be a whole number of at least 2"),
        ({"target_rank": 2, "every": 0}, "rank_budget.every=0: must be a whole number of at least 1"),
        ({"every": 5}, "rank_budget.target_rank: missing; name the mean rank"),
        ({"target_r": 5}, "rank_budget.target_r: not a key of rank_budget; choose from target_rank, start_step"),
        (4, "rank_budget=4: must be a section of keys"),
    ],
)
def test_a_bad_budget_is_named_with_its_bound(budget: Any, problem: str) -> None:
    found = problems_of(rank_budget=budget)
    assert [line.startswith(problem) for line in found] == [True], found


def test_a_budget_needs_a_trained_u() -> None:
    (problem,) = problems_of_mapping({"preset": "tl5", "rank_budget": {"target_rank": 2}})
    assert problem.startswith("rank_budget: prunes entries of u, and trained=[B, A] has no u; add it")


def test_another_factor_may_be_the_one_at_zero() -> None:
    config = TiedLoraConfig(init_v=1, init_B="zero")
    assert [config.init_of(factor) for factor in FACTORS] == [1, "zero", 1.0, "xavier"]
    for method in INIT_METHODS[:3]:
        assert TiedLoraConfig(init_A=method, init_B=method).init_of("A") == method


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("adapter_dim", "write rank"),
        ("r", "write rank"),
        ("dim", "write rank"),
        ("lora_alpha", "write alpha"),
        ("use_rslora", "write alpha_rule: sqrt"),
        ("adapter_dropout", "write dropout"),
        ("lora_dropout", "write dropout"),
        ("target_modules", "write targets"),
        ("layer_selection", "counts from 0"),
        ("layers_to_transform", "write layers"),
        ("column_init_method", "write init_A"),
        ("row_init_method", "write init_B"),
        ("dropout_position", "remove it"),
        ("position_embedding_strategy", "remove it"),
        ("weight_tying", "tied: [A, B]"),
        ("rnk", "did you mean rank?"),
        ("something", "the keys are preset, alpha"),
    ],
)
def test_an_unknown_key_is_refused_with_the_right_one(key: str, advice: str) -> None:
    (problem,) = problems_of_mapping({key: True})
    assert problem.startswith(f"{key}=True: not a key of tied_lora")
    assert advice in problem


def test_nemos_weight_tying_may_stay_if_it_is_off() -> None:
    assert TiedLoraConfig.from_mapping({"weight_tying": False}) == TiedLoraConfig()


@pytest.mark.parametrize("preset", ["tl7", "TL6", "", ["tl6"], 6])
def test_an_unknown_preset_is_refused_with_the_choices(preset: object) -> None:
    (problem,) = problems_of_mapping({"preset": preset})
    assert problem == f"preset={preset!r}: unknown; choose one of lora, vera, tl5, tl6, adalora"


def test_all_problems_are_reported_together() -> None:
    problems = problems_of_mapping(
        {"preset": "tl9", "adapter_dim": 8, "rank": 0, "alpha": 0, "dropout": math.nan, "targets": [], "layers": [-1]}
    )
    assert [problem.split("=")[0].split(":")[0] for problem in problems] == [
        *("preset", "adapter_dim", "rank", "alpha", "dropout", "targets", "layers")
    ]


def test_the_error_is_a_value_error_with_a_line_for_each_problem() -> None:
    with pytest.raises(ValueError, match="rank=0") as caught:
        TiedLoraConfig(rank=0, alpha=0)
    assert str(caught.value).count("\n") == 1
