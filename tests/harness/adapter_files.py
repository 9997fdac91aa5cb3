# SPDX-License-Identifier: Apache-2.0
"""Writes small adapter files without a model, and reads and writes tars by hand."""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import torch

from nemo_tied_lora.adapter.experts import groups_of
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.shapes import LinearShape, mlp_linears
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["CONFIG", "STATE", "header", "member_offsets", "members_of", "shapes_of", "tiny_adapter", "write_tar"]

CONFIG, STATE = "model_config.yaml", "adapter.safetensors"


def shapes_of(hidden: int, layers: int) -> dict[str, LinearShape]:
    """The shapes of a GPT's four linears; the MLP is gated and 2 * hidden wide."""
    all_layers = tuple(range(layers))
    return {
        "linear_qkv": LinearShape("column", hidden, 3 * hidden, 1, all_layers),
        "linear_proj": LinearShape("row", hidden, hidden, 1, all_layers),
        "linear_fc1": LinearShape("column", hidden, 4 * hidden, 2, all_layers),
        "linear_fc2": LinearShape("row", 2 * hidden, hidden, 1, all_layers),
    }


def tiny_adapter(path: Path, *, hidden: int = 24, layers: int = 4, num_experts: int = 0, **fields: Any) -> Path:
    """Writes an adapter whose numbers depend only on the tensors' names.

    Args:
        num_experts: experts in the last layer; 0: a dense model.
        fields: fields of `TiedLoraConfig`.
    """
    config = TiedLoraConfig.from_mapping({"preset": "tl6", "rank": 3, **fields})
    shapes = {target: shape for target, shape in shapes_of(hidden, layers).items() if target in config.targets}
    if num_experts:
        experts = mlp_linears(hidden, 2 * hidden, True, [layers - 1], num_experts)
        shapes |= {f"experts.{linear}": shape for linear, shape in experts.items() if linear in config.targets}
        shapes = {group: shapes[group] for t in config.targets for group in groups_of(t) if group in shapes}
    state = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        for name, shape in expected_shapes(config, shapes).items()
    }
    return write_adapter(path, config, shapes, state, {})


def members_of(whole: bytes) -> dict[str, bytes]:
    """Returns each member's content by its name."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def member_offsets(whole: bytes) -> dict[str, tuple[int, int]]:
    """Returns the offset and the size of each member's content, by its name."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        return {info.name: (info.offset_data, info.size) for info in tar}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Writes a tar of regular files."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A tar header with any claims, true or not."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(format=tarfile.GNU_FORMAT)
