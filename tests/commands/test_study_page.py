# SPDX-License-Identifier: Apache-2.0
"""The page of a study: made of results alone, the same each time, and honest about what is missing. No model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nemo_tied_lora.commands import compare
from nemo_tied_lora.commands.study.cells import FINAL
from nemo_tied_lora.commands.study.comparison import _verdict, summarise
from nemo_tied_lora.commands.study.page import page_text, page_values, write_page
from nemo_tied_lora.commands.study.plan import Study
from nemo_tied_lora.commands.study.results import Results, read_results
from nemo_tied_lora.commands.study.schedule import schedule
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.tasks.intervals import Interval
from tests.harness.paths import ROOT
from tests.harness.study_results import study_values, values_of, write_all


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A small study."""
    return Study.from_config(study_values(tmp_path))


def text_of(study: Study, results: Results) -> str:
    """The page's Markdown."""
    return page_text(
        study, summarise(study, results), results, "page.png", "page.json", "tied-lora compare page=page.md"
    )


def test_a_page_comes_from_the_results_alone_and_is_the_same_each_time(study: Study, tmp_path: Path) -> None:
    results = write_all(study)
    files = write_page(tmp_path / "page.md", study, results, "tied-lora compare page=page.md")
    assert [file.name for file in files] == ["page.md", "page.json", "page.png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    again = Study.from_config(study_values(tmp_path))
    assert files[0].read_text() == text_of(again, read_results(Path(again.results)))
    numbers = json.loads(files[1].read_text())
    assert numbers["runs"] == {"done": 43, "planned": 43}
    assert numbers["tasks"]["senses"]["methods"]["tl6"]["seeds"] == [1, 2, 3]
    assert numbers["sweep"]["spelling"]["lora_r1"]["rate"] == 0.01


def test_the_page_has_a_verdict_for_each_family_with_parameters_beside_it(study: Study) -> None:
    text = text_of(study, write_all(study))
    assert "| family | metric | base | LoRA r=8 (1,000) | TL6 r=8 (110) | difference, 95% | margin | verdict |" in text
    assert len(re.findall(r"^\| (spelling|senses) \|.*\*\*(comparable|undecided)\*\* \|$", text, re.M)) == 2
    assert len(re.findall(r"^\| (spelling|senses) \|.*\*\*better by \d+\.\d\*\* \|$", text, re.M)) == 2
    assert "Nothing: all 43 runs are done." in text
    assert "- It is small." in text


def test_a_rate_that_was_chosen_for_another_method_says_so(study: Study) -> None:
    text = text_of(study, write_all(study))
    assert re.search(r"^\| TL6 r=2 \|[^|]*\|[^|]*\| 0\.02, as TL6 r=8 \|", text, re.M)
    assert re.search(r"^\| TL6 r=8 \|[^|]*\|[^|]*\| 0\.02 \|", text, re.M)


def test_an_unfinished_study_says_so(study: Study) -> None:
    results = write_all(study)
    cells = schedule(study, results.losses()).cells
    for cell in cells:
        if cell.phase == FINAL and (cell.task == "senses" or cell.seed == 3):
            results.by_key[cell.key].path.unlink()
    text = text_of(study, read_results(Path(study.results)))
    assert "**29 of 43 runs are done; [the rest is missing](#what-is-missing).**" in text.replace("\n", " ")
    assert "so far (2 of 3 seeds)" in text
    assert re.search(r"^\| senses \| accuracy \|  \|  \|  \|  \|  \| no results yet \|$", text, re.M)
    assert "| test: LoRA r=8 | 2 of 3 | 0 of 3 |" in text


def test_a_study_without_results_has_a_page(study: Study, tmp_path: Path) -> None:
    files = write_page(tmp_path / "page.md", study, Results([]), "x")
    assert "TL6 r=8 against LoRA r=8: no results yet." in files[0].read_text()
    assert files[2].exists()


@pytest.mark.parametrize(
    ("low", "high", "margin", "beyond", "verdict"),
    [
        (-0.9, 0.8, 1.0, False, "comparable"),
        (-0.9, -0.1, 1.0, False, "comparable"),
        (-1.1, -0.1, 1.0, False, "worse"),
        (-5.0, -3.0, 1.0, False, "worse"),
        (0.1, 1.5, 1.0, False, "better"),
        (-1.1, 0.8, 1.0, False, "undecided"),
        (-0.8, 1.1, 1.0, False, "undecided"),
        (-1.1, 0.8, 1.2, False, "comparable"),
        (-0.9, 0.8, 1.0, True, "beyond this base"),
        (-0.9, 0.8, None, False, "no results yet"),
    ],
)
def test_the_rule_of_a_verdict(low: float, high: float, margin: float | None, beyond: bool, verdict: str) -> None:
    assert _verdict(Interval((low + high) / 2, low, high), margin, beyond) == verdict


def test_the_margin_is_a_point_or_a_share_of_the_gain(study: Study, tmp_path: Path) -> None:
    summary = summarise(study, write_all(study))[0]
    gain = summary.scores["lora"].primary.value - summary.scores["base"].each[0]
    assert summary.differences[0].margin == 1.0
    values = study_values(tmp_path)
    values["claim"]["share_of_gain"] = 0.1
    wider = Study.from_config(values)
    margin = summarise(wider, read_results(Path(wider.results)))[0].differences[0].margin
    assert margin == pytest.approx(0.1 * gain, rel=1e-5)


def test_a_family_that_the_base_cannot_do_gets_no_verdict(tmp_path: Path) -> None:
    values = study_values(tmp_path)
    values["tasks"]["senses"]["beyond_below"] = 90
    study = Study.from_config(values)
    text = text_of(study, write_all(study))
    assert len(re.findall(r"^\| senses \|.*\*\*beyond this base\*\* \|$", text, re.M)) == 2
    assert "LoRA r=8 scores less than accuracy 90 on senses" in text


def test_differences_are_paired_by_seed_and_item(study: Study) -> None:
    """Unpaired, the interval would be as wide as that of one method's score."""
    summary = summarise(study, write_all(study))[0]
    claim, lora = summary.differences[0].primary, summary.scores["lora"].primary
    assert claim.high - claim.low < 0.5 * (lora.high - lora.low)


def test_results_about_other_items_are_refused(study: Study) -> None:
    results = write_all(study)
    cell = next(
        c for c in schedule(study, results.losses()).cells if (c.method, c.seed) == ("tl6", 1) and c.phase == FINAL
    )
    values = values_of(study, cell)
    results.by_key[cell.key].path.unlink()
    (Path(study.results) / "x").mkdir()
    from nemo_tied_lora.commands.study.results import write_result

    write_result(Path(study.results), cell, values | {"items": {"count": 300, "ids": "others"}})
    with pytest.raises(ConfigError, match="is about other test items of spelling than spelling-base"):
        summarise(study, read_results(Path(study.results)))


def test_a_diverged_run_is_counted_and_not_averaged(study: Study) -> None:
    results = write_all(study)
    cell = next(
        c for c in schedule(study, results.losses()).cells if (c.method, c.seed) == ("tl6", 1) and c.phase == FINAL
    )
    path = results.by_key[cell.key].path
    values = json.loads(path.read_text()) | {"diverged": True, "scores": {}, "statistics": {}, "items": {"count": 0}}
    path.write_text(json.dumps(values))
    assert "| 2 of 3 (1 diverged) |" in text_of(study, read_results(Path(study.results)))


def test_groups_of_items_are_shown_apart(tmp_path: Path) -> None:
    study = Study.from_config(study_values(tmp_path))
    for result in write_all(study).by_key.values():
        values = json.loads(result.path.read_text())
        values["items"]["groups"] = {"names": ["new", "old"], "of": [i % 2 for i in range(values["items"]["count"])]}
        result.path.write_text(json.dumps(values))
    text = text_of(study, read_results(Path(study.results)))
    assert "| exact match, 95% | each seed | new | old | answer loss |" in text


def test_the_command_writes_the_page_without_base_or_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare.main(["study=tiny", "page=made/page.md"]) == 0
    assert capsys.readouterr().out == "written: made/page.md, made/page.json, made/page.png\n"
    assert compare.main(["study=tiny", "list=true"]) == 0
    assert "tiny: 0 of 13 runs are done" in capsys.readouterr().out


def test_a_quantised_base_is_compared_with_the_plain_one_by_pairs(tmp_path: Path) -> None:
    values = study_values(tmp_path)
    methods = {name: values["methods"][name] for name in ("lora", "tl6")}
    for name in ("lora", "tl6"):
        fixed = {key: value for key, value in methods[name].items() if key != "rates"}
        methods[f"{name}_nf4"] = {**fixed, "rates_of": name, "base_quantization": "nf4"}
    values |= {"methods": methods}
    values["claim"] |= {"candidate": "lora_nf4", "rival": None, "also": {"tl6_nf4": "tl6"}}
    values["claim"] |= {"pairs": {"base_nf4": "base"}}
    study = Study.from_config(values)
    text = text_of(study, write_all(study))
    verdicts = text[text.index("## The verdict") : text.index("![")]
    for name in ("LoRA", "TL6"):
        assert re.search(rf"\| {name} r=8 \([\d,]+\) \| {name} r=8, nf4 \([\d,]+\) \| difference, 95%", verdicts)
    assert len(re.findall(r"^\| base, nf4 \| 0 \| +\| +\| +\| 1\d\.\d \[", text, re.M)) == 2
    assert len(re.findall(r"^\| base, nf4 minus base \| -\d\.\d \[.*\*\*worse by", text, re.M)) == 2
    assert "rank, targets or the precision of the base from a method of the sweep use its rates" in text.replace(
        "\n", " "
    )


PAGES = {"paper_claim": "study", "quantised_base": "quantised_quality"}


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_that_of_the_committed_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `make study-page` if this fails."""
    from nemo_tied_lora.planning.composing.compose import compose_config, plain

    monkeypatch.chdir(ROOT)
    study = Study.from_config(plain(compose_config("compare", [f"study={name}"])))
    results = read_results(Path(study.results))
    summaries = summarise(study, results)
    page = PAGES[name]
    command = f"tied-lora compare study={name} page=docs/{page}.md"
    assert (ROOT / "docs" / f"{page}.md").read_text() == page_text(
        study, summaries, results, f"{page}.png", f"{page}.json", command
    )
    assert json.loads((ROOT / "docs" / f"{page}.json").read_text()) == json.loads(
        json.dumps(page_values(study, summaries, results))
    )


def test_readme_says_what_the_study_found() -> None:
    """Rewrite README's sentence if this fails."""
    study = json.loads((ROOT / "docs" / "study.json").read_text())
    verdicts = {
        (found["family"], one["other"]): one["verdict"]
        for found in study["tasks"].values()
        for one in found["differences"]
        if one["method"] == "tl6"
    }
    text = " ".join((ROOT / "README.md").read_text().split())
    worse = [family for (family, other), verdict in verdicts.items() if other == "lora" and verdict == "worse"]
    assert f"it is worse in {' and '.join(worse)}, and in no kind of task better than LoRA of rank 1:" in text
    assert "better" not in [verdict for (_, other), verdict in verdicts.items() if other == "lora_r1"]
    assert ("and are not complete" in text) == (study["runs"]["done"] < study["runs"]["planned"])


def test_the_limits_say_what_the_study_found() -> None:
    """Rewrite `limits` in configs/study/paper_claim.yaml if this fails."""
    text = " ".join((ROOT / "docs" / "study.md").read_text().split())
    methods = json.loads((ROOT / "docs" / "study.json").read_text())["tasks"]["qa_debian_which_package"]["methods"]
    assert "LoRA of rank 32 answers fewer questions than LoRA of rank 8" in text
    assert methods["lora_r32"]["primary"]["high"] < methods["lora"]["primary"]["low"]
