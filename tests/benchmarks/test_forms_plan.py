# SPDX-License-Identifier: Apache-2.0
"""Pure text, without torch: the plans of benchmarks/forms, what their results decide, and the pages made of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forms import __main__ as command_line
from forms import forms_page, forms_picture, rates_page
from forms.analysis import verdicts
from forms.cells import ACCURACY, LOSS, Cell
from forms.defaults import default_shares
from forms.pages import STEP_TIME, write
from forms.plan import FORMS, RATES, Plan, read_plan
from forms.schedule import entries, schedule
from forms.sweeping import best_rule, curves, one_rate, preset_form
from forms.text import between_markers

from nemo_tied_lora import ConfigError
from nemo_tied_lora.adapter.lr_multipliers import DEFAULTS, ByRank
from nemo_tied_lora.commands.study.paragraphs import rounded
from nemo_tied_lora.commands.study.results import read_results, write_result
from nemo_tied_lora.config import PRESETS, TARGETS
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from tests.harness.command_runs import user_environment
from tests.harness.paths import ROOT

RESULTS = ROOT / "docs" / "forms_results"
BASE, BEST = 4.0, 0.01


def small() -> Plan:
    """The plan of the forms, with few of them and one seed less."""
    plan = read_plan(FORMS)
    names = ("lora", "tl6", "no_v", "v_heads", "core")
    return replace(plan, candidates=tuple(plan.candidate(name) for name in names), keep=(2, 1), seeds=2, resamples=100)


def loss_of(settings: dict[str, Any]) -> float:
    """A loss that a model might have: no form with v for each 64 outputs is better, and the best rate is 0.01."""
    form = settings["form"]
    if form is None:
        return BASE
    quality = {"blocks": 1.5, "free": 1.2}.get(form["v"], 1.0) - (0.3 if form["core"] == "full" else 0.0)
    octaves = abs(settings["learning_rate"] / BEST - 1)
    return BASE - quality + 0.05 * octaves


def values_of(settings: dict[str, Any], loss: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """A result with 40 items, whose losses differ and are the same for all forms but for the form's quality."""
    items = [loss(settings) * 10 + 0.5 * (number % 7 - 3) for number in range(40)]
    scores = {LOSS: sum(items) / 400, **({ACCURACY: 50.0} if ACCURACY in settings["metrics"] else {})}
    statistics = {LOSS: [items, [10] * 40]}
    if ACCURACY in scores:
        statistics[ACCURACY] = [[0, 1] * 20, [1] * 40]
    return {
        "data": {settings["split"]: "d", "train": "t"},
        "scores": scores,
        "items": {"count": 40, "ids": "i"},
        "statistics": statistics,
        "diverged": False,
        "trained_parameters": 1,
        "seconds": {"train": 60.0},
        "cpu_seconds": 50.0,
        "base": "b",
    }


def do(one: Cell, folder: Path, loss: Callable[[dict[str, Any]], float] = loss_of) -> None:
    write_result(folder, one, values_of(dict(one.settings), loss))  # type: ignore[arg-type]


def do_all(plan: Plan, folder: Path, most: int | None = None) -> list[Cell]:
    """Does the plan's runs in their order, as a worker does. Returns them."""
    done: list[Cell] = []
    losses: dict[str, float] = {}
    while most is None or len(done) < most:
        left = [one for one in schedule(plan, losses).cells if one.key not in losses]
        if not left:
            break
        done.append(left[0])
        losses[left[0].key] = loss_of(dict(left[0].settings))
    for one in done:
        do(one, folder)
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path, list[Cell]]:
    plan, folder = small(), tmp_path_factory.mktemp("results")
    return plan, folder, do_all(plan, folder)


def test_plans_use_the_studys_items_and_recipe() -> None:
    study = plain(compose_config("compare", ["study=paper_claim"]))
    for plan in map(read_plan, (FORMS, RATES)):
        assert plan.base == study["base"]["name"]
        for name in ("batch", "warmup_steps", "weight_decay"):
            assert getattr(plan.training, name) == study["training"][name]
        assert (plan.sweep.items, plan.sweep.steps) == (study["sweep"]["items"], study["sweep"]["steps"])
        for task in plan.tasks:
            same = ("steps", "max_seq_length", "max_chars", "items", "family")
            assert {name: getattr(task, name) for name in same} == {n: study["tasks"][task.name][n] for n in same}


def test_the_plans_presets_are_the_packages() -> None:
    for plan in map(read_plan, (FORMS, RATES)):
        for name, preset in PRESETS.items():
            if name not in [one.name for one in plan.candidates]:
                continue
            form = {"core": "none", "v": "none", "train_A": True, "train_B": True, **plan.candidate(name).form}
            trained = [
                f
                for f, on in (
                    ("v", form["v"] == "free"),
                    ("B", form["train_B"]),
                    ("u", form["core"] == "diagonal"),
                    ("A", form["train_A"]),
                )
                if on
            ]
            assert tuple(trained) == preset["trained"]
            assert ("tied" in preset and preset["tied"] == ()) == (form.get("group") == 1)
            assert form.get("targets", TARGETS) == TARGETS


def test_the_sweep_has_every_preset_and_adalora_prunes() -> None:
    plan = read_plan(RATES)
    assert {one.name for one in plan.candidates} == set(PRESETS)
    kept = {name: preset_form(plan.candidate(name), 8).keep for name in PRESETS}
    assert kept == {**dict.fromkeys(PRESETS), "adalora": 5}


def test_a_plan_with_a_wrong_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    for old, new, problem in (
        ("rule: B_inverse", "rule: B_invers", "rule=B_invers: no such rule"),
        ("presets: [tl5]", "presets: [tl7]", "tl7 is no candidate"),
        ("  growth: 2", "  grow: 2", "sweep.grow: not a key"),
        ("{clip: 0}", "{clips: 0}", "clips is not a key of training"),
        ("tolerance: 0.05", "tolerances: 0.05", "tolerances is not a key"),
    ):
        path.write_text(RATES.read_text().replace(old, new))
        with pytest.raises(ConfigError, match=problem):
            read_plan(path)


def test_a_stop_leaves_the_cheapest_answers_first(finished: tuple[Plan, Path, list[Cell]]) -> None:
    """Sweeps come before test runs, the first task before the others, the small budget before the large one, seed by seed."""
    plan, _, cells = finished
    tasks = [task.name for task in plan.tasks]
    first = [one for one in cells if "lora_r2" not in one.label]
    assert cells[: len(first)] == first
    tests = [one for one in first if one.settings["split"] == "test" and one.settings["form"]]
    assert first[-len(tests) :] == tests
    assert [one.settings["seed"] for one in tests] == [1] * 9 + [2] * 9
    sweeps = [tasks.index(one.settings["task"]) for one in first if one.settings["split"] == "validation"]
    assert sweeps[0] == 0
    assert sweeps[-1] == 2
    assert sweeps == sorted(sweeps)


def test_only_the_best_candidates_have_test_runs(finished: tuple[Plan, Path, list[Cell]]) -> None:
    _, _, cells = finished
    tested = {one.label.split("-")[1] for one in cells if one.settings["split"] == "test" and one.settings["form"]}
    assert tested == {"lora", "tl6", "v_heads"}
    on_others = {one.label.split("-")[1] for one in cells if one.settings["task"] == "summarise_debian"}
    assert on_others == {"base", "lora", "tl6", "v_heads", "no_v"}
    rates = {
        one.settings["learning_rate"] for one in cells if one.settings["split"] == "test" and one.settings["form"]
    }
    assert rates == {BEST}


def test_a_grid_grows_where_the_best_rate_is_at_its_edge(finished: tuple[Plan, Path, list[Cell]]) -> None:
    _, _, cells = finished
    swept = [one for one in cells if one.settings["split"] == "validation" and "-tl6-lora_r1-" in one.label]
    rates = sorted({one.settings["learning_rate"] for one in swept})
    assert rates == [0.005, 0.01, 0.02, 0.05]  # 0.01, 0.02, 0.05 in the plan; its best is the least


def test_the_same_run_is_done_once_and_another_harness_has_another_key() -> None:
    cells = schedule(read_plan(RATES), {}).cells
    assert len({one.key for one in cells}) == len(cells)
    changed = Cell(cells[1].label, {**cells[1].settings, "harness": 99})
    assert changed.key not in {one.key for one in cells}


def test_a_form_that_is_better_beats_and_one_that_is_not_does_not(finished: tuple[Plan, Path, list[Cell]]) -> None:
    plan, folder, _ = finished
    results = read_results(folder)
    found = {one.candidate.name: one for one in entries(plan, "lora_r1")}
    better = verdicts(plan, found["v_heads"], found["tl6"], results)
    assert [one.beats for one in better] == [True] * 3
    assert all(one.difference is not None and one.difference.value == pytest.approx(-0.3, abs=0.01) for one in better)
    assert [one.beats for one in verdicts(plan, found["lora"], found["tl6"], results)] == [False] * 3
    assert [one.beats for one in verdicts(plan, found["core"], found["tl6"], results)] == [None] * 3  # no test runs


def test_the_page_says_who_wins_and_what_did_not_stay(finished: tuple[Plan, Path, list[Cell]], tmp_path: Path) -> None:
    plan, folder, _ = finished
    page = forms_page.page_text(plan, read_results(folder))
    assert page.count("**better** on 3") == 4  # against TL6 and LoRA, at two budgets
    assert "Better than both TL6 and LoRA on at least two tasks: **v for each 64 outputs**." in " ".join(page.split())
    assert "Better than both on one task" not in page
    assert "count of LoRA r=1, after the first task's sweep: core." in page
    assert "count of LoRA r=1, after the sweeps of all tasks: B diag(u) A." in page
    assert json.loads(json.dumps(rounded(forms_page.page_values(plan, read_results(folder)))))
    forms_picture.draw(tmp_path / "forms.png", plan, read_results(folder))
    assert (tmp_path / "forms.png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_shows_the_loss_of_each_form_minus_loras(finished: tuple[Plan, Path, list[Cell]]) -> None:
    """With intervals where there are test runs; otherwise the best losses on validation items."""
    plan, folder, _ = finished
    found = forms_picture.points(plan, read_results(folder))
    assert list(found) == [task.name for task in plan.tasks]
    first = {point.title: point for point in found[plan.tasks[0].name] if point.budget == "lora_r1"}
    assert "LoRA" not in first
    expected = {"TL6": -0.2, "v for each 64 outputs": -0.5, "B diag(u) A": 0.0, "core": 0.3}
    assert {title: round(point.value, 2) for title, point in first.items()} == expected
    tested = {title for title, point in first.items() if not isinstance(point.difference, float)}
    assert tested == {"TL6", "v for each 64 outputs"}
    assert [point.title for point in found["summarise_debian"]].count("core") == 0


@pytest.mark.parametrize("most", [0, 1, 7, 40])
def test_the_page_can_be_read_after_any_stop(tmp_path: Path, most: int) -> None:
    plan = small()
    do_all(plan, tmp_path / "results", most)
    page = forms_page.page_text(plan, read_results(tmp_path / "results"))
    assert f"**{most} of about" in page
    assert "No test runs of a candidate yet." in page


def test_one_rate_is_the_one_whose_worst_share_is_largest(tmp_path: Path) -> None:
    plan = read_plan(RATES)
    stages = tuple(replace(stage, presets=("lora",)) for stage in plan.stages if "lora" in stage.presets)
    checks = tuple(replace(check, presets=("lora",)) for check in plan.checks)
    plan = replace(plan, stages=stages, checks=checks)

    def loss(settings: dict[str, Any]) -> float:
        form = settings["form"]
        if form is None:
            return BASE
        best = 0.01 * (8 / form["rank"]) ** 0.5  # so that B at 1/sqrt(r) has the same best rate at every rank
        rate = settings["learning_rate"] * settings["multipliers"].get("B", 1.0)
        return BASE - 1.0 + 0.4 * abs(rate / best - 1)

    losses: dict[str, float] = {}
    while left := [one for one in schedule(plan, losses).cells if one.key not in losses]:
        losses |= {one.key: loss(dict(one.settings)) for one in left}
        for one in left:
            do(one, tmp_path, loss)
    found = curves(plan, read_results(tmp_path).losses())
    rule = one_rate(found, "lora", "B_sqrt")
    assert rule is not None
    assert (rule.rate, list(rule.shares)) == (
        0.01,
        [1, 2, 4, 8, 16, 32, 64, 128],
    )  # the other ranks with the best rule
    assert rule.worst == pytest.approx(1.0, abs=1e-6)
    same = one_rate(found, "lora", "plain")
    assert same is not None
    assert same.worst < 0.7
    assert best_rule(found, "lora") == rule
    text = rates_page.sweep_text(plan, read_results(tmp_path))
    assert "| LoRA | B √(8/r) | 0.01 | r=1: 100.0%, r=2: 100.0%" in text
    assert "| LoRA | 8 | 0.01 | warmup_steps 0 | 2.994 | 2.994 |" in text
    rates_page.draw(tmp_path / "rates.png", plan, read_results(tmp_path))


def test_the_committed_pages_are_those_of_the_committed_results(tmp_path: Path) -> None:
    """`python -m benchmarks.forms page` writes them."""
    for name in {"learning_rates.md", STEP_TIME} & {path.name for path in (ROOT / "docs").iterdir()}:
        (tmp_path / name).write_text((ROOT / "docs" / name).read_text())
    assert write(RESULTS, tmp_path) == 0
    for name in ("forms.md", "learning_rates.md", "forms.json", "learning_rates.json"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), (
            f"run python -m benchmarks.forms page: {name}"
        )
    with pytest.raises(ConfigError, match="restore them"):
        between_markers("# a page\n", "sweep", "text", Path("page.md"))


def test_with_the_packages_defaults_one_rate_serves_every_rank_of_every_preset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = read_plan(RATES)
    found = curves(plan, read_results(RESULTS).losses())
    for preset in PRESETS:
        shares = default_shares(plan, found, preset)
        assert list(shares) == [1, 2, 4, 8, 16, 32, 64, 128]
        assert min(shares.values()) >= 1 - plan.tolerance, (preset, shares)
    monkeypatch.setitem(DEFAULTS, "lora", {"A": ByRank(1.0), "B": ByRank(1.0)})
    assert min(default_shares(plan, found, "lora").values()) < 0.5
    assert "It is missed by LoRA of rank 1, LoRA of rank 128." in rates_page.sweep_text(plan, read_results(RESULTS))


def test_what_the_readme_says_of_tl5_is_what_was_measured() -> None:
    """Better than LoRA and TL6 in translation, with all seeds; not different from them in the two other tasks."""
    plan, results = read_plan(FORMS), read_results(RESULTS)
    said, page = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/forms.md"))
    for budget, ranks in (("lora_r1", (1, 30)), ("lora_r2", (2, 60))):
        found = {one.candidate.name: one for one in entries(plan, budget)}
        assert (found["lora"].form.rank, found["tl5"].form.rank) == ranks
        for other in ("lora", "tl6"):
            translation, *others = verdicts(plan, found["tl5"], found[other], results)
            assert translation.beats is True
            for verdict in others:
                assert verdict.complete
                assert verdict.difference is not None
                assert verdict.difference.low < 0 < verdict.difference.high
        [verdict] = re.findall(rf"At the count of LoRA r={ranks[0]}, .*? at least two tasks: (.*?;)", page)
        assert verdict == "none. Better than both on one task: TL5;"
    assert "So try `tl5` of rank 30 or 60" in said
    assert "`tl5` is better than it and than TL6 in translation, and not different in two other kinds of task" in said


def test_a_stop_by_a_signal_has_an_exit_code_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "run", stopped)
    assert command_line.main(["run", "--plan", "rates"]) == 130


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["run", "--model", "nowhere"], "--model nowhere: has no config.json, *.safetensors"),
        (["run", "--model", "nowhere"], "make it with: python -m benchmarks.forms base nowhere"),
        (["run", "--model", "nowhere", "--workers", "0"], "--workers: 0: must be at least 1"),
        (["base", "tests"], "tests: is there already"),
    ],
)
def test_bad_input_is_refused_before_torch_is_imported(words: list[str], problem: str) -> None:
    script = f"import sys; sys.modules['torch'] = None; from benchmarks.forms.__main__ import main; sys.exit(main({words!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=user_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert problem in done.stderr


def test_a_reader_that_stops_reading_gets_no_traceback(tmp_path: Path) -> None:
    """As in `python -m benchmarks.forms list | head -1`. Unbuffered, so that the list is written after its reader left."""
    command = f"{sys.executable} -u -m benchmarks.forms list --results {tmp_path} | (exec <&-; sleep 3)"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, env=user_environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (141, "")
