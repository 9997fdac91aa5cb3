# SPDX-License-Identifier: Apache-2.0
"""Builds a Llama style model with a random adapter, and reads the members of adapter files."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import torch

from nemo_tied_lora import TiedLoraConfig, inject
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.injected_adapter import Adapter
from tests.harness.tiny_gpt import build_gpt, full_tensor

__all__ = ["LAYERS", "LLAMA", "RANK", "STATE", "YAML", "Members", "assert_same", "build", "members_of"]

LAYERS, RANK = 4, 3
LLAMA: dict[str, Any] = {"num_layers": LAYERS, "llama": True, "groups": 2}
CONFIG: dict[str, Any] = {"preset": "tl6", "rank": RANK, "alpha": 5.0}
YAML, STATE = "model_config.yaml", "adapter.safetensors"
Members = dict[str, bytes]


def build(model: Any = None, **fields: Any) -> Adapter:
    """Injects an adapter with random factors into a Llama style model of 4 layers, or into `model` (a model, or its chunks)."""
    adapter = inject(build_gpt(**LLAMA) if model is None else model, TiedLoraConfig.from_mapping({**CONFIG, **fields}))
    shapes = expected_shapes(adapter.config, adapter.shapes)
    adapter.load_full_state({name: full_tensor(f"file {name}", shape) for name, shape in shapes.items()})
    return adapter


def members_of(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    assert [name for name in got if got[name].dtype != expected[name].dtype] == []
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
