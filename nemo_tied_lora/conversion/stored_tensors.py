# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of a folder in Hugging Face's form one by one: safetensors or `.bin` files, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nemo_tied_lora.errors import ConfigError, Problems

__all__ = ["StoredTensors"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class StoredTensors:
    """The tensors in a folder, by name. Never runs code from a pickle.

    Args:
        folder: holds `STEM.safetensors`, its shards, or the same as `.bin`. The first of these that is there is read,
            as transformers and peft do.
        stem: `model` for safetensors of a model, `adapter_model` for those of a LoRA.
        legacy: the stem of `.bin` files.

    Raises:
        ConfigError: the folder has no such file, or a shard is missing, damaged, or not what the index says.
    """

    def __init__(self, folder: Path, stem: str = "model", legacy: str = "pytorch_model"):
        self.folder = folder
        self._opened: tuple[Path | None, dict[str, torch.Tensor]] = (None, {})
        self.files = self._found(folder, (f"{stem}.safetensors", f"{legacy}.bin"))

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor.

        Raises:
            ConfigError: its file cannot be read.
        """
        path = self.files[name]
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as tensors:
                    return tensors.get_tensor(name)
            return self._legacy(path)[name]
        except Exception as error:  # whatever a damaged file raises
            raise ConfigError([f"{path}: {name} cannot be read: {_first_line(error)}"]) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without its numbers."""
        path = self.files[name]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                return tuple(tensors.get_slice(name).get_shape())
        return tuple(self._legacy(path)[name].shape)

    def dtype(self, name: str) -> Any:
        """torch's dtype of a tensor, without its numbers; safetensors' word for it if torch is not known to have it."""
        path = self.files[name]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                word = tensors.get_slice(name).get_dtype()
            return _DTYPES.get(word, word)
        return self._legacy(path)[name].dtype

    def not_read(self) -> list[str]:
        """The names of other files in the folder that hold weights."""
        used = set(self.files.values())
        return sorted(p.name for p in self.folder.iterdir() if p.suffix in _WEIGHTS and p not in used)

    def _found(self, folder: Path, names: tuple[str, str]) -> dict[str, Path]:
        """Tensor name -> the file that holds it."""
        for name in names:
            if (folder / name).is_file():
                return dict.fromkeys(self._names(folder / name), folder / name)
            if (folder / f"{name}.index.json").is_file():
                return self._sharded(folder / f"{name}.index.json")
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ConfigError(
            [f"path={folder}: holds neither {names[0]} nor {names[1]}, whole or in shards; it holds {held}"]
        )

    def _sharded(self, index: Path) -> dict[str, Path]:
        try:
            named = {
                str(n): index.parent / Path(f).name for n, f in json.loads(index.read_text())["weight_map"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError([f"{index}: cannot be read: {_first_line(error)}"]) from error
        missing = [path for path in sorted(set(named.values())) if not path.is_file()]
        Problems(f"{path}: missing, though {index.name} names it; copy it there" for path in missing).raise_if_any()
        found = {name: path for path in sorted(set(named.values())) for name in self._names(path)}
        problems = Problems()
        for names, what in (
            (named.keys() - found, "names {}, which no shard holds"),
            (found.keys() - named, "lacks {}, which a shard holds"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                problems.append(
                    f"{index}: {what.format(min(names) + more)}; the shards and their index do not belong together"
                )
        problems.raise_if_any()
        return found

    def _names(self, path: Path) -> list[str]:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as tensors:
                    return list(tensors.keys())
            return list(self._legacy(path))
        except Exception as error:  # whatever a damaged file raises
            raise ConfigError([f"{path}: cannot be read: {_damage(path, error)}"]) from error

    def _legacy(self, path: Path) -> dict[str, torch.Tensor]:
        if self._opened[0] != path:
            self._opened = (path, _tensors_of_pickle(path))
        return self._opened[1]


def _tensors_of_pickle(path: Path) -> dict[str, torch.Tensor]:
    options: Mapping[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        state = torch.load(path, mmap=True, **options)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        state = torch.load(path, **options)  # a file of torch before 1.6
    if not isinstance(state, Mapping):
        raise TypeError(f"it holds {type(state).__name__}, not tensors by name")
    strangers = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise TypeError(f"its {strangers[0]!r} is not a tensor; it must hold only tensors by name")
    return dict(state)


def _damage(path: Path, error: Exception) -> str:
    """Why a file of weights cannot be read, in one line."""
    if path.stat().st_size == 0:
        return "it is empty; copy it again"
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "it is git-lfs's pointer, not the weights; run git lfs pull"
    if head.lstrip().startswith((b"<", b"{")):
        return "it is text, not weights; download it again"
    return f"it is cut off or damaged ({_first_line(error)}); copy it again"


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "").strip()
    return f"{type(error).__name__}: {text}"
