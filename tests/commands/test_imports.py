# SPDX-License-Identifier: Apache-2.0
"""The whole command: some commands import neither Megatron nor NeMo, and the list of commands imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_tied_lora.checkpoint.tar import write_tar
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from tests.harness.paths import ROOT
from tests.harness.random_adapters import LLAMA, random_adapter

# Python imports it at the start of every process, children included.
_REFUSE = """
import os, sys

class Refuse:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in os.environ["REFUSED"].split():
            raise ImportError(f"refused: {name}")

sys.meta_path.insert(0, Refuse)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds an adapter, its base, and a `sitecustomize.py` that refuses imports."""
    folder = tmp_path_factory.mktemp("without_megatron")
    file = random_adapter(LLAMA, preset="tl6")
    write_adapter(folder / "adapter.nemo", file.config, file.shapes, file.state, file.yaml)
    with (folder / "base.nemo").open("wb") as base:
        write_tar(base, {"model_config.yaml": yaml.safe_dump(LLAMA).encode()})
    (folder / "refuse").mkdir()
    (folder / "refuse" / "sitecustomize.py").write_text(_REFUSE)
    return folder


def run(folder: Path, *commands: list[str], refused: str = "megatron nemo lightning") -> Any:
    """Runs the commands in one process, which refuses to import these packages. The first failure ends it."""
    code = f"from nemo_tied_lora.commands.main import main; import sys; sys.exit(any(map(main, {list(commands)})))"
    paths = os.pathsep.join([str(folder / "refuse"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "REFUSED": refused}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_export_and_import_from_lora_import_neither_megatron_nor_nemo(folder: Path) -> None:
    fit = ["base=base.nemo", "rank=3", "max_iterations=3"]
    done = run(
        folder,
        ["export", "adapter=adapter.nemo", "to=hf-peft", "output=peft"],
        ["export", "adapter=adapter.nemo", "to=nemo-lora", "output=lora.nemo"],
        ["export", "adapter=adapter.nemo", "to=safetensors", "output=state.safetensors"],
        # Quotes: Hydra's grammar decides what `from` is, and so whether NeMo starts.
        ["import", "from='lora'", "path=peft", "output=tl6.nemo", *fit],
        # vera: the fit draws A and B from the seed, as training does.
        ["import", "from=lora", "path=lora.nemo", "output=vera.nemo", "preset=vera", *fit],
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "vera.nemo").is_file()


def test_a_command_whose_child_process_imports_megatron_is_refused(folder: Path) -> None:
    (folder / "hf").mkdir()
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    done = run(folder, ["import", "from=hf-base", "path=hf", "output=x.nemo"])
    assert done.returncode != 0
    assert "refused: megatron" in done.stderr


def test_the_list_of_commands_imports_no_torch(folder: Path) -> None:
    done = run(folder, ["--help"], refused="torch numpy matplotlib")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "export" in done.stdout
