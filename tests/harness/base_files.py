# SPDX-License-Identifier: Apache-2.0
"""Writes small base `.nemo` files by hand: right configuration, names and sizes, meaningless weights."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.harness.small_architecture import SMALL

__all__ = ["BASE_CONFIG", "PARTS", "base_members", "pack", "write_base"]

BASE_CONFIG: dict[str, Any] = {
    **SMALL,
    "mcore_gpt": True,
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    "nemo_version": "2.1.0",
}
PARTS = {"__0_0.distcp": 3000, "__0_1.distcp": 1700}
"""The files with weights, and their sizes."""


def base_members(**changes: Any) -> dict[str, bytes]:
    """The files of a base as NeMo 2.x writes it.

    Args:
        changes: keys of model_config.yaml; None leaves a key out.
    """
    config = {key: value for key, value in {**BASE_CONFIG, **changes}.items() if value is not None}
    stated = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    return {
        "tokenizer.model": bytes(700),
        "model_config.yaml": yaml.safe_dump(config).encode(),
        "model_weights/.metadata": pickle.dumps(_metadata()),
        "model_weights/metadata.json": json.dumps(stated).encode(),
        **{f"model_weights/{name}": b"w" * size for name, size in PARTS.items()},
        "model_weights/common.pt": b"c" * 100,
    }


def pack(members: Mapping[str, bytes], *, compressed: bool = False, mtime: float = 0) -> bytes:
    """The members as a tar. A time that is no whole number makes an extended header before each."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(content.getvalue()) if compressed else content.getvalue()


def write_base(path: Path, **changes: Any) -> Path:
    """Writes a base that every check of files accepts."""
    path.write_bytes(pack(base_members(**changes)))
    return path


def _metadata() -> Metadata:
    """A description of one tensor in each file, which ends at the file's end."""
    size = torch.Size([4])
    tensors = {
        name: TensorStorageMetadata(
            TensorProperties(torch.float32), size, [ChunkStorageMetadata(torch.Size([0]), size)]
        )
        for name in PARTS
    }
    stored = {MetadataIndex(name, torch.Size([0])): _StorageInfo(name, 500, PARTS[name] - 500) for name in PARTS}
    return Metadata(tensors, storage_data=stored)  # type: ignore[arg-type]
