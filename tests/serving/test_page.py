# SPDX-License-Identifier: Apache-2.0
"""docs/serving.md: its program for vLLM runs as a file, with vLLM's engine in a process of its own."""

from __future__ import annotations

import re
from pathlib import Path

from tests.harness.paths import ROOT
from tests.harness.random_adapters import random_adapter
from tests.serving.served_models import Base, run_with_vllm
from tests.serving.vllm_engine import SETTINGS


def test_the_program_on_the_page_runs_as_a_file(tmp_path: Path) -> None:
    base = Base("qwen2", tmp_path)
    export = base.export("adapter-peft", random_adapter(base.keys, preset="vera", rank=16))
    [program] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "serving.md").read_text(), flags=re.M | re.S)
    assert (program.count("my-org/my-base"), program.count('"adapter-peft"')) == (1, 1)
    (export.parent / "page.py").write_text(program.replace("my-org/my-base", str(base.folder)))
    printed = run_with_vllm(Path("page.py"), cwd=export.parent, **SETTINGS)
    assert printed.endswith("\n")
