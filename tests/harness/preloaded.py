# SPDX-License-Identifier: Apache-2.0
"""What the fork server imports once: torch, Megatron, NeMo and Bridge if they are installed, bitsandbytes, and this package.

The import starts no process group and no thread, so that the process can fork. The one exception is pyarrow's native
thread, which pyarrow itself restarts after a fork.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import pkgutil
import sys
from contextlib import suppress
from pathlib import Path

import torch

import nemo_tied_lora
from nemo_tied_lora.adapter.quantized.kernels import load_bitsandbytes
from nemo_tied_lora.platform import prepare
from tests.harness.forks import REFUSE_NEMO

__all__ = ["num_threads"]


def num_threads() -> int:
    """Returns how many threads this process has, native ones included."""
    return len(list(Path("/proc/self/task").iterdir()))


torch.set_num_threads(1)
if os.environ.get(REFUSE_NEMO):
    sys.modules["nemo"] = None  # type: ignore[assignment]
_HAS_NEMO = "nemo" not in sys.modules and importlib.util.find_spec("nemo") is not None
_HAS_BRIDGE = importlib.util.find_spec("megatron.bridge") is not None
with suppress(ImportError):
    importlib.import_module("pyarrow")
_EXPECTED_THREADS = num_threads()
prepare(nemo=_HAS_NEMO, bridge=_HAS_BRIDGE)  # in the order of a real start: the machine first, then the models

_ABSENT = (
    *(() if _HAS_NEMO else ("nemo_tied_lora.nemo", "nemo_tied_lora.conversion", "nemo_tied_lora.commands")),
    *(() if _HAS_BRIDGE else ("nemo_tied_lora.bridge.plugin",)),
)
for _module in pkgutil.walk_packages(nemo_tied_lora.__path__, "nemo_tied_lora."):
    if not _module.name.startswith(_ABSENT):
        importlib.import_module(_module.name)
load_bitsandbytes()

if num_threads() != _EXPECTED_THREADS:
    os.write(2, f"{__name__}: an import starts a thread, which a fork would lose ({num_threads()} threads)\n".encode())
    os._exit(1)
gc.collect()
gc.freeze()  # a collection in a child would copy every page that it looks at
