# SPDX-License-Identifier: Apache-2.0
"""The same tiny Llama on plain megatron-core, in this environment or in NeMo's. Imports no Bridge.

python -m tests.bridge.other_release FROM TO [FROM TO ...]

loads an adapter's file on one rank, and writes another file from what was loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from nemo_tied_lora import load_adapter, save_adapter
from tests.harness.ranks import single_process

__all__ = ["LAYERS", "SIZES", "build", "main", "mask", "tokens"]

LAYERS = 4
SIZES = {"hidden": 48, "ffn": 80, "heads": 4, "groups": 2}
"""As `build_gpt` names them."""
_SEQUENCE = 12


def build() -> Any:
    """The whole model on this rank, float32. Its weights depend on their names alone."""
    from tests.harness.tiny_gpt import build_gpt

    return build_gpt(num_layers=LAYERS, llama=True, dtype=torch.float32, **SIZES)


def tokens() -> torch.Tensor:
    """(4, 13) token numbers, always the same."""
    from tests.harness.tiny_gpt import VOCAB

    return torch.randint(0, VOCAB, (4, _SEQUENCE + 1), generator=torch.Generator().manual_seed(3))


def mask() -> torch.Tensor:
    """(1, 1, 12, 12): True where attention is not allowed."""
    return torch.ones(_SEQUENCE, _SEQUENCE, dtype=torch.bool).triu(1)[None, None]


def main(*paths: str) -> None:
    """Prints megatron-core's version."""
    import megatron.core

    single_process()
    for source, target in zip(paths[::2], paths[1::2], strict=True):
        save_adapter(load_adapter(build(), Path(source)), Path(target))
    print(megatron.core.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
