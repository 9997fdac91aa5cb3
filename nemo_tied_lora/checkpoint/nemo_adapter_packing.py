# SPDX-License-Identifier: Apache-2.0
"""What an adapter's `.nemo` file holds and how large it is: members, order of tensors, header, bounds.

`adapter.safetensors` holds each tied tensor once, under its name. It stacks what belongs to layers or experts:
`linear_qkv.u` (layers, r) holds the u of every selected layer in their order. So the header stays small for any number
of layers. (Version 1 held each layer's tensors apart.) Version 3 is that of adapters with a rank budget: it adds masks, and
leaves dead atoms out of tied tensors; see `pruned_tensors`.

Imports no torch: `tied-lora plan` computes the file's size with the functions that write it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_tied_lora.adapter.factor_names import FactorName, expected_shapes, factor_names
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.checkpoint.tar import tar_bytes
from nemo_tied_lora.config import TiedLoraConfig

__all__ = [
    "CONFIG_MEMBER",
    "DTYPE_BYTES",
    "FORMAT_VERSION",
    "MAX_CONFIG_BYTES",
    "MAX_WRITTEN_CONFIG_BYTES",
    "PRUNED_VERSION",
    "STATE_MEMBER",
    "Packed",
    "data_bytes",
    "largest_file",
    "mask_name",
    "most_tensors",
    "order_of_writing",
    "pack",
    "state_header",
    "tensors_in_file",
]

FORMAT_VERSION = 2
PRUNED_VERSION = 3
CONFIG_MEMBER = "model_config.yaml"
STATE_MEMBER = "adapter.safetensors"
MAX_CONFIG_BYTES = 256 * 1024
"""What is read: files of other versions may hold more than this one writes."""
MAX_WRITTEN_CONFIG_BYTES = 44 * 1024
"""Keeps a file within 64 KiB of its tensors; their header and the tar's own blocks take the rest."""
DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""safetensors' names of the dtypes that a file may hold."""


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


def pack(tensors: Mapping[str, tuple[int, ...]]) -> list[Packed]:
    """The file's tensors for a state (name to whole shape, in order).

    Tensors of different shapes are not stacked: experts' tied tensors that have lost different numbers of atoms.
    """
    stacks: dict[str, list[str]] = {}
    for name in tensors:
        stacks.setdefault(FactorName.parse(name).stacked, []).append(name)
    packed: list[Packed] = []
    for stack, members in stacks.items():
        first = tensors[members[0]]
        if members == [stack] or any(tensors[name] != first for name in members):
            packed += [Packed(name, tensors[name], (name,)) for name in members]
        else:
            packed.append(Packed(stack, (len(members), *first), tuple(members)))
    return packed


def mask_name(name: str) -> str:
    """The name of the mask of a u: "layers.7.linear_qkv.mask" for "layers.7.linear_qkv.u"."""
    return f"{name.removesuffix('u')}mask"


def tensors_in_file(
    config: TiedLoraConfig, shapes: Mapping[str, LinearShape], live: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Name to whole shape of the tensors that the file holds: the state's, except those that it holds as their seed.

    Args:
        live: of a pruned adapter: the name of the linears' tied tensors, as "linear_qkv", to the atoms that are left. The
            file also holds the masks then.
    """
    held, masks = {}, {}
    for name in factor_names(config, shapes):
        shape = shapes[name.group].factor_shape(name.factor, config.rank)
        if live is not None and name.layer is None:
            atoms = 0 if name.factor == "A" else 1
            shape = tuple(live[name.linear] if dim == atoms else n for dim, n in enumerate(shape))
        if name.factor not in config.seeded:
            held[str(name)] = shape
        if name.factor == "u" and live is not None:
            masks[mask_name(str(name))] = shape
    return held | masks


def most_tensors(config: TiedLoraConfig, shapes: Mapping[str, LinearShape]) -> dict[str, tuple[int, ...]]:
    """`tensors_in_file`, with masks and no dead atom if the configuration has a rank budget."""
    linears = (name.linear for name in factor_names(config, shapes))
    return tensors_in_file(config, shapes, None if config.budget is None else dict.fromkeys(linears, config.rank))


def order_of_writing(config: TiedLoraConfig, shapes: Mapping[str, LinearShape]) -> list[str]:
    """All names of the state, in the order in which the file holds them."""
    return [name for part in pack(expected_shapes(config, shapes)) for name in part.members]


def data_bytes(packed: Iterable[Packed], element_bytes: int) -> int:
    """Bytes of the tensors alone."""
    return sum(math.prod(part.shape) for part in packed) * element_bytes


def state_header(packed: Iterable[Packed], dtype: str) -> bytes:
    """The start of `adapter.safetensors` as safetensors writes it: a length, compact JSON, spaces up to a multiple of 8.

    Args:
        dtype: a key of `DTYPE_BYTES`.
    """
    header: dict[str, Any] = {}
    offset = 0
    for part in packed:
        end = offset + data_bytes([part], DTYPE_BYTES[dtype])
        header[part.name] = {"dtype": dtype, "shape": list(part.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def largest_file(config: TiedLoraConfig, shapes: Mapping[str, LinearShape], element_bytes: int) -> int:
    """The size of an adapter's file that holds as many facts as it may: an upper bound, at most 64 KiB too high.

    With a rank budget on experts, higher by the entries of tied tensors that may be apart, about 200 bytes an expert.
    """
    packed = pack(most_tensors(config, shapes))
    if config.budget is not None:
        packed = [one for part in packed for one in _apart(part)]
    dtype = max((name for name, size in DTYPE_BYTES.items() if size == element_bytes), key=len)
    state = len(state_header(packed, dtype)) + data_bytes(packed, element_bytes)
    return tar_bytes([state, MAX_WRITTEN_CONFIG_BYTES])


def _apart(part: Packed) -> list[Packed]:
    """Experts' tied tensors one by one, as when they have lost different numbers of atoms; another part as it is."""
    if not part.is_stacked or FactorName.parse(part.members[0]).layer is not None:
        return [part]
    return [Packed(name, part.shape[1:], (name,)) for name in part.members]
