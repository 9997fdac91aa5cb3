# SPDX-License-Identifier: Apache-2.0
"""docs/cluster.md: its commands print what the page shows, and its recipes can be launched. The whole command, without ranks."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_tied_lora.commands import launch
from nemo_tied_lora.planning.config_folder import config_folder
from tests.harness.paths import ROOT

_PROGRAM = runpy.run_path(str(ROOT / "benchmarks" / "cluster_recipes.py"))
PAGE: Path = _PROGRAM["PAGE"]
_END = "----- the next command"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder for the page's /shared: data, and unpacked bases of the published sizes with a few bytes for weights."""
    for name in ("llama2_7b", "llama2_13b", "llama2_70b"):
        base = tmp_path / "shared" / name
        base.mkdir(parents=True)
        sizes = (config_folder() / "model" / f"{name}.yaml").read_text()
        (base / "model_config.yaml").write_text(f"{sizes}\nmcore_gpt: true\n")
        (base / "model_weights.ckpt").write_bytes(b"weights")
    for name in ("train", "validation"):
        line = re.findall(r'^    (\{"input": .*)$', PAGE.read_text(), flags=re.M)[0]
        (tmp_path / "shared" / f"{name}.jsonl").write_text(f"{line}\n")
    return tmp_path / "shared"


def commands(page: str) -> Iterator[tuple[str, str]]:
    """Returns (command, output on the page) of every console block."""
    for block in re.findall(r"^```console\n(.*?)^```$", page, flags=re.M | re.S):
        for command, printed in re.findall(r"^\$ ((?:.*\n)(?:> .*\n)*)((?:(?!\$ ).*\n)*)", block, flags=re.M):
            yield command.replace("\n> ", "\n"), printed


def test_the_commands_print_what_the_page_shows(shared: Path) -> None:
    typed = list(commands(PAGE.read_text().replace("/shared", str(shared))))
    assert len(typed) == 5
    script = f"\necho '{_END}'\n".join(command for command, _ in typed)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", f"exec 2>&1\n{script}"],
        cwd=shared,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    for (command, wanted), printed in zip(typed, done.stdout.split(f"{_END}\n"), strict=True):
        pattern = "".join(r"(?:.*\n)*?" if line == "...\n" else re.escape(line) for line in wanted.splitlines(True))
        assert re.fullmatch(pattern, printed), f"$ {command}\n{printed}"
    assert not (shared / "runs").exists()


def test_the_table_of_recipes_is_the_plans() -> None:
    page = PAGE.read_text()
    assert _PROGRAM["in_page"](page) == page, "run benchmarks/cluster_recipes.py --write"


@pytest.mark.parametrize("line", _PROGRAM["RECIPES"])
def test_a_recipe_composes_and_passes_pre_flight(shared: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = line.split()[0].partition("=")[2]
    data = [
        f"model.data.{ds}.file_names=[{shared}/{n}.jsonl]"
        for ds, n in (("train_ds", "train"), ("validation_ds", "validation"))
    ]
    place = [f"model.restore_from_path={shared}/{name}", f"exp_manager.explicit_log_dir={shared}/runs", "dry_run=true"]
    assert launch.main(["cluster=slurm", "cluster.gpus_per_node=8", *line.split(), *data, *place]) == 0
    script = capsys.readouterr().out
    assert f"#SBATCH --nodes={re.findall('cluster.nodes=([0-9]+)', line)[0]}\n" in script
    assert "    recipe=llama2\n" in script
