# SPDX-License-Identifier: Apache-2.0
"""The whole command: the overhead benchmark at a tiny size. The page records the speed; no test asserts it."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.harness.command_runs import user_environment
from tests.harness.forks import fork_script, run_forked
from tests.harness.paths import ROOT

SIZES = {"layers": 2, "hidden": 16, "ffn": 48, "heads": 2, "sequence": 8, "vocab": 32}
RANKS = (2, 4)
REPEATS = 3


def run_benchmark(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user does."""
    script = ROOT / "benchmarks" / "step_overhead.py"
    return run_forked(fork_script, script, words, cwd=ROOT, env=user_environment(), timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the one measurement of this file: `result.json` and `page.md`."""
    folder = tmp_path_factory.mktemp("benchmark")
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    files = ["--output", str(folder / "result.json"), "--page", str(folder / "page.md")]
    done = run_benchmark(*files, *sizes, "--ranks", *map(str, RANKS), "--repeats", str(REPEATS), "--warmup", "1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """The JSON."""
    return json.loads((folder / "result.json").read_text())


def test_the_json_records_how_it_was_measured(result: dict[str, Any]) -> None:
    assert result["sizes"] == SIZES
    assert result["targets"] == ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    assert (result["repeats"], result["threads"], result["clock"]) == (REPEATS, 1, "process_time")
    assert result["versions"].keys() >= {"python", "torch", "megatron-core", "nemo_toolkit"}
    assert result.keys() >= {"date", "commit", "uncommitted_changes", "seed", "processor", "dtype", "load_average"}
    assert list(result["ranks"]) == [str(rank) for rank in RANKS]


@pytest.mark.parametrize("rank", RANKS)
def test_ratios_are_medians_of_the_rounds_ratios(result: dict[str, Any], rank: int) -> None:
    entry = result["ranks"][str(rank)]
    seconds = entry["seconds"]
    assert {len(series) for series in seconds.values()} == {REPEATS}
    assert entry["frozen_seconds"] == statistics.median(seconds["frozen"]) > 0
    for name in ("nemo", "ours"):
        ratios = [a / f for a, f in zip(seconds[name], seconds["frozen"], strict=True)]
        assert entry[f"{name}_ratio"] == pytest.approx(statistics.median(ratios))
        spread = entry["spread"][f"{name}_ratio"]
        assert (spread["min"], spread["max"]) == pytest.approx((min(ratios), max(ratios)))


@pytest.mark.parametrize("rank", RANKS)
def test_the_added_shares_follow_from_the_ratios(result: dict[str, Any], rank: int) -> None:
    entry = result["ranks"][str(rank)]
    added = entry["ours_ratio"] - 1
    assert entry["added_over_nemo"] == pytest.approx(added / (entry["nemo_ratio"] - 1))
    assert entry["added_over_floor"] == pytest.approx(added / (entry["floor_ratio"] - 1))


@pytest.mark.parametrize("rank", RANKS)
def test_the_floor_is_the_hand_count(result: dict[str, Any], rank: int) -> None:
    # T = 8. qkv 16 -> 48, proj 16 -> 16, fc1 16 -> 48, fc2 48 -> 16: in + out is 224, in * out is 2560.
    adapter = 2 * 6 * 8 * rank * 224
    # 2 layers: 4 T in out for the linears; scores and context for attention, 2 T T 16 each, forward and two gradients.
    frozen = 2 * (4 * 8 * 2560 + (2 * 8 * 8 * 16) * 2 * 3) + 4 * 8 * 16 * 32
    entry = result["ranks"][str(rank)]
    assert (entry["adapter_flops"], entry["frozen_flops"]) == (adapter, frozen)
    assert entry["floor_ratio"] == pytest.approx(1 + adapter / frozen)


@pytest.mark.parametrize("rank", RANKS)
def test_both_adapters_compute_the_same_update(result: dict[str, Any], rank: int) -> None:
    losses = result["ranks"][str(rank)]["losses"]
    assert losses["ours"] == pytest.approx(losses["nemo"], rel=1e-5)  # float32, sums in another order
    assert losses["ours"] != pytest.approx(losses["frozen"], rel=1e-5)


def test_the_page_is_made_from_the_json_alone(folder: Path, result: dict[str, Any], tmp_path: Path) -> None:
    again = tmp_path / "again.md"
    done = run_benchmark("--from-json", str(folder / "result.json"), "--page", str(again))
    assert done.returncode == 0, done.stderr
    page = again.read_text()
    assert page == (folder / "page.md").read_text()
    for rank in RANKS:
        assert f"| {rank} | {result['ranks'][str(rank)]['frozen_seconds']:.3f} |" in page
    for missing in ("GPU", "bfloat16", "tensor or pipeline parallelism"):
        assert missing in page.split("## Not measured")[1]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "--output FILE is missing"),
        (("--output", "x.json", "--hidden", "10", "--heads", "3"), "--hidden 10 is not divisible by --heads 3"),
        (("--output", "x.json", "--ranks", "0"), "0: must be at least 1"),
        (("--output", "x.json", "--hidden", "16", "--ranks", "32"), "--ranks 32: more than 16"),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(words: tuple[str, ...], problem: str) -> None:
    done = run_benchmark(*words)
    assert done.returncode == 2
    assert problem in done.stderr


def test_help_shows_every_option() -> None:
    shown = run_benchmark("--help").stdout
    assert all(option in shown for option in ("--output FILE", "--page FILE", "--ranks", "--repeats", "--threads"))
