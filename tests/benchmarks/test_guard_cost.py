# SPDX-License-Identifier: Apache-2.0
"""The whole command: the guards' benchmark at a tiny size. The page records the cost; the test does not assert it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from tests.harness.command_runs import user_environment
from tests.harness.forks import fork_script, run_forked
from tests.harness.paths import ROOT

SIZES = {"layers": 2, "hidden": 16, "ffn": 48, "heads": 2, "sequence": 8, "vocab": 32}


def test_the_page_has_the_ratios_of_the_measured_rounds(tmp_path: Path) -> None:
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    words = ["--output", "result.json", "--page", "page.md", "--ranks", "2", "--repeats", "3", "--warmup", "1", *sizes]
    script = ROOT / "benchmarks" / "guard_cost.py"
    done = run_forked(fork_script, script, words, cwd=tmp_path, env=user_environment(), timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["sizes"] == SIZES
    entry, page = result["ranks"]["2"], (tmp_path / "page.md").read_text()
    for part in ("tie_guard", "gradients"):
        ratios = [a / step for a, step in zip(entry["seconds"][part], entry["seconds"]["step"], strict=True)]
        assert (len(ratios), entry[part]["ratio"]) == (3, statistics.median(ratios))
        assert f"{statistics.median(ratios):.2%} ({min(ratios):.2%} to {max(ratios):.2%})" in page
    assert entry["tie_guard"]["amortised"] == entry["tie_guard"]["ratio"] / 200
    assert "spread over 200 steps" in page
