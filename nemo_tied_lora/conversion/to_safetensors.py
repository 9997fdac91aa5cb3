# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter's whole state as one safetensors file, with each tied tensor once and the config in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.conversion.verify_export import Difference
from nemo_tied_lora.files import write_atomically

__all__ = ["check_full_state", "write_full_state"]


def write_full_state(file: AdapterFile, path: Path) -> Path:
    """Writes the file beside `path` and renames it there."""
    targets = {group: shape.to_dict() for group, shape in file.shapes.items()}
    metadata = {"format": "pt", "tied_lora": json.dumps(file.config.as_dict()), "targets": json.dumps(targets)}
    return write_atomically(path, save({n: t.contiguous() for n, t in file.state.items()}, metadata))


def check_full_state(path: Path, file: AdapterFile) -> Difference:
    """Reads the file back. The difference is 0 if every tensor has the same bits, else infinity, with a tensor's name."""
    read = load_file(path)
    for name in {**file.state, **read}:
        if name not in read or name not in file.state or not torch.equal(read[name], file.state[name]):
            return Difference(float("inf"), name)
    return Difference(0.0, "every tensor")
