# SPDX-License-Identifier: Apache-2.0
"""The whole command: the generation benchmark on a tiny Llama. The page records the speed; no test asserts it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.harness.command_runs import user_environment
from tests.harness.forks import fork_command, fork_script, run_forked
from tests.harness.hugging_face_models import save_model
from tests.harness.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "generation_speed.py"
PROMPTS, NEW, REPEATS = 5, 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a model, its import, and the one measurement of this file: `result.json` and `page.md`."""
    folder = tmp_path_factory.mktemp("generation")
    save_model("llama", folder / "llama")
    words = ["import", "from=hf-base", f"path={folder / 'llama'}", f"output={folder / 'base.nemo'}", "verify=false"]
    made = run_forked(fork_command, words, cwd=folder, env=user_environment(), timeout=120)
    assert made.returncode == 0, made.stderr
    models = ["--transformers", str(folder / "llama"), "--base", str(folder / "base.nemo")]
    files = ["--output", str(folder / "result.json"), "--page", str(folder / "page.md")]
    sizes = {"batches": PROMPTS, "new": NEW, "repeats": REPEATS, "shortest": 2, "longest": 9, "vocabulary": 200}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    done = run_forked(
        fork_script,
        SCRIPT,
        [*models, *files, *options, "--dtypes", "float32"],
        cwd=ROOT,
        env=user_environment(),
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """The JSON."""
    return json.loads((folder / "result.json").read_text())


def test_each_contender_generates_the_tokens_of_transformers(result: dict[str, Any]) -> None:
    (case,) = result["cases"]
    assert case["rows_as_transformers"] == dict.fromkeys(("transformers", "one_rank", "two_stages", "nemo"), PROMPTS)


def test_ratios_are_medians_of_the_rounds_ratios(result: dict[str, Any]) -> None:
    (case,) = result["cases"]
    assert {len(values) for values in case["seconds"].values()} == {REPEATS}
    for name, values in case["seconds"].items():
        ratios = [mine / theirs for mine, theirs in zip(values, case["seconds"]["transformers"], strict=True)]
        assert case["ratio"][name]["median"] == pytest.approx(statistics.median(ratios))
        assert case["ratio"][name]["min"] == min(ratios) <= case["ratio"][name]["max"]
        assert case["tokens_per_second"][name] == pytest.approx(PROMPTS * NEW / statistics.median(values))


def test_the_json_records_how_it_was_measured(result: dict[str, Any]) -> None:
    assert result["versions"].keys() >= {"python", "torch", "megatron-core", "nemo_toolkit", "transformers"}
    assert (result["repeats"], result["new"], result["model"], result["threads"]) == (REPEATS, NEW, "llama", 2)


def test_the_page_says_what_the_json_says(folder: Path, result: dict[str, Any]) -> None:
    page, (case,) = (folder / "page.md").read_text(), result["cases"]
    assert f"| float32 | {PROMPTS} | {case['tokens_per_second']['transformers']:.0f} |" in page
    for name, layout in (("one_rank", "one rank"), ("two_stages", "two pipeline stages")):
        assert f"{layout}: {case['ratio'][name]['median']:.2f} of transformers' time" in page
    assert page.count("of transformers' time; the goal is at most 1.5: ") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--output is missing"),
        (
            ["--output", "x.json", "--transformers", "nowhere", "--base", "no.nemo"],
            "--transformers nowhere: no such file",
        ),
    ],
)
def test_a_wrong_command_is_answered_at_once(words: list[str], said: str, tmp_path: Path) -> None:
    done = run_forked(fork_script, SCRIPT, words, cwd=tmp_path, env=user_environment(), timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
