# SPDX-License-Identifier: Apache-2.0
"""Pure Python: `model.optim.lr_multipliers` is checked before a run, and a line says which rate each factor gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.adapter import lr_multipliers
from nemo_tied_lora.adapter.lr_multipliers import ByRank
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.base_config import adapter_section
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.nemo_model_config import recorded_config
from nemo_tied_lora.planning.preflight import check_finetuning, check_pretraining
from nemo_tied_lora.planning.settings.factor_rates import KEY, rate_lines, rate_problems, resolved_multipliers
from tests.harness.adapter_files import tiny_adapter

LR = "model.optim.lr=0.01"


def composed(*lines: str, command: str = "finetune") -> dict[str, Any]:
    return plain(compose_config(command, [LR, *lines]))


def lines_of(*lines: str) -> list[str]:
    cfg = composed(*lines)
    assert list(rate_problems(cfg, adapter=True)) == []
    return list(rate_lines(cfg, adapter_section(cfg["model"]["peft"])))


def problems_of(check: Any, cfg: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as refusal:  # there is neither a base nor data
        check(cfg)
    return [problem for problem in refusal.value.problems if problem.startswith(KEY)]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (f"{KEY}.B=0", [f"{KEY}.B=0: must be a finite number greater than 0", "leave it out of"]),
        (f"{KEY}.v=inf", [f"{KEY}.v=inf: must be"]),
        (f"{KEY}.u=fast", [f"{KEY}.u='fast': must be"]),
        (f"{KEY}={{b: 2}}", [f"{KEY}.b=2: b is no factor (did you mean B?); the factors are A, B, u, v"]),
        (f"{KEY}.a=2", [f"{KEY}.a=2: a is no factor (did you mean A?); the factors are A, B, u, v"]),
        (f"+{KEY}.R=2", [f"{KEY}.R=2: R is no factor; the factors are A, B, u, v"]),
    ],
)
def test_a_wrong_multiplier_is_refused_before_the_run(line: str, parts: list[str]) -> None:
    (problem,) = problems_of(check_finetuning, composed(line))
    assert all(part in problem for part in parts), problem
    assert "\n" not in problem


def test_all_wrong_multipliers_are_named_at_once() -> None:
    assert len(problems_of(check_finetuning, composed(f"{KEY}={{A: 0, b: 2, v: -1}}"))) == 3


def test_a_multiplier_without_an_adapter_is_refused() -> None:
    (problem,) = problems_of(check_pretraining, composed(f"{KEY}.B=4", command="pretrain"))
    assert problem == f"{KEY}.B=4: this run trains no adapter, so it has no factors; leave it out"
    assert problems_of(check_pretraining, composed(command="pretrain")) == []


def test_one_line_says_each_factors_rate_and_none_if_all_are_the_same() -> None:
    assert lines_of(f"{KEY}={{A: 1, B: 1, u: 1, v: 1}}") == lines_of("preset=lora") == []
    assert lines_of(f"{KEY}.B=2", f"{KEY}.u=0.5") == [
        f"model.optim.lr=0.01: with {KEY}, the factors have A 0.04, B 0.02, u 0.005, v 0.04"
    ]


def test_the_line_says_where_the_rates_come_from() -> None:
    for words in ([], [f"{KEY}=null"]):
        assert lines_of("model.peft.tied_lora.rank=32", *words) == [
            "model.optim.lr=0.01: with the preset's multipliers for rank 32, the factors have A 0.04, B 0.02, u 0.04, v 0.02"
        ]


def test_a_factor_that_is_not_trained_is_named_and_has_no_effect() -> None:
    """One mapping serves a sweep over presets."""
    every = f"{KEY}={{A: 1, B: 4, u: 1, v: 2}}"
    assert lines_of(every, "preset=lora") == [
        f"model.optim.lr=0.01: with {KEY}, the factors have A 0.01, B 0.04",
        f"{KEY}.u=1: has no effect, because u is not trained",
        f"{KEY}.v=2: has no effect, because v is not trained",
    ]


def test_a_presets_default_is_said_and_a_resumed_run_must_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lr_multipliers.DEFAULTS, "tl6", {"B": ByRank(2.0, -0.5)})
    (line,) = lines_of("model.peft.tied_lora.rank=128")
    assert line.endswith("the factors have A 0.01, B 0.005, u 0.01, v 0.01")
    (line,) = lines_of("model.peft.tied_lora.rank=2")
    assert line.endswith("the factors have A 0.01, B 0.04, u 0.01, v 0.01")
    cfg = composed(f"{KEY}.v=3")
    assert resolved_multipliers(cfg, adapter_section(cfg["model"]["peft"])) == {"v": 3.0, "B": 2.0}


def test_the_adapter_that_a_run_starts_from_gives_the_trained_factors(tmp_path: Path) -> None:
    config = recorded_config(tiny_adapter(tmp_path / "adapter.nemo", preset="vera", rank=3))
    assert (config.rank, config.trained) == (3, ("v", "u"))
    assert list(rate_lines(composed(f"{KEY}.v=4"), config)) == [
        f"model.optim.lr=0.01: with {KEY}, the factors have u 0.4, v 0.04"
    ]
