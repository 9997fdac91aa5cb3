# SPDX-License-Identifier: Apache-2.0
"""The adapter as one `.nemo` file: a tar of `model_config.yaml` and the layout-free state as safetensors.

Each tied tensor stands in it once, whole. Nothing in it is unpickled, and nothing is unpacked to disk.
"""

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from nemo_tied_lora.adapter import Adapter
from nemo_tied_lora.adapter_state import check_state, expected_shapes
from nemo_tied_lora.config import ConfigError, TiedLoraConfig
from nemo_tied_lora.experts import linear_of
from nemo_tied_lora.files import replace_file
from nemo_tied_lora.injection import inject
from nemo_tied_lora.sharding import TargetSpec
from nemo_tied_lora.tie_guard import check_ties

__all__ = [
    "FORMAT_VERSION",
    "AdapterFile",
    "AdapterFileError",
    "is_adapter_file",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]

FORMAT_VERSION = 1
_CONFIG_MEMBER = "model_config.yaml"
_STATE_MEMBER = "adapter.safetensors"
_MAX_CONFIG_BYTES = 1 << 20


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


def save_adapter(
    adapter: Adapter, path: str | os.PathLike, facts: Mapping[str, Any] | None = None, *, tie_guard: bool = True
) -> Path:
    """Writes the adapter beside `path` and renames it there. All ranks must call it; rank 0 writes.

    Args:
        adapter: on any layout.
        path: of the `.nemo` file.
        facts: plain values to keep in the YAML (base model, versions, training), beside the format's own keys.
        tie_guard: whether the ranks compare what they share first (see `tie_guard`).

    Raises:
        TieError: ranks that hold the same tensor hold different bits, on every rank; an older file is as it was.
        OSError: it could not be written, on every rank; an older file is as it was.
    """
    path = Path(path)
    if tie_guard:
        check_ties(adapter, f"before {path} was written: ")
    state = adapter.full_state()
    own = {
        "format_version": FORMAT_VERSION,
        "peft": {"peft_scheme": "tied_lora", "tied_lora": adapter.config.as_dict()},
        "targets": {t: {**dataclasses.asdict(s), "layers": list(s.layers)} for t, s in adapter.specs.items()},
    }
    description = {**own, **{key: value for key, value in (facts or {}).items() if key not in own}}
    failure: Exception | None = None
    if _is_first_rank():
        try:
            members = {
                _CONFIG_MEMBER: yaml.safe_dump(description, sort_keys=False).encode(),
                _STATE_MEMBER: save_safetensors({name: t.contiguous() for name, t in state.items()}),
            }
            replace_file(path, lambda file: _write_tar(file, members))
        except Exception as error:
            failure = error
    _raise_on_every_rank(path, failure)
    return path


def load_adapter(model: nn.Module | Sequence[nn.Module], path: str | os.PathLike) -> Adapter:
    """Injects the file's adapter into a base model on any layout.

    Raises:
        AdapterFileError: the file cannot be read as an adapter, or its target shapes are not this model's.
        ConfigError: as `inject`.
    """
    file = read_adapter(path)
    adapter = inject(model, file.config)
    if adapter.specs != file.specs:
        differences = [
            f"{path}: {target}: the adapter was trained on {file.specs.get(target)}, this model has "
            f"{adapter.specs.get(target)}"
            for target in dict.fromkeys((*file.specs, *adapter.specs))
            if file.specs.get(target) != adapter.specs.get(target)
        ]
        adapter.remove()
        raise AdapterFileError("\n".join(differences))
    adapter.load_full_state(file.state)
    return adapter


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Reads a `.nemo` adapter without a model.

    Raises:
        AdapterFileError: not a tar, truncated, members missing, an unknown format version, an unreadable part, a
            configuration out of bounds, tensors that it does not ask for or that are not finite.
        FileNotFoundError: no such file.
    """
    members = _read_tar(Path(path))
    try:
        description = yaml.safe_load(members[_CONFIG_MEMBER])
        version = description["format_version"]
        if version != FORMAT_VERSION:
            raise AdapterFileError(
                f"{path}: format_version {version!r} is unknown; this version reads {FORMAT_VERSION}"
            )
        config = TiedLoraConfig.from_mapping(description["peft"]["tied_lora"])
        specs = {t: TargetSpec(**{**s, "layers": tuple(s["layers"])}) for t, s in description["targets"].items()}
        state = load_safetensors(members[_STATE_MEMBER])
        problems = _inconsistencies(config, specs, state)
    except AdapterFileError:
        raise
    except ConfigError as error:
        raise AdapterFileError("\n".join(f"{path}: {problem}" for problem in error.problems)) from error
    except Exception as error:  # whatever a damaged YAML or safetensors raises
        raise AdapterFileError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    if problems:
        raise AdapterFileError("\n".join(f"{path}: {problem}" for problem in problems))
    return AdapterFile(config, specs, {name: state[name] for name in expected_shapes(config, specs)}, description)


def _inconsistencies(
    config: TiedLoraConfig, specs: Mapping[str, TargetSpec], state: Mapping[str, torch.Tensor]
) -> list[str]:
    """What the file's parts say against each other, a line each."""
    if tuple(dict.fromkeys(linear_of(group) for group in specs)) != tuple(config.targets):
        return [f"targets: shapes of {', '.join(specs) or 'none'}, but {', '.join(config.targets)} were adapted"]
    try:
        check_state(state, expected_shapes(config, specs))
    except ValueError as error:
        return str(error).splitlines()
    return []


def _raise_on_every_rank(path: Path, failure: Exception | None) -> None:
    """Rank 0 tells the others how its write ended: they would wait for it for ever, or go on without a file."""
    told = [f"{type(failure).__name__}: {failure}" if failure else None]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise OSError(f"{path}: rank 0 could not write it: {told[0]}")


def is_adapter_file(path: str | os.PathLike) -> bool:
    """Whether the file is a tar with a tied adapter's state in it; stock NeMo adapters hold other members."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            return any(member.name.removeprefix("./") == _STATE_MEMBER for member in tar)
    except (tarfile.TarError, OSError):
        return False


def _write_tar(file: IO[bytes], members: Mapping[str, bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _read_tar(path: Path) -> dict[str, bytes]:
    """The two members' contents; anything else in the tar is an error, nothing is written to disk."""
    if path.is_dir():
        raise AdapterFileError(f"{path}: is a folder, not a .nemo adapter file")
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if name not in (_CONFIG_MEMBER, _STATE_MEMBER) or not info.isreg() or name in members:
                    raise AdapterFileError(f"{path}: unexpected member {info.name!r}; this is no tied-LoRA adapter")
                if info.size > (_MAX_CONFIG_BYTES if name == _CONFIG_MEMBER else path.stat().st_size):
                    raise AdapterFileError(f"{path}: member {info.name!r} claims {info.size} bytes")
                members[name] = tar.extractfile(info).read()  # type: ignore[union-attr]
                if len(members[name]) != info.size:
                    raise AdapterFileError(f"{path}: truncated in {info.name!r}")
    except tarfile.TarError as error:
        raise AdapterFileError(f"{path}: not a whole .nemo file: {error}") from error
    missing = {_CONFIG_MEMBER, _STATE_MEMBER} - members.keys()
    if missing:
        raise AdapterFileError(f"{path}: {', '.join(sorted(missing))} is missing; this is no tied-LoRA adapter")
    return members


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
