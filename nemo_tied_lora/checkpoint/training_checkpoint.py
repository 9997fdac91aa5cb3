# SPDX-License-Identifier: Apache-2.0
"""Writes and reads a training checkpoint: a folder that has its name only while it is complete.

    checkpoint.json             description of the run, counters, schedules, single numbers
    linear_qkv.safetensors      one file per group, whole tensors: "adapter/linear_qkv.A", "exp_avg/linear_qkv.A", ...
    rank_budget.safetensors     of a rank budget: "rank_budget/mask", ..., vectors of all u's entries
    random_states.safetensors   per rank: "3/torch", ...

The folder is written under a hidden name and then renamed; before it is removed, it is hidden again. So a run that is
killed at any moment leaves complete checkpoints and hidden leftovers, which `remove_leftovers` deletes.
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
_UNFINISHED = "-unfinished"  # NeMo's marker beside a checkpoint while it is being written or removed
_LAST = "-last"


class CheckpointError(ConfigError):
    """The checkpoint is damaged, of an unknown format, or of another run. The message says which."""


class CheckpointWriter:
    """Writes one checkpoint from one process. It becomes visible as a whole in `finish`.

    Args:
        path: the folder to write. An existing one is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}{_PARTIAL}")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)

    def add(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Adds `name`.safetensors and syncs it to disk.

        Raises:
            OSError: the file cannot be written.
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
        """Deletes what was written."""
        shutil.rmtree(self._partial, ignore_errors=True)


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Returns whether the folder is a complete checkpoint of this format.

    NeMo's own checkpoints are files, or folders with other contents. A checkpoint that is being written or removed has
    a hidden name and does not count.
    """
    hidden = os.path.basename(os.path.abspath(path)).startswith(".")
    return not hidden and (Path(path) / _DESCRIPTION).is_file()


def read_description(path: str | os.PathLike) -> dict[str, Any]:
    """Reads `checkpoint.json` and checks that the files it lists exist and have their sizes.

    Raises:
        CheckpointError: not a checkpoint, an unknown format, or a file that is missing or truncated.
    """
    folder = Path(path)
    if not is_checkpoint(folder):
        raise CheckpointError([f"{folder}: not a training checkpoint: {_DESCRIPTION} is missing"])
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
    """Reads every tensor "prefix/name" of the checkpoint; returns them by name. Reads no other tensors.

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
    """The optimizer's slots in the checkpoint: the prefixes of its tensors, except "adapter", "rank_budget" and the ranks'
    numbers."""
    found: set[str] = set()
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {key.split("/")[0] for key in tensors.keys()}  # noqa: SIM118  not a dictionary
    return sorted(name for name in found if name not in ("adapter", "rank_budget") and not name.isdigit())


def remove(path: Path) -> None:
    """Removes a checkpoint, if there is one. If killed midway, it leaves only a hidden folder."""
    shutil.rmtree(_hide(path), ignore_errors=True)


def remove_leftovers(folder: Path, *, first: bool, timeout: float = 120.0) -> None:
    """Cleans a folder of checkpoints, so that a run can resume however the last one was killed.

    It deletes hidden leftovers, and NeMo's markers beside checkpoints of this format, which are complete. Of several
    "-last" checkpoints it keeps the newest: a run may be killed after it wrote one and before it removed the older one,
    and NeMo stops if it finds two. All ranks call it before NeMo reads the folder.

    Args:
        first: whether this rank does the work; the others wait for it.

    Raises:
        CheckpointError: the first rank did not finish within `timeout` seconds.
    """
    if first:
        _undo_half_replaced(folder)
        for leftover in _leftovers(folder):
            shutil.rmtree(leftover, ignore_errors=True)
        for marker in _idle_markers(folder):
            marker.unlink(missing_ok=True)
        for older in _last_checkpoints(folder)[:-1]:
            remove(older)
        return
    started = time.monotonic()
    while _leftovers(folder) or _idle_markers(folder) or len(_named_last(folder)) > 1:
        if time.monotonic() - started > timeout:
            problem = f"holds leftovers of a killed run, and rank 0 has not removed them in {timeout:g} s"
            raise CheckpointError([f"{folder}: {problem}; check that rank 0 runs"])
        time.sleep(0.1)


def _hide(path: Path) -> Path:
    """Gives a checkpoint, if there is one, a hidden name; returns the hidden path."""
    hidden = path.with_name(f".{path.name}{_REMOVED}")
    shutil.rmtree(hidden, ignore_errors=True)
    if path.exists():
        os.rename(path, hidden)
    return hidden


def _undo_half_replaced(folder: Path) -> None:
    """Restores a checkpoint that was hidden to be replaced, if its replacement did not get its name."""
    for hidden in folder.glob(f".*{_REMOVED}"):
        name = hidden.name.removeprefix(".").removesuffix(_REMOVED)
        if (folder / f".{name}{_PARTIAL}").exists() and not (folder / name).exists():
            os.rename(hidden, folder / name)


def _leftovers(folder: Path) -> list[Path]:
    return [path for suffix in (_PARTIAL, _REMOVED) for path in folder.glob(f".*{suffix}")]


def _idle_markers(folder: Path) -> list[Path]:
    """Markers whose checkpoint is complete, or does not exist. Excludes markers of NeMo's own checkpoints."""
    markers = []
    for marker in folder.glob(f"*{_UNFINISHED}"):
        checkpoint = marker.with_name(marker.name.removesuffix(_UNFINISHED))
        of_nemo = [checkpoint] if checkpoint.is_dir() else list(folder.rglob(f"{checkpoint.name}.ckpt"))
        if is_checkpoint(checkpoint) or not any(path.exists() for path in of_nemo):
            markers.append(marker)
    return markers


def _named_last(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"*{_LAST}") if is_checkpoint(path)]


def _last_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints named "-last", the newest last."""
    return sorted(_named_last(folder), key=lambda path: (read_description(path).get("step", 0), path))


def _make_durable(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
