# SPDX-License-Identifier: Apache-2.0
"""Negative controls of the import contracts: a forbidden import in a copy of the package breaks its contract."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.paths import ROOT

# The contract, the module that gets the import, and the import.
FORBIDDEN = {
    "Rooms import downwards only": ("planning/preflight.py", "from nemo_tied_lora.nemo import model"),
    "No circle, in any room": ("adapter/sharding.py", "from nemo_tied_lora.adapter import tied_factors"),
    "Planning runs without torch": ("planning/parallel_layout.py", "from nemo_tied_lora.adapter import sharding"),
    "Below nemo/ NeMo is not imported": ("checkpoint/save_load_on_any_layout.py", "from nemo.utils import logging"),
    "Only platform/ imports apex and Transformer Engine": ("nemo/model.py", "import apex"),
    "Only platform/ knows what a machine lacks": (
        "adapter/inject.py",
        "from nemo_tied_lora.platform import detect",
    ),
}


def broken(folder: Path) -> list[str]:
    """Returns the contracts that the package in the folder breaks."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    found = re.findall(r"^(.+) BROKEN\b", done.stdout, re.MULTILINE)
    assert done.returncode == bool(found)
    return found


def bridges_importers(package: Path) -> list[str]:
    """The modules that import Megatron-Bridge. import-linter does not tell `megatron.bridge` from `megatron.core`."""
    statement = re.compile(r"^ *(?:from|import) megatron\.bridge\b", re.MULTILINE)
    return sorted(
        str(path.relative_to(package)) for path in package.rglob("*.py") if statement.search(path.read_text())
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "nemo_tied_lora", folder / "nemo_tied_lora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_every_contract_has_its_control(copy: Path) -> None:
    contracts = re.findall(
        r'^name = "(.+)"$', (copy / "pyproject.toml").read_text().split("[tool.importlinter]")[1], re.M
    )
    assert sorted(contracts) == sorted(FORBIDDEN)
    assert broken(copy) == []


@pytest.mark.parametrize("contract", FORBIDDEN)
def test_a_forbidden_import_breaks_the_contract(copy: Path, contract: str) -> None:
    module, statement = FORBIDDEN[contract]
    path = copy / "nemo_tied_lora" / module
    before = path.read_text()
    try:
        path.write_text(f"{before}\n{statement}\n")
        assert contract in broken(copy)
    finally:
        path.write_text(before)


def test_one_module_imports_megatron_bridge(tmp_path: Path) -> None:
    assert bridges_importers(ROOT / "nemo_tied_lora") == ["bridge/plugin.py"]
    (tmp_path / "new.py").write_text("def f():\n    from megatron.bridge.peft import base\n")
    assert bridges_importers(tmp_path) == ["new.py"]


def test_the_linter_refuses_a_check_for_gpus_outside_platform(tmp_path: Path) -> None:
    place = tmp_path / "nemo_tied_lora" / "adapter" / "new.py"
    place.parent.mkdir(parents=True)
    place.write_text("import torch\n\nGPU = torch.cuda.is_available()\n")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch.cuda.is_available" in done.stdout
