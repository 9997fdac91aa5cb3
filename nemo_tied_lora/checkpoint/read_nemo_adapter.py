# SPDX-License-Identifier: Apache-2.0
"""An adapter's `.nemo` file without a model: a tar of the layout-free state as safetensors, and `model_config.yaml`.

Each tied tensor stands in it once, whole. Nothing in it is unpickled, and nothing is unpacked to disk. See
`adapter_format` for the members, `tar_members` for what the tar may hold. Megatron is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load as load_safetensors

from nemo_tied_lora.adapter.full_state import check_state, expected_shapes
from nemo_tied_lora.adapter.shapes import TargetSpec
from nemo_tied_lora.checkpoint import nemo_adapter_format
from nemo_tied_lora.checkpoint.nemo_adapter_format import (
    CONFIG_MEMBER,
    FORMAT_VERSION,
    STATE_MEMBER,
    Packed,
    order_of_writing,
)
from nemo_tied_lora.checkpoint.seeded_factors import FrozenFactors
from nemo_tied_lora.checkpoint.tar import (
    Member,
    TarError,
    find_members,
    has_member,
)
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError

__all__ = ["AdapterFile", "AdapterFileError", "is_adapter_file", "read_adapter"]


_MAX_STATE_HEADER_BYTES = 1 << 24
_MAX_SIDE, _MAX_LAYERS = 1 << 24, 1 << 16


class AdapterFileError(ConfigError):
    """The file is not a whole adapter of a known format, or does not fit the model. The message says which."""

    def __init__(self, message: str) -> None:
        super().__init__(message.splitlines())


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds: the adapter's configuration, the base's target shapes, the state, the whole YAML."""

    config: TiedLoraConfig
    specs: dict[str, TargetSpec]
    state: dict[str, torch.Tensor]
    yaml: dict[str, Any]


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Reads a `.nemo` adapter without a model.

    Raises:
        AdapterFileError: not a tar, truncated, members missing, an unknown format version, an unreadable part, a
            configuration out of bounds, tensors that it does not ask for or that are not finite, another checksum than
            the file names, a frozen factor that this generator draws otherwise.
        FileNotFoundError: no such file.
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
    """Whether the file is a tar with a tied adapter's state in it; stock NeMo adapters hold other members."""
    try:
        with open(path, "rb") as file:
            return has_member(file, STATE_MEMBER)
    except OSError:
        return False


def _read(file: IO[bytes]) -> AdapterFile:
    members = find_members(file, (CONFIG_MEMBER, STATE_MEMBER))
    missing = {CONFIG_MEMBER, STATE_MEMBER} - members.keys()
    if missing:
        raise TarError(f"{', '.join(sorted(missing))} is missing; this is no tied-LoRA adapter")
    if members[CONFIG_MEMBER].size > nemo_adapter_format.MAX_CONFIG_BYTES:
        raise TarError(f"member {CONFIG_MEMBER!r} claims {members[CONFIG_MEMBER].size} bytes")
    description = nemo_adapter_format.unseal(_content(file, members[CONFIG_MEMBER]))
    version = description.get("format_version")
    if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
        raise TarError(f"format_version {version!r} is unknown; this version reads 1 and {FORMAT_VERSION}")
    config = TiedLoraConfig.from_mapping(description["peft"]["tied_lora"])
    specs = {t: TargetSpec(**{**s, "layers": tuple(s["layers"])}) for t, s in description["targets"].items()}
    _check_specs(config, specs)
    frozen = FrozenFactors(config, specs)
    shapes = {name: shape for name, shape in expected_shapes(config, specs).items() if name not in frozen.shapes}
    packed = (
        nemo_adapter_format.pack(shapes)
        if version > 1
        else [Packed(name, shape, (name,)) for name, shape in shapes.items()]
    )
    tensors = _read_tensors(file, members[STATE_MEMBER], packed, description.get("state"), version)
    dtype = next(iter(tensors.values())).dtype
    state = nemo_adapter_format.unpack(tensors, packed)
    for name in order_of_writing(config, specs):
        if name in frozen.shapes:
            state[name] = frozen.draw(name, dtype)
    frozen.compare(description.get("frozen_factors"))
    return AdapterFile(config, specs, {name: state[name] for name in expected_shapes(config, specs)}, description)


def _read_tensors(
    file: IO[bytes], member: Member, packed: Sequence[Packed], recorded: object, version: int
) -> dict[str, torch.Tensor]:
    """The file's tensors; their header's and the data's sizes are compared with the config before they are read."""
    largest = nemo_adapter_format.data_bytes(packed, torch.float64) + _MAX_STATE_HEADER_BYTES
    if member.size > largest:
        raise TarError(f"member {STATE_MEMBER!r} claims {member.size} bytes; the configuration asks for fewer")
    content = _content(file, member)
    tensors = load_safetensors(content)
    problems: list[str] = []
    try:
        check_state(tensors, {part.name: part.shape for part in packed})
    except ValueError as error:
        problems += str(error).splitlines()
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    if version > 1 and len(dtypes) > 1:
        problems.append(f"state: tensors of different dtypes: {', '.join(sorted(dtypes))}")
    if version > 1 and nemo_adapter_format.content_facts(content) != recorded:
        problems.append(f"{STATE_MEMBER} does not have the checksum that {CONFIG_MEMBER} names: damaged")
    if problems:
        raise ConfigError(problems)
    return tensors


def _check_specs(config: TiedLoraConfig, specs: Mapping[str, TargetSpec]) -> None:
    """What the YAML's parts say against each other, and sizes that no model has, before anything is made of them."""
    problems = []
    if tuple(dict.fromkeys(target.rpartition(".")[2] for target in specs)) != tuple(config.targets):
        names = ", ".join(specs) or "none"
        problems.append(f"targets: shapes of {names}, but {', '.join(config.targets)} were adapted")
    for target, spec in specs.items():
        sides = (spec.in_features, spec.out_features)
        if spec.kind not in ("column", "row") or spec.blocks not in (1, 2):
            problems.append(f"targets: {target}: kind {spec.kind!r}, blocks {spec.blocks!r}: unknown")
        if not all(type(side) is int and config.rank <= side <= _MAX_SIDE for side in sides):
            problems.append(f"targets: {target}: shape {sides} does not fit rank {config.rank}")
        layers = spec.layers
        if len(layers) > _MAX_LAYERS or not all(type(n) is int and 0 <= n < _MAX_LAYERS for n in layers):
            problems.append(f"targets: {target}: layers are no layer numbers")
        elif not layers or len(set(layers)) < len(layers):
            problems.append(f"targets: {target}: layers are missing or stand there twice")
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
