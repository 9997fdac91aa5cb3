# SPDX-License-Identifier: Apache-2.0
"""The benchmark's arithmetic and its files, at a size that takes seconds. Its speeds are not judged: timings are noisy."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "step_overhead.py"
TINY = ["--layers", "2", "--hidden", "32", "--ffn", "64", "--heads", "4", "--sequence", "16", "--vocab", "64"]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_overhead", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["step_overhead"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_the_floor_is_the_hand_count(module: ModuleType) -> None:
    sizes = module.Sizes(layers=1, hidden=10, ffn=40, heads=2, sequence=7, vocab=100)
    # (in + out) of the four linears: 10+30, 10+10, 10+40, 40+10.
    assert module.adapter_flops(sizes, rank=3) == 6 * 7 * 3 * (40 + 20 + 50 + 50)
    linears = 4 * 7 * (300 + 100 + 400 + 400)
    assert module.frozen_flops(sizes) == linears + 3 * 2 * 2 * 7 * 7 * 10 + 4 * 7 * 10 * 100


def test_the_json_and_the_page_hold_what_was_measured(tmp_path: Path) -> None:
    files = ["--output", str(tmp_path / "out.json"), "--page", str(tmp_path / "page.md")]
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *TINY, *files, "--repeats", "3", "--ranks", "4", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["ranks"]) == ["4", "8"]
    for entry in result["ranks"].values():
        assert len(entry["seconds"]["ours"]) == 3
        expected = (entry["ours_ratio"] - 1) / (entry["nemo_ratio"] - 1)
        assert entry["added_over_nemo"] == pytest.approx(expected)
        losses = entry["losses"]
        assert losses["nemo"] == pytest.approx(losses["ours"], rel=1e-5), "both compute the same update"
        assert losses["ours"] != losses["frozen"]
    assert "| 8 |" in (tmp_path / "page.md").read_text()
