# SPDX-License-Identifier: Apache-2.0
"""A study's plan: its YAML is checked whole, keys follow settings, and the sweep decides by its rule. Pure Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.commands import compare
from nemo_tied_lora.commands.study.cells import FINAL, SWEEP, base_cell, method_cell
from nemo_tied_lora.commands.study.listing import listing
from nemo_tied_lora.commands.study.plan import BASE, Study, left_out_pairs
from nemo_tied_lora.commands.study.rates import choose_rate, headroom, tasks_of
from nemo_tied_lora.commands.study.results import Results, read_results
from nemo_tied_lora.commands.study.schedule import schedule
from nemo_tied_lora.commands.study.task_files import check_tasks
from nemo_tied_lora.commands.study.time_left import seconds_left
from nemo_tied_lora.config import PRESETS
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from tests.harness.paths import ROOT
from tests.harness.study_results import BEST_RATES, study_values, write_all, write_some

Values = dict[str, Any]


@pytest.fixture
def values(tmp_path: Path) -> Values:
    """The values of a small study."""
    return study_values(tmp_path)


@pytest.fixture
def study(values: Values) -> Study:
    """A small study."""
    return Study.from_config(values)


def shipped(name: str) -> Study:
    """A study of the project."""
    return Study.from_config(plain(compose_config("compare", [f"study={name}"])))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_method_may_have_any_preset(values: Values, preset: str, tmp_path: Path) -> None:
    values["methods"]["another"] = {"preset": preset, "rank": 4, "seeds": 1, "rates": [0.01]}
    study = Study.from_config(values)
    assert f"{study.title_of('another')} " in listing(study, read_results(Path(study.results)), lambda _: tmp_path, 1)


def test_the_study_of_the_paper_has_what_the_claim_needs() -> None:
    study = shipped("paper_claim")
    assert [task.name for task in study.tasks] == [
        "translate_wesnoth_en_de",
        "qa_debian_which_package",
        "summarise_debian",
        "nli_wordnet_senses",
        "math_gsm_symbolic",
    ]
    seeds = {m.name: (m.preset, m.rank, m.targets, m.seeds) for m in study.methods if m.tasks is None}
    assert seeds == {
        "lora": ("lora", 8, None, 3),
        "tl6": ("tl6", 8, None, 3),
        "lora_r1": ("lora", 1, None, 3),
        "tl5": ("tl5", 8, None, 2),
        "vera": ("vera", 8, None, 2),
    }
    few = {(m.preset, m.rank, m.targets) for m in study.methods if m.wants_headroom}
    qkv = ("linear_qkv",)
    assert few == {
        ("lora", 2, None),
        ("tl6", 2, None),
        ("lora", 32, None),
        ("tl6", 32, None),
        ("lora", 8, qkv),
        ("tl6", 8, qkv),
    }
    assert (study.claim.points, study.claim.share_of_gain, study.claim.headroom_tasks) == (1.0, 0.02, 2)
    assert all(400 <= (task.items or 0) <= 1000 for task in study.tasks)


def test_all_problems_of_a_study_are_reported_together(values: Values) -> None:
    values["methods"]["lora"]["preset"] = "dora"
    values["methods"]["tl6"] |= {"rates": [0.03, 0.02], "seeds": 0, "colour": "red", "targets": ["linear_kqv"]}
    values["methods"]["lora_r1"]["rates_of"] = "lora"
    values["methods"]["tl6_r2"]["tasks"] = ["speling"]
    values["methods"]["base"] = {"preset": "lora", "rank": 8, "seeds": 1, "rates": [0.01]}
    del values["tasks"]["spelling"]["primary"]
    values["claim"] |= {"rival": "lora_r3", "points": -1}
    values["sweep"]["steps"] = 2.5
    values["resamples"] = 7
    with pytest.raises(ConfigError) as refused:
        Study.from_config(values)
    text = str(refused.value)
    for part in (
        "methods.lora.preset='dora': unknown; choose one of lora, vera, tl5, tl6, adalora",
        "methods.tl6.rates=[0.03, 0.02]: must ascend",
        "methods.tl6.seeds=0: must be a whole number of at least 1",
        "methods.tl6.colour: not a key of methods.tl6; choose from preset, rank",
        "methods.tl6.targets: 'linear_kqv' is unknown; choose from linear_qkv",
        "methods.lora_r1: needs rates, or rates_of with the name of another method, and not both",
        "methods.base: the base is always compared; use another name",
        "tasks.spelling.primary: missing",
        "claim.points=-1: must be a number of at least 0",
        "sweep.steps=2.5: must be a whole number of at least 1",
        "resamples=7: must be a whole number of at least 100",
    ):
        assert part in text
    with pytest.raises(ConfigError, match=r"^methods.tl6.rates: 0.03 is not 1, 2 or 5 times a power of ten"):
        Study.from_config(_with_rates(study_values(Path("x")), [0.02, 0.03]))


def _with_rates(values: Values, rates: list[float]) -> Values:
    values["methods"]["tl6"]["rates"] = rates
    return values


def test_names_that_do_not_exist_get_a_hint(values: Values) -> None:
    values["claim"]["candidate"] = "tl8"
    values["methods"]["tl6_r2"] |= {"rates_of": "tl66", "tasks": ["speling"]}
    with pytest.raises(ConfigError) as refused:
        Study.from_config(values)
    assert refused.value.problems == (
        "methods.tl6_r2.rates_of=tl66: no method of this study has this name; did you mean tl6?",
        "claim.candidate=tl8: no method of this study has this name; did you mean tl6?",
        "methods.tl6_r2.tasks=speling: no task of this study has this name; did you mean spelling?",
    )


def test_an_override_leaves_out_a_method() -> None:
    words = ["~methods.vera", "methods.tl6.seeds=5"]
    study = Study.from_config(plain(compose_config("compare", words)))
    assert [(method.name, method.seeds) for method in study.methods] == [("lora", 3), ("tl5", 3), ("tl6", 5)]


def test_unknown_tasks_and_metrics_are_refused(values: Values) -> None:
    task = values["tasks"]["spelling"]
    values["tasks"] = {"nli_wordnet_senses": task | {"primary": "bleu"}, "nli_wordnet_sense": task}
    with pytest.raises(ConfigError) as refused:
        check_tasks(Study.from_config(values))
    first, *others = refused.value.problems
    assert first == "tasks.nli_wordnet_senses: bleu is not a metric of this task; choose from accuracy, answer_loss"
    assert any("nli_wordnet_sense" in other for other in others)


@pytest.mark.parametrize("word", ["presets=[lora]", "seeds=[1]", "steps=5", "learning_rates.tl6=0.1", "base_folder=x"])
def test_a_key_from_before_studies_names_the_new_one(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([word]) == 2
    assert f"{word}: is now " in capsys.readouterr().err


def test_a_key_depends_on_every_setting_and_not_on_the_method_s_name(values: Values, study: Study) -> None:
    def key(**method: Any) -> str:
        changed = study_values(Path("x"))
        changed["methods"]["lora"] |= method
        own = Study.from_config(changed)
        return method_cell(own, own.method("lora"), own.tasks[0], FINAL, 0.01, 1).key

    plain_key = key()
    assert plain_key == method_cell(study, study.method("lora"), study.tasks[0], FINAL, 0.01, 1).key
    assert len({plain_key, key(rank=4), key(preset="tl5"), key(targets=["linear_qkv"])}) == 4
    renamed = study_values(Path("x"))
    renamed["methods"] = {"plain" if name == "lora" else name: m for name, m in renamed["methods"].items()}
    renamed["claim"]["reference"] = "plain"
    own = Study.from_config(renamed)
    assert method_cell(own, own.method("plain"), own.tasks[0], FINAL, 0.01, 1).key == plain_key
    for section, name, value in (
        ("training", "batch", 4),
        ("training", "overrides", ["a=1"]),
        ("base", "name", "another"),
        ("tasks", "spelling", {**renamed["tasks"]["spelling"], "steps": 21}),
        ("tasks", "spelling", {**renamed["tasks"]["spelling"], "max_chars": 100}),
        ("tasks", "spelling", {**renamed["tasks"]["spelling"], "items": 10}),
    ):
        changed = study_values(Path("x"))
        changed[section] = {**changed[section], name: value}
        own = Study.from_config(changed)
        assert method_cell(own, own.method("lora"), own.tasks[0], FINAL, 0.01, 1).key != plain_key


def test_a_quantised_base_is_a_setting_of_its_own_and_other_keys_stay(values: Values, study: Study) -> None:
    def quantised(value: object) -> Study:
        return Study.from_config(study_values(Path("x")) | {"methods": with_nf4(values, value)})

    def keys(own: Study, *names: str) -> list[str]:
        task = own.tasks[0]
        bases = [base_cell(own, task, FINAL, name).key for name in own.bases]
        return bases + [method_cell(own, own.method(name), task, FINAL, 0.01, 1).key for name in names]

    plain = keys(study, "lora")
    base, base_nf4, lora, nf4 = keys(quantised("nf4"), "lora", "lora_nf4")
    assert ([base, lora], len({base, base_nf4, lora, nf4})) == (plain, 4)
    assert keys(quantised({"kind": "nf4", "block_size": 64}), "lora_nf4")[1:] == [base_nf4, nf4]
    double = quantised({"kind": "nf4", "double": True})
    assert not {base_nf4, nf4} & set(keys(double, "lora_nf4"))
    assert double.title_of("base_nf4_64_double") == "base, nf4/64 double"
    with pytest.raises(ConfigError) as refused:
        quantised("nf5")
    assert refused.value.problems == (
        "methods.lora_nf4.base_quantization='nf5': unknown; choose one of null, nf4, int8, or a mapping as {kind: nf4, "
        "double: true}",
    )


def with_nf4(values: Values, setting: object) -> Values:
    """The methods, and LoRA on a quantised base."""
    lora = {name: value for name, value in values["methods"]["lora"].items() if name != "rates"}
    return {**values["methods"], "lora_nf4": {**lora, "rates_of": "lora", "base_quantization": setting}}


def test_the_study_of_the_quantised_base_shares_its_other_runs_with_that_of_the_paper() -> None:
    quantised, paper = shipped("quantised_base"), shipped("paper_claim")
    assert (quantised.folder, quantised.results) == (paper.folder, paper.results)
    results = read_results(ROOT / paper.results)
    known = {cell.key for cell in schedule(paper, results.losses()).cells}
    cells = schedule(quantised, results.losses()).cells
    assert {cell.key for cell in cells if cell.quantization is None} <= known
    assert not {cell.key for cell in cells if cell.quantization is not None} & known
    assert set(results.by_key) <= known | {cell.key for cell in cells}  # no committed run was lost
    assert sum(cell in results for cell in cells) >= 13  # negative control: some of both studies are there
    claim = quantised.claim
    assert {claim.candidate: claim.reference, **claim.also} == {"lora_nf4": "lora", "tl6_nf4": "tl6"}
    assert {(m.name, m.base_quantization, m.seeds) for m in quantised.methods if m.rates_of} == {
        ("lora_nf4", "nf4", 3),
        ("tl6_nf4", "nf4", 3),
    }


def test_a_comparison_with_a_method_that_the_study_has_not_is_named(
    values: Values, capsys: pytest.CaptureFixture[str]
) -> None:
    values["claim"] |= {"pairs": {"tl6_r2": "lora_r3", "tl5": "lora", "base_nf4": "base"}, "also": {"lora_r1": "lora"}}
    assert left_out_pairs(Study.from_config(values | {"methods": with_nf4(values, "nf4")})) == [
        "claim.pairs.tl6_r2=lora_r3: no method of this study has this name; did you mean lora_r1?; this comparison is "
        "left out",
        "claim.pairs.tl5=lora: no method of this study has the name tl5; did you mean tl6?; this comparison is left out",
    ]
    assert compare.main(["list=true", "~methods.vera"]) == 0
    assert "note: claim.pairs.vera=lora: no method of this study has the name vera" in capsys.readouterr().err


def losses_with_best(study: Study, best: float) -> dict[str, float]:
    """Losses of many rates of tl6 on the first task; `best` has the lowest."""
    task, method = study.tasks[0], study.method("tl6")
    rates = [digit * 10.0**power for power in range(-5, 2) for digit in (1, 2, 5)]
    return {
        method_cell(study, method, task, SWEEP, float(f"{rate:.0e}"), 1).key: abs(math.log(rate / best))
        for rate in rates
    }


@pytest.mark.parametrize(
    ("best", "chosen", "tried", "at_edge"),
    [
        (0.02, 0.02, [0.01, 0.02, 0.05], False),
        (0.05, 0.05, [0.01, 0.02, 0.05, 0.1], False),
        (0.1, 0.1, [0.01, 0.02, 0.05, 0.1, 0.2], False),
        (1.0, 0.2, [0.01, 0.02, 0.05, 0.1, 0.2], True),
        (0.005, 0.005, [0.002, 0.005, 0.01, 0.02, 0.05], False),
        (0.0001, 0.002, [0.002, 0.005, 0.01, 0.02, 0.05], True),
    ],
)
def test_a_grid_whose_best_rate_is_at_the_edge_grows_at_most_twice(
    study: Study, best: float, chosen: float, tried: list[float], at_edge: bool
) -> None:
    choice = choose_rate(study, study.method("tl6"), study.tasks[0], losses_with_best(study, best))
    assert (choice.rate, list(choice.losses), choice.at_edge) == (chosen, tried, at_edge)


def test_a_rate_is_chosen_when_its_whole_grid_is_there_and_a_diverged_run_loses(study: Study) -> None:
    method, task = study.method("tl6"), study.tasks[0]
    losses = losses_with_best(study, 0.02)
    largest = method_cell(study, method, task, SWEEP, 0.05, 1).key
    assert choose_rate(study, method, task, {k: v for k, v in losses.items() if k != largest}).rate is None
    assert choose_rate(study, method, task, losses | {largest: math.inf}).rate == 0.02
    assert choose_rate(study, study.method("tl6_r2"), task, losses).rate == 0.02


def test_the_schedule_unfolds_as_the_sweep_decides(study: Study) -> None:
    before = schedule(study, {})
    assert {cell.phase for cell in before.cells if cell.method != BASE} == {SWEEP}
    assert [(one.method, one.task, one.runs) for one in before.waiting] == [
        *((name, task, 3) for name in ("lora", "tl6", "lora_r1") for task in ("spelling", "senses")),
        ("tl6_r2", None, 1),
    ]
    results = write_all(study)
    after = schedule(study, results.losses())
    assert after.waiting == ()
    assert {c.method: c.rate for c in after.cells if c.phase == FINAL and c.seed} == {**BEST_RATES, "tl6_r2": 0.02}
    assert headroom(study, results.losses()) == pytest.approx({"spelling": 1.0, "senses": 2.0})
    tasks = tasks_of(study, study.method("tl6_r2"), results.losses())
    assert tasks is not None
    assert [task.name for task in tasks] == ["senses"]


def test_first_seeds_run_first_and_task_by_task(study: Study) -> None:
    final = [cell for cell in schedule(study, write_all(study).losses()).cells if cell.phase == FINAL]
    methods = ("lora", "tl6", "lora_r1")
    for wave, cells in ((1, final[:8]), (2, final[8:15]), (3, final[15:])):
        own = [(cell.task, cell.method) for cell in cells if cell.method in methods]
        assert own == [(task, method) for task in ("spelling", "senses") for method in methods]
        assert {cell.seed for cell in cells if cell.method in methods} == {wave}


def test_the_time_left_is_that_of_like_runs(study: Study) -> None:
    plan = schedule(study, {})
    assert seconds_left(plan, Results([]), 2) is None
    results = write_all(study)
    assert seconds_left(schedule(study, results.losses()), results, 2) == 0
    by_key = {cell.key: cell for cell in schedule(study, results.losses()).cells}
    half = Results([r for r in results.by_key.values() if by_key[r.key].seed in (None, 1)])
    # 13 runs of 120 s are left: seeds 2 and 3 of three methods on two tasks
    assert seconds_left(schedule(study, half.losses()), half, 2) == 12 * 120 / 2


def test_the_list_shows_what_is_missing_and_what_failed(study: Study, tmp_path: Path) -> None:
    cells = schedule(study, {}).cells
    write_some(study, list(cells[:3]))
    place = tmp_path / "work" / cells[3].label
    place.mkdir(parents=True)
    (place / "failed.json").write_text("{}")
    text = listing(study, read_results(Path(study.results)), lambda cell: tmp_path / "work" / cell.label, 2)
    assert "small: 3 of 39 runs are done" in text
    assert "sweep: LoRA r=8" in text
    assert f"  {cells[3].label} (failed before; see {place})" in text
    assert "2 at a time" in text
