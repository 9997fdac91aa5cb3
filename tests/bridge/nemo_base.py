# SPDX-License-Identifier: Apache-2.0
"""NeMo's side of a journey: a Hugging Face base for both worlds, and NeMo's model with an adapter. Runs in NeMo's environment.

python -m tests.bridge.nemo_base base FOLDER        writes FOLDER/hf and its import FOLDER/base.nemo
python -m tests.bridge.nemo_base merge FOLDER       merges FOLDER/adapter.nemo into that base
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_tied_lora.commands.main import main as tied_lora

__all__ = ["main"]


def main(what: str, folder: Path) -> int:
    """Returns the exit code of `tied-lora`."""
    if what == "merge":
        files = {"base": "base.nemo", "adapter": "adapter.nemo", "output": "merged.nemo"}
        return tied_lora(["merge", *(f"{key}={folder / name}" for key, name in files.items())])
    from tests.harness.hugging_face_models import save_model

    save_model("llama", folder / "hf")
    return tied_lora(
        ["import", "from=hf-base", f"path={folder / 'hf'}", f"output={folder / 'base.nemo'}", "verify=false"]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
