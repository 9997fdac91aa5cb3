#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measures how many lines per second the check of the data reads, in one process and in several. Needs no torch.

python benchmarks/data_check.py --lines 1000000 --characters 200
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

from nemo_tied_lora.planning.data import jsonl_lines
from nemo_tied_lora.planning.data.example_forms import PromptExamples

__all__ = ["main"]


def main() -> None:
    """Writes a file, reads it in both ways in turn, and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--characters", type=int, default=200, help="of a line's prompt and answer together")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    form = PromptExamples(template="{input} {output}", fields=("input", "output"), label="output")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        text = "abcdefghi " * options.characters
        line = {"input": text[: options.characters * 3 // 4], "output": text[: options.characters // 4]}
        path.write_text((json.dumps(line) + "\n") * options.lines)
        best: dict[str, float] = {"one": 0.0, "several": 0.0}
        for _ in range(options.rounds):
            for way, parallel_from in (("one", path.stat().st_size + 1), ("several", 0)):
                with mock.patch.object(jsonl_lines, "_PARALLEL_BYTES", parallel_from):
                    start = time.perf_counter()
                    report = jsonl_lines.check_file(path, form)
                    best[way] = max(best[way], report.lines / (time.perf_counter() - start))
                assert report.examples == options.lines
        facts = {"cores": os.cpu_count(), "lines": options.lines, "bytes": path.stat().st_size}
    rates = {f"lines_per_second_{way}_process": round(rate) for way, rate in best.items()}
    print(json.dumps({**facts, **rates}))


if __name__ == "__main__":
    main()
