# SPDX-License-Identifier: Apache-2.0
"""The room on disk that an import needs, from the sizes of the tensors alone. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.files import room_problem

__all__ = ["import_room_problem"]

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_TOKENIZER = 32_000_000
"""More than the files of any tokenizer take."""


def import_room_problem(output: Path, dtype: str, *, folder: Path | None = None, gguf_numbers: int = 0) -> str | None:
    """What is missing on the disk of `output`.

    While NeMo writes the `.nemo`, its weights are there twice: loose, and in the file. Later the file is unpacked for the
    check. A GGUF file needs a Hugging Face folder in float32 besides.

    Args:
        dtype: of the stored weights, or auto.
        folder: the Hugging Face folder that is imported; its files may be damaged.
        gguf_numbers: how many numbers a GGUF file holds, if it is one that is imported.
    """
    numbers, size = (gguf_numbers, 4) if folder is None else _stored(folder)
    weights = numbers * _BYTES.get(dtype, size)
    beside = 4 * gguf_numbers
    return room_problem(output, beside + 2 * weights + _TOKENIZER) if numbers else None


def _stored(folder: Path) -> tuple[int, int]:
    """How many numbers a folder holds, and the bytes of each."""
    try:
        config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        files = sorted(folder.glob("model*.safetensors"))
        if files:
            return _in_safetensors(files)
        size = _BYTES.get(str(config.get("torch_dtype")), 4)
        return sum(path.stat().st_size for path in folder.glob("pytorch_model*.bin")) // size, size
    except Exception:  # whatever damaged files raise: they are named later
        return 0, 4


def _in_safetensors(files: list[Path]) -> tuple[int, int]:
    from safetensors import safe_open

    numbers, dtypes = 0, set()
    for path in files:
        with safe_open(path, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a mapping
                found = tensors.get_slice(name)
                numbers += math.prod(found.get_shape())
                dtypes.add(found.get_dtype())
    return numbers, _BYTES.get(dtypes.pop(), 4) if len(dtypes) == 1 else 4
