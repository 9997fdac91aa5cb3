# SPDX-License-Identifier: Apache-2.0
"""launch/slurm/bridge.sbatch exports the variables of Bridge's recipes. Pure text: Bridge's table is read without Bridge."""

from __future__ import annotations

import re
import runpy
from importlib.metadata import distribution

from tests.harness.paths import ROOT

_TABLE = "megatron/bridge/recipes/utils/environment_utils.py"


def test_the_job_exports_what_all_recipes_set_and_what_tensor_parallel_layers_ask_for() -> None:
    table = runpy.run_path(str(distribution("megatron-bridge").locate_file(_TABLE)))["COMMON_RECIPE_ENV_VARS"]
    script = (ROOT / "launch" / "slurm" / "bridge.sbatch").read_text()
    exported = dict(re.findall(r"^export ([A-Z_]+)=(\w.*)$", script.partition("# The rest")[0], flags=re.M))
    assert exported == {**{name: str(value) for name, value in table.items()}, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert f"\nexported={','.join(exported)}\n" in script
