# SPDX-License-Identifier: Apache-2.0
"""Pickles that a checkpoint cannot do without, read with an allow-list: nothing in them can run.

A distributed checkpoint's `.metadata` and a legacy checkpoint's `data.pkl` describe where tensors lie. The names below
are all that such descriptions need; any other is an error.
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from nemo_tied_lora.errors import ConfigError

__all__ = ["StoredTensor", "read_dcp_metadata", "read_state_description"]

_DCP = "torch.distributed.checkpoint."
_METADATA_NAMES = {
    f"{_DCP}metadata": None,  # all of its classes are plain data
    f"{_DCP}planner": None,
    f"{_DCP}filesystem": {"_StorageInfo", "_StoragePrefix"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreSavePlan", "MCoreMetadata"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "builtins": {"set", "frozenset", "list", "dict", "tuple", "slice", "complex", "int"},
    "datetime": {"timedelta"},
}
_MAX_METADATA_BYTES = 1 << 30


class StoredTensor:
    """A tensor's place in a legacy archive: the storage's record and dtype, the first element, sizes and strides."""

    def __init__(
        self, storage: tuple[str, torch.dtype], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ):
        self.record, self.dtype = storage
        self.offset, self.shape, self.stride = offset, tuple(size), tuple(stride)


def read_dcp_metadata(content: bytes) -> Any:
    """A distributed checkpoint's `.metadata` (torch.distributed.checkpoint.metadata.Metadata).

    Raises:
        ConfigError: it is none, or asks for a name that a description does not need.
    """
    if len(content) > _MAX_METADATA_BYTES:
        raise ConfigError([f"base: .metadata has {len(content)} bytes"])
    return _load(_MetadataUnpickler(io.BytesIO(content)), ".metadata")


def read_state_description(content: bytes) -> Mapping[str, Any]:
    """A legacy state dict's `data.pkl`: name to StoredTensor, or to a placeholder for what is no tensor.

    Raises:
        ConfigError: as above, or no mapping.
    """
    state = _load(_StateUnpickler(io.BytesIO(content)), "data.pkl")
    if not isinstance(state, Mapping):
        raise ConfigError(["base: the checkpoint holds no state dict"])
    return state


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (
            name == "Size" or isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        ):
            return getattr(torch, name)
        if module == "torch" and name in ("device", "contiguous_format", "preserve_format"):
            return getattr(torch, name)
        allowed = _METADATA_NAMES.get(module, set())
        if allowed is not None and name not in allowed:
            raise ConfigError([f"base: .metadata asks for {module}.{name}, which no description of tensors needs"])
        found = getattr(importlib.import_module(module), name)
        if allowed is None and not (isinstance(found, type) and found.__module__ == module):
            raise ConfigError([f"base: .metadata asks for {module}.{name}, which is no class of plain data"])
        return found


class _StateUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return StoredTensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("_io", "BytesIO"):
            return io.BytesIO
        if module == "torch" and name.endswith("Storage") and hasattr(torch, name):
            return getattr(torch, name)
        raise ConfigError([f"base: the checkpoint asks for {module}.{name}, which no tensor needs"])

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        kind, storage, key, *_ = pid
        assert kind == "storage"
        return f"data/{key}", storage.dtype


def _load(unpickler: pickle.Unpickler, what: str) -> Any:
    try:
        return unpickler.load()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError([f"base: {what} cannot be read: {type(error).__name__}: {error}"]) from error
