# SPDX-License-Identifier: Apache-2.0
"""Calls examples/bridge/finetune_tied_lora.py with several command lines, in one process that no test has made a rank.

python -m tests.bridge.example_runs FOLDER

FOLDER holds a Hugging Face model in hf/ and data in data/. FOLDER/results.json gets, by name: exit code, stdout, stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

from tests.harness.paths import ROOT

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[int, list[str]]] = {
    "help": (1, ["--help"]),
    "right": (
        8,
        [
            # Bridge's Llama asks for a fused kernel of Transformer Engine, which this machine lacks.
            *(
                "model.tensor_model_parallel_size=2",
                "model.pipeline_model_parallel_size=2",
                "model.apply_rope_fusion=false",
            ),
            *("--preset=vera", "peft.rank=16", "peft.layers=[0,3]", "optimizer.lr=2e-3", "train.train_iters=7"),
        ],
    ),
    "wrong overrides": (
        8,
        ["peft.dim=8", "peft.dropout=2", "peft.targets=[linear_q]", "model.tensor_parallel=2", "train.train_iters=7"],
    ),
    "unreadable override": (8, ["peft.layers=[0,"]),
    "ranks that do not fit": (3, ["model.tensor_model_parallel_size=2"]),
}
"""Name -> number of ranks, arguments after those that name the files."""


def main(folder: Path) -> None:
    """Every command of COMMANDS, and one whose files are missing."""
    example = runpy.run_path(str(ROOT / "examples" / "bridge" / "finetune_tied_lora.py"))["main"]
    results = {}
    for name, (ranks, arguments) in COMMANDS.items():
        os.environ["WORLD_SIZE"] = str(ranks)
        files = [f"--hf-path={folder / 'hf'}", f"--data={folder / 'data'}", f"--folder={folder / 'run'}"]
        results[name] = _call(example, [*files, f"--check={folder / name}", *arguments])
    results["missing files"] = _call(example, [f"--hf-path={folder}", f"--data={folder}"])
    (folder / "results.json").write_text(json.dumps(results))


def _call(example: object, arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = example(arguments)
        except SystemExit as ended:  # --help
            code = ended.code
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
