# SPDX-License-Identifier: Apache-2.0
"""Writes and reads the bytes of the two members of an adapter's file; see `nemo_adapter_packing` for what they hold.

`model_config.yaml` holds the SHA-256 of `adapter.safetensors`. Its last line, `checksum:`, is the SHA-256 of all before
it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

import torch
import yaml

from nemo_tied_lora.checkpoint.nemo_adapter_packing import (
    CONFIG_MEMBER,
    MAX_WRITTEN_CONFIG_BYTES,
    PRUNED_VERSION,
    Packed,
    data_bytes,
    state_header,
)

__all__ = ["StateWriter", "content_facts", "raw_bytes", "seal", "unpack", "unseal"]


_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_SEAL = re.compile(rb"\nchecksum: ([0-9a-f]{64})\n\Z")


def unpack(tensors: Mapping[str, torch.Tensor], packed: Iterable[Packed]) -> dict[str, torch.Tensor]:
    """The state from the file's tensors, which must have the packed shapes."""
    state: dict[str, torch.Tensor] = {}
    for part in packed:
        parts = tensors[part.name] if part.is_stacked else [tensors[part.name]]
        state |= {name: tensor.contiguous() for name, tensor in zip(part.members, parts, strict=True)}
    return state


class StateWriter:
    """Writes `adapter.safetensors` tensor by tensor. Keeps no tensor in memory.

    Args:
        file: where to write.
        packed: what will be written, in this order.
        dtype: the dtype of all tensors.

    Raises:
        ValueError: the format has no such dtype.
    """

    def __init__(self, file: IO[bytes], packed: Sequence[Packed], dtype: torch.dtype):
        self._file, self._dtype = file, dtype
        self._expected = [(name, part) for part in packed for name in part.members]
        self._hash = hashlib.sha256()
        if dtype not in _DTYPES:
            raise ValueError(f"state: {dtype} cannot be stored; use one of {', '.join(map(str, _DTYPES))}")
        self._header = state_header(packed, _DTYPES[dtype])
        self.size = len(self._header) + data_bytes(packed, dtype.itemsize)

    def begin(self) -> None:
        """Writes the header."""
        self._put(self._header)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor of the state.

        Raises:
            ValueError: the tensor is not finite, has another dtype, or is not the next one.
        """
        if not self._expected or self._expected[0][0] != name:
            raise ValueError(f"state: {name} is not the next tensor of the file")
        if tensor.dtype != self._dtype:
            raise ValueError(f"state: {name} is {tensor.dtype}, the others are {self._dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"state: {name} holds NaN or infinity; it would not load again")
        self._put(raw_bytes(tensor))
        self._expected.pop(0)

    def end(self) -> dict[str, Any]:
        """Returns what the YAML records about the member."""
        assert not self._expected
        return _facts(self.size, self._hash.hexdigest())

    def _put(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)


def content_facts(content: bytes) -> dict[str, Any]:
    """What the YAML records about a whole `adapter.safetensors`."""
    return _facts(len(content), hashlib.sha256(content).hexdigest())


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bits in the order of the file."""
    elements: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(elements)


def seal(description: Mapping[str, Any]) -> bytes:
    """Returns `model_config.yaml`, with its checksum.

    Raises:
        ValueError: it is too large. Long facts about the run belong beside an adapter, not in it.
    """
    body = yaml.dump(dict(description), Dumper=_PlainDumper, sort_keys=False, default_flow_style=None, width=1 << 20)
    content = body.encode() + f"checksum: {hashlib.sha256(body.encode()).hexdigest()}\n".encode()
    if len(content) > MAX_WRITTEN_CONFIG_BYTES:
        raise ValueError(
            f"{CONFIG_MEMBER}: would have {len(content)} bytes, more than {MAX_WRITTEN_CONFIG_BYTES}; pass fewer facts"
        )
    return content


def unseal(content: bytes) -> dict[str, Any]:
    """Returns the YAML's values, after comparing the checksum (which format version 1 does not have).

    Raises:
        ValueError: the YAML is not a mapping, or its checksum is wrong or missing.
        yaml.YAMLError: not YAML, or YAML with aliases or tags.
    """
    sealed = _SEAL.search(content)
    if sealed and hashlib.sha256(content[: sealed.start() + 1]).hexdigest().encode() != sealed[1]:
        raise ValueError(f"{CONFIG_MEMBER} does not have its checksum")
    description = yaml.load(content, Loader=_StrictLoader)
    if not isinstance(description, dict):
        raise ValueError(f"{CONFIG_MEMBER} holds no keys")
    version = description.get("format_version")
    if not sealed and isinstance(version, int) and 1 < version <= PRUNED_VERSION:
        raise ValueError(f"{CONFIG_MEMBER} has no checksum")
    description.pop("checksum", None)
    return description


class _PlainDumper(yaml.SafeDumper):
    """Writes no anchors: a value that occurs twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _StrictLoader(yaml.SafeLoader):
    """Refuses aliases, by which a few hundred bytes could become any number of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def _facts(size: int, sha256: str) -> dict[str, Any]:
    return {"bytes": size, "sha256": sha256}
