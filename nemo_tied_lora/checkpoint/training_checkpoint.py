# SPDX-License-Identifier: Apache-2.0
"""A training checkpoint on disk: a folder that exists under its name only when it is whole.

    checkpoint.json             what the run was, its counters, its schedules; no tensors but single numbers
    linear_qkv.safetensors      per target, whole tensors: "adapter/linear_qkv.A", "exp_avg/linear_qkv.A", ...
    random_states.safetensors   per rank: "3/torch", ...

It is written beside its place and renamed, and renamed away before it is removed. A run that is killed at any moment
leaves whole checkpoints and hidden remains; `remove_leftovers` sweeps the remains.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import write_atomically, write_json

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "CheckpointWriter",
    "is_checkpoint",
    "read_description",
    "read_tensors",
    "remove",
    "remove_leftovers",
    "slots",
]

FORMAT_VERSION = 1
_DESCRIPTION = "checkpoint.json"
_PARTIAL, _REMOVED = ".partial", ".removed"
_UNFINISHED = "-unfinished"  # NeMo's marker beside a checkpoint that is being written or removed
_LAST = "-last"


class CheckpointError(ConfigError):
    """The checkpoint is damaged, of an unknown format, or of another run. The message says which."""


class CheckpointWriter:
    """Writes one checkpoint; one process. `finish` makes it visible, all at once.

    Args:
        path: the folder to make; one of that name is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}{_PARTIAL}")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)

    def add(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Adds `name`.safetensors, made durable.

        Raises:
            OSError: it cannot be written.
        """
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        write_atomically(self._partial / f"{name}.safetensors", content)

    def finish(self, description: Mapping[str, Any]) -> None:
        """Writes the description and gives the folder its name."""
        files = {file.name: file.stat().st_size for file in sorted(self._partial.iterdir())}
        write_json(self._partial / _DESCRIPTION, {"format_version": FORMAT_VERSION, "files": files, **description})
        _make_durable(self._partial)
        replaced = _hide(self.path)
        os.rename(self._partial, self.path)
        _make_durable(self.path.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def abandon(self) -> None:
        """Drops what was written."""
        shutil.rmtree(self._partial, ignore_errors=True)


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether the folder is a checkpoint of this kind; NeMo's own are files, or folders with other contents.

    What is being written or removed has a hidden name, and is none.
    """
    hidden = os.path.basename(os.path.abspath(path)).startswith(".")
    return not hidden and (Path(path) / _DESCRIPTION).is_file()


def read_description(path: str | os.PathLike) -> dict[str, Any]:
    """`checkpoint.json`, after the files that it lists were found whole.

    Raises:
        CheckpointError: no checkpoint, an unknown format, a file missing or cut short.
    """
    folder = Path(path)
    if not is_checkpoint(folder):
        raise CheckpointError([f"{folder}: is no training checkpoint: {_DESCRIPTION} is missing"])
    try:
        description = json.loads((folder / _DESCRIPTION).read_text())
        version, files = description["format_version"], dict(description["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError([f"{folder}/{_DESCRIPTION}: damaged: {type(error).__name__}: {error}"]) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            [f"{folder}: format_version {version!r} is unknown; this version reads {FORMAT_VERSION}"]
        )
    problems = []
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            problems.append(f"{folder}/{name}: {'is missing' if found is None else f'has {found} bytes'}, not {size}")
    if problems:
        raise CheckpointError(problems)
    return description


def read_tensors(path: str | os.PathLike, prefix: str) -> dict[str, torch.Tensor]:
    """Every tensor "prefix/name" of the checkpoint, by name; other tensors are not read.

    Raises:
        CheckpointError: a file is damaged.
    """
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  not a dictionary
                    if key.startswith(f"{prefix}/"):
                        found[key.removeprefix(f"{prefix}/")] = tensors.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError([f"{file}: damaged: {error}"]) from error
    return found


def slots(path: str | os.PathLike) -> list[str]:
    """The names before the slash of what the targets' files hold, but for "adapter": an optimizer's slots."""
    found: set[str] = set()
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {key.split("/")[0] for key in tensors.keys()}  # noqa: SIM118  not a dictionary
    return sorted(name for name in found if name != "adapter" and not name.isdigit())


def remove(path: Path) -> None:
    """Removes a checkpoint, or nothing where there is none; killed in between, it is gone from sight all the same."""
    shutil.rmtree(_hide(path), ignore_errors=True)


def remove_leftovers(folder: Path, *, first: bool, timeout: float = 120.0) -> None:
    """Makes a folder of checkpoints fit to resume from, whatever the last run was doing when it was killed.

    Remains are swept; markers beside checkpoints of this kind are dropped, for those are whole; of several "-last"
    the newest stays (a run may be killed after it wrote one and before it removed the one before). NeMo would refuse
    to choose, and end the run. All ranks call it before NeMo looks; `first` does the work, the others wait for it.

    Raises:
        CheckpointError: the first rank did not do it within `timeout` seconds.
    """
    if first:
        _undo_half_replaced(folder)
        for remains in _remains(folder):
            shutil.rmtree(remains, ignore_errors=True)
        for marker in _idle_markers(folder):
            marker.unlink(missing_ok=True)
        for older in _last_checkpoints(folder)[:-1]:
            remove(older)
        return
    started = time.monotonic()
    while _remains(folder) or _idle_markers(folder) or len(_named_last(folder)) > 1:
        if time.monotonic() - started > timeout:
            raise CheckpointError([f"{folder}: holds what a killed run left, and rank 0 does not clear it; is it up?"])
        time.sleep(0.1)


def _hide(path: Path) -> Path:
    """Renames a checkpoint, if there is one, out of sight."""
    hidden = path.with_name(f".{path.name}{_REMOVED}")
    shutil.rmtree(hidden, ignore_errors=True)
    if path.exists():
        os.rename(path, hidden)
    return hidden


def _undo_half_replaced(folder: Path) -> None:
    """A checkpoint that was hidden for one of its own name, which then was not given it, comes back."""
    for hidden in folder.glob(f".*{_REMOVED}"):
        name = hidden.name.removeprefix(".").removesuffix(_REMOVED)
        if (folder / f".{name}{_PARTIAL}").exists() and not (folder / name).exists():
            os.rename(hidden, folder / name)


def _remains(folder: Path) -> list[Path]:
    return [path for suffix in (_PARTIAL, _REMOVED) for path in folder.glob(f".*{suffix}")]


def _idle_markers(folder: Path) -> list[Path]:
    """Markers whose checkpoint is whole, or was never given its name. Those of NeMo's own checkpoints are kept."""
    markers = []
    for marker in folder.glob(f"*{_UNFINISHED}"):
        checkpoint = marker.with_name(marker.name.removesuffix(_UNFINISHED))
        theirs = [checkpoint] if checkpoint.is_dir() else list(folder.rglob(f"{checkpoint.name}.ckpt"))
        if is_checkpoint(checkpoint) or not any(path.exists() for path in theirs):
            markers.append(marker)
    return markers


def _named_last(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"*{_LAST}") if is_checkpoint(path)]


def _last_checkpoints(folder: Path) -> list[Path]:
    """Those named "-last", the newest last."""
    return sorted(_named_last(folder), key=lambda path: (read_description(path).get("step", 0), path))


def _make_durable(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
