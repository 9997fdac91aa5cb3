# SPDX-License-Identifier: Apache-2.0
"""The two members of an adapter's file, as bytes.

`adapter.safetensors` holds each tied tensor once, under its name, and what belongs to layers or experts stacked over
them: `linear_qkv.u` (layers, r) holds the u of every selected layer in their order, so that the header stays small
however many layers there are. (Version 1 held each layer's tensors apart.)

`model_config.yaml` ends in a line `checksum:` with the SHA-256 of all before it, and holds that of the tensors' member.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
import yaml

from nemo_tied_lora.adapter.full_state import expected_shapes
from nemo_tied_lora.adapter.shapes import TargetSpec
from nemo_tied_lora.config import TiedLoraConfig

__all__ = [
    "CONFIG_MEMBER",
    "DTYPES",
    "FORMAT_VERSION",
    "MAX_CONFIG_BYTES",
    "STATE_MEMBER",
    "Packed",
    "StateWriter",
    "content_facts",
    "data_bytes",
    "order_of_writing",
    "pack",
    "raw_bytes",
    "seal",
    "unpack",
    "unseal",
]


FORMAT_VERSION = 2
CONFIG_MEMBER = "model_config.yaml"
STATE_MEMBER = "adapter.safetensors"
MAX_CONFIG_BYTES = 256 * 1024
# The whole file may be 64 KiB larger than its tensors; the tensors' header and the tar's own blocks take the rest.
_MAX_WRITTEN_CONFIG_BYTES = 44 * 1024
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NUMBERED = re.compile(r"\blayers\.\d+\.|(?<=\bexperts\.)\d+\.")
_SEAL = re.compile(rb"\nchecksum: ([0-9a-f]{64})\n\Z")


@dataclass(frozen=True)
class Packed:
    """One tensor of the file: a tied tensor, or `members` (names of the state) stacked along a new first dim."""

    name: str
    shape: tuple[int, ...]
    members: tuple[str, ...]

    @property
    def is_stacked(self) -> bool:
        """Whether the first dim counts members."""
        return self.members != (self.name,)


def pack(shapes: Mapping[str, tuple[int, ...]]) -> list[Packed]:
    """How a state (name to whole shape, in order) lies in the file."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault((_NUMBERED.sub("", name), shape), []).append(name)
    return [
        Packed(name, shape if members == [name] else (len(members), *shape), tuple(members))
        for (name, shape), members in groups.items()
    ]


def unpack(tensors: Mapping[str, torch.Tensor], packed: Iterable[Packed]) -> dict[str, torch.Tensor]:
    """The state from the file's tensors, which must have the packed shapes."""
    state: dict[str, torch.Tensor] = {}
    for part in packed:
        parts = tensors[part.name] if part.is_stacked else [tensors[part.name]]
        state |= {name: tensor.contiguous() for name, tensor in zip(part.members, parts, strict=True)}
    return state


def data_bytes(packed: Iterable[Packed], dtype: torch.dtype) -> int:
    """Bytes of the tensors alone."""
    return sum(math.prod(part.shape) for part in packed) * dtype.itemsize


class StateWriter:
    """Writes `adapter.safetensors` tensor by tensor, holding none.

    Args:
        file: where.
        packed: what will be written, in this order.
        dtype: of all tensors.
    """

    def __init__(self, file: IO[bytes], packed: Iterable[Packed], dtype: torch.dtype):
        self._file, self._dtype = file, dtype
        self._expected = [(name, part) for part in packed for name in part.members]
        self._hash = hashlib.sha256()
        self._header = _state_header(dict.fromkeys(part for _, part in self._expected), dtype)
        self.size = len(self._header) + sum(
            math.prod(part.shape) // len(part.members) * dtype.itemsize for _, part in self._expected
        )

    def begin(self) -> None:
        """The header."""
        self._put(self._header)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor of the state.

        Raises:
            ValueError: it is not finite, has another dtype, or comes out of order.
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
        """What the YAML says of the member."""
        assert not self._expected
        return _facts(self.size, self._hash.hexdigest())

    def _put(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)


def content_facts(content: bytes) -> dict[str, Any]:
    """What the YAML says of a whole `adapter.safetensors`."""
    return _facts(len(content), hashlib.sha256(content).hexdigest())


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bits as they lie in the file."""
    elements: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(elements)


def seal(description: Mapping[str, Any]) -> bytes:
    """`model_config.yaml` with its checksum.

    Raises:
        ValueError: too large: facts about the run belong beside an adapter, not in it.
    """
    body = yaml.dump(dict(description), Dumper=_PlainDumper, sort_keys=False, default_flow_style=None, width=1 << 20)
    content = body.encode() + f"checksum: {hashlib.sha256(body.encode()).hexdigest()}\n".encode()
    if len(content) > _MAX_WRITTEN_CONFIG_BYTES:
        raise ValueError(
            f"{CONFIG_MEMBER}: would have {len(content)} bytes, more than {_MAX_WRITTEN_CONFIG_BYTES}; "
            "hand over fewer facts"
        )
    return content


def unseal(content: bytes) -> dict[str, Any]:
    """The YAML's values. The checksum is compared where the format has one (from version 2 on).

    Raises:
        ValueError: no mapping, or another checksum. yaml.YAMLError: no YAML, or one with aliases or tags.
    """
    sealed = _SEAL.search(content)
    if sealed and hashlib.sha256(content[: sealed.start() + 1]).hexdigest().encode() != sealed[1]:
        raise ValueError(f"{CONFIG_MEMBER} does not have its checksum")
    description = yaml.load(content, Loader=_StrictLoader)
    if not isinstance(description, dict):
        raise ValueError(f"{CONFIG_MEMBER} holds no keys")
    version = description.get("format_version")
    if not sealed and isinstance(version, int) and 1 < version <= FORMAT_VERSION:
        raise ValueError(f"{CONFIG_MEMBER} has no checksum")
    description.pop("checksum", None)
    return description


class _PlainDumper(yaml.SafeDumper):
    """Without anchors: a value that stands in two places is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _StrictLoader(yaml.SafeLoader):
    """Without aliases, by which a few hundred bytes could become any number of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def _facts(size: int, sha256: str) -> dict[str, Any]:
    return {"bytes": size, "sha256": sha256}


def _state_header(packed: Iterable[Packed], dtype: torch.dtype) -> bytes:
    """As safetensors writes it: a length, compact JSON, spaces up to a multiple of 8."""
    name_of_dtype = next((name for name, known in DTYPES.items() if known == dtype), None)
    if name_of_dtype is None:
        raise ValueError(f"state: {dtype} cannot be stored; use one of {', '.join(map(str, DTYPES.values()))}")
    header: dict[str, Any] = {}
    offset = 0
    for part in packed:
        end = offset + math.prod(part.shape) * dtype.itemsize
        header[part.name] = {"dtype": name_of_dtype, "shape": list(part.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def order_of_writing(config: TiedLoraConfig, specs: Mapping[str, TargetSpec]) -> list[str]:
    """The state's names in the order in which the file holds them."""
    return [name for part in pack(expected_shapes(config, specs)) for name in part.members]
