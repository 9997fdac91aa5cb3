# SPDX-License-Identifier: Apache-2.0
"""Reads `.metadata`, the pickle in a distributed checkpoint that lists where its tensors are, with an allow-list.

No code in the pickle can run: any name that is not in the list below is an error. torch's own safe reader does not know
the pickle protocol of this file.
"""

from __future__ import annotations

import importlib
import io
import pickle
from typing import Any

import torch

from nemo_tied_lora.errors import ConfigError

__all__ = ["read_dcp_metadata"]

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


def read_dcp_metadata(content: bytes) -> Any:
    """Unpickles `.metadata` to a `torch.distributed.checkpoint.metadata.Metadata`.

    Raises:
        ConfigError: the content is damaged, or asks for a name that is not in the list.
    """
    if len(content) > _MAX_METADATA_BYTES:
        raise ConfigError([f"base: .metadata has {len(content)} bytes"])
    try:
        return _MetadataUnpickler(io.BytesIO(content)).load()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError([f"base: .metadata cannot be read: {type(error).__name__}: {error}"]) from error


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
            raise ConfigError([f"base: .metadata asks for {module}.{name}, which is not a class of plain data"])
        return found
