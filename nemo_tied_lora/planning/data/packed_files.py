# SPDX-License-Identifier: Apache-2.0
"""Checks the form of a file of packed sequences, as NeMo's `prepare_packed_ft_dataset.py` writes it, without unpickling it.

Such a `.npy` file is an array of dicts with input_ids, loss_mask and seq_start_id. numpy stores objects as a pickle.
"""

from __future__ import annotations

import ast
import itertools
import pickletools
import struct
from pathlib import Path
from typing import BinaryIO

__all__ = ["packed_problem"]

_MAGIC = b"\x93NUMPY"
_KEYS = frozenset(("input_ids", "loss_mask", "seq_start_id"))
_MOST_HEADER_BYTES = 1 << 16
_MOST_OPCODES = 4_000_000
"""The keys of the first sequence come after its token ids: some opcodes for each token."""
_REMEDY = "write it with NeMo's scripts/nlp_language_modeling/prepare_packed_ft_dataset.py"


def packed_problem(path: Path) -> str | None:
    """Returns what is wrong with the file, without its name. None: its first sequence has the expected form.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return f"is not a NumPy file, which packed_sequence=true needs; {_REMEDY}, or set packed_sequence=false"
        try:
            header = _header(file)
        except (ValueError, SyntaxError, struct.error, MemoryError, RecursionError):
            return f"has a damaged NumPy header; {_REMEDY} again"
        kind, shape = header.get("descr"), header.get("shape")
        if kind != "|O" or not isinstance(shape, tuple) or len(shape) != 1:
            return f"holds an array of {kind!r} with shape {shape}, not one of packed sequences; {_REMEDY}"
        if shape[0] == 0:
            return "is empty: no packed sequence in it"
        return _sequence_problem(file)


def _header(file: BinaryIO) -> dict[str, object]:
    major = file.read(2)[0:1]
    (size,) = struct.unpack("<H", file.read(2)) if major == b"\x01" else struct.unpack("<I", file.read(4))
    if size > _MOST_HEADER_BYTES:
        raise ValueError("the header is too long")
    header = ast.literal_eval(file.read(size).decode("latin-1").strip())
    if not isinstance(header, dict):
        raise ValueError("the header is not a dict")
    return header


def _sequence_problem(file: BinaryIO) -> str | None:
    """Looks for the keys among the texts of the pickle, without running it."""
    found: set[object] = set()
    try:
        for _, argument, _ in itertools.islice(pickletools.genops(file), _MOST_OPCODES):
            if argument in _KEYS if isinstance(argument, str) else False:
                found.add(argument)
                if found == _KEYS:
                    return None
    except (ValueError, UnicodeDecodeError, struct.error):
        return f"is cut off or damaged; {_REMEDY} again"
    missing = ", ".join(sorted(_KEYS - found))
    return f"has packed sequences without {missing}; {_REMEDY}"
