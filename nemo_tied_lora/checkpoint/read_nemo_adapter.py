# SPDX-License-Identifier: Apache-2.0
"""Reads an adapter's `.nemo` file without a model.

The file is a tar of `adapter.safetensors` (whole tensors, tied ones once) and `model_config.yaml`; see
`nemo_adapter_packing`. Reading unpickles nothing and unpacks nothing to disk. Imports no Megatron.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load as load_safetensors

from nemo_tied_lora.adapter.experts import linear_of
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.full_state import check_state
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.checkpoint.nemo_adapter_format import content_facts, unpack, unseal
from nemo_tied_lora.checkpoint.nemo_adapter_packing import (
    CONFIG_MEMBER,
    DTYPE_BYTES,
    FORMAT_VERSION,
    MAX_CONFIG_BYTES,
    PRUNED_VERSION,
    STATE_MEMBER,
    Packed,
    data_bytes,
    most_tensors,
    order_of_writing,
    pack,
)
from nemo_tied_lora.checkpoint.pruned_tensors import PrunedTensors, masks_in
from nemo_tied_lora.checkpoint.seeded_factors import FrozenFactors
from nemo_tied_lora.checkpoint.tar import Member, TarError, find_members, has_member
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError

__all__ = ["AdapterFile", "AdapterFileError", "is_adapter_file", "read_adapter"]


_MAX_STATE_HEADER_BYTES = 1 << 24
_MAX_SIDE, _MAX_LAYERS, _MAX_EXPERTS = 1 << 24, 1 << 16, 1 << 12


class AdapterFileError(ConfigError):
    """The file is not a complete adapter of a known format, or does not fit the model. The message says which."""

    def __init__(self, message: str) -> None:
        super().__init__(message.splitlines())


@dataclass(frozen=True)
class AdapterFile:
    """The contents of an adapter's file."""

    config: TiedLoraConfig
    shapes: dict[str, LinearShape]
    """Group to whole shape and adapted layers."""
    state: dict[str, torch.Tensor]
    """Whole tensors by name."""
    yaml: dict[str, Any]
    """All of `model_config.yaml`."""
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of a rank budget: the name of each u to its mask, (rank,) bool. Empty if nothing was pruned. `state` has 0 where the
    mask has."""

    def ranks(self) -> dict[str, int]:
        """The entries that each linear has left, as {"layers.7.linear_qkv": 3}; empty without masks."""
        return {name.removesuffix(".u"): int(mask.sum()) for name, mask in self.masks.items()}


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Reads a `.nemo` adapter without a model.

    Raises:
        AdapterFileError: not a tar, truncated, a member missing, an unknown format version, an unreadable part, a
            configuration out of bounds, tensors that do not fit the configuration or are not finite, a wrong checksum,
            or a seed from which this version of torch draws another frozen factor.
        FileNotFoundError: the file does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise AdapterFileError(f"{path}: is a folder, not a .nemo adapter file")
    with open(path, "rb") as file:
        try:
            return _read(file)
        except ConfigError as error:
            raise AdapterFileError("\n".join(f"{path}: {problem}" for problem in error.problems)) from error
        except TarError as error:
            raise AdapterFileError(f"{path}: {error}") from error
        except Exception as error:  # whatever a damaged YAML or safetensors raises
            raise AdapterFileError(f"{path}: damaged: {type(error).__name__}: {_short(error)}") from error


def is_adapter_file(path: str | os.PathLike) -> bool:
    """Returns whether the file is a tar with a tied adapter's state. Stock NeMo adapters have other members."""
    try:
        with open(path, "rb") as file:
            return has_member(file, STATE_MEMBER)
    except OSError:
        return False


def _read(file: IO[bytes]) -> AdapterFile:
    members = find_members(file, (CONFIG_MEMBER, STATE_MEMBER))
    missing = {CONFIG_MEMBER, STATE_MEMBER} - members.keys()
    if missing:
        raise TarError(f"{', '.join(sorted(missing))} is missing; not a tied-LoRA adapter")
    if members[CONFIG_MEMBER].size > MAX_CONFIG_BYTES:
        raise TarError(f"member {CONFIG_MEMBER!r} claims {members[CONFIG_MEMBER].size} bytes")
    description = unseal(_content(file, members[CONFIG_MEMBER]))
    version = description.get("format_version")
    if version not in (1, FORMAT_VERSION, PRUNED_VERSION) or isinstance(version, bool):
        raise TarError(f"format_version {version!r} is unknown; this version reads 1 to {PRUNED_VERSION}")
    config = TiedLoraConfig.from_mapping(description["peft"]["tied_lora"])
    shapes = {group: LinearShape.from_dict(stored) for group, stored in description["targets"].items()}
    _check_shapes(config, shapes)
    content = _state_content(file, members[STATE_MEMBER], pack(most_tensors(config, shapes)))
    tensors = load_safetensors(content)
    masks = masks_in(shapes, config.rank, tensors) if version == PRUNED_VERSION else {}
    pruned = PrunedTensors(config, shapes, masks)
    packed = pack(pruned.shapes) if version > 1 else [Packed(n, shape, (n,)) for n, shape in pruned.shapes.items()]
    _check_tensors(content, tensors, packed, description.get("state"), version)
    dtype = next(iter(tensors.values())).dtype
    state = {name: pruned.restored(name, tensor) for name, tensor in unpack(tensors, packed).items()}
    frozen = FrozenFactors(config, shapes)
    for name in order_of_writing(config, shapes):
        if name in frozen.names:
            state[name] = frozen.draw(name, dtype)
    frozen.compare(description.get("frozen_factors"))
    whole = {name: state[name] for name in expected_shapes(config, shapes)}
    return AdapterFile(config, shapes, whole, description, masks)


def _state_content(file: IO[bytes], member: Member, most: Sequence[Packed]) -> bytes:
    """Reads the member, after comparing its size with what the configuration needs at most."""
    largest = data_bytes(most, max(DTYPE_BYTES.values())) + _MAX_STATE_HEADER_BYTES
    if member.size > largest:
        raise TarError(f"member {STATE_MEMBER!r} claims {member.size} bytes; the configuration asks for fewer")
    return _content(file, member)


def _check_tensors(
    content: bytes, tensors: Mapping[str, torch.Tensor], packed: Sequence[Packed], recorded: object, version: int
) -> None:
    """Checks the tensors' names, shapes, dtypes and values, and the member's checksum."""
    problems: list[str] = []
    try:
        check_state(tensors, {part.name: part.shape for part in packed})
    except ValueError as error:
        problems += str(error).splitlines()
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    if version > 1 and len(dtypes) > 1:
        problems.append(f"state: tensors of different dtypes: {', '.join(sorted(dtypes))}")
    if version > 1 and content_facts(content) != recorded:
        problems.append(f"{STATE_MEMBER} does not have the checksum that {CONFIG_MEMBER} names: damaged")
    if problems:
        raise ConfigError(problems)


def _check_shapes(config: TiedLoraConfig, shapes: Mapping[str, LinearShape]) -> None:
    """Refuses parts of the YAML that contradict each other, and sizes that no model has, before they are used."""
    problems = []
    if tuple(dict.fromkeys(linear_of(group) for group in shapes)) != tuple(config.targets):
        names = ", ".join(shapes) or "none"
        problems.append(f"targets: shapes of {names}, but {', '.join(config.targets)} were adapted")
    for target, shape in shapes.items():
        if shape.kind not in ("column", "row") or shape.num_blocks not in (1, 2):
            problems.append(f"targets: {target}: kind {shape.kind!r}, blocks {shape.num_blocks!r}: unknown")
        if not all(type(side) is int and config.rank <= side <= _MAX_SIDE for side in shape.sides):
            problems.append(f"targets: {target}: shape {shape.sides} does not fit rank {config.rank}")
        if type(shape.num_experts) is not int or not 1 <= shape.num_experts <= _MAX_EXPERTS:
            problems.append(f"targets: {target}: num_experts {shape.num_experts!r} is not a number of experts")
        layers = shape.layers
        if len(layers) > _MAX_LAYERS or not all(type(n) is int and 0 <= n < _MAX_LAYERS for n in layers):
            problems.append(f"targets: {target}: layers are not layer numbers")
        elif not layers or len(set(layers)) < len(layers):
            problems.append(f"targets: {target}: layers are missing or repeated")
    if problems:
        raise ConfigError(problems)


def _content(file: IO[bytes], member: Member) -> bytes:
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) != member.size:
        raise TarError("truncated")
    return content


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else f"{text[:300]} ..."
