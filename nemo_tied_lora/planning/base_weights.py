# SPDX-License-Identifier: Apache-2.0
"""Checks that a base's weights are there and whole, by names and sizes. Reads no weight, and needs no torch.

A distributed checkpoint lists in `.metadata`, a pickle, which bytes of which file it needs. Here it is read without
running it: each class that it names becomes an empty one.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_tied_lora.planning.nemo_archive import NemoFiles

__all__ = ["weight_problems"]

_FOLDER = "model_weights/"
_LEGACY = re.compile(r"^(mp_rank_\d+|tp_rank_\d+_pp_rank_\d+)/model_weights\.ckpt$")
_BACKENDS = {"torch_dist": 1, "zarr": 1}
"""The formats of distributed checkpoints that megatron-core reads, with their newest version."""
_MAX_METADATA_BYTES = 1 << 28  # more would take many seconds
_ZIP, _ZIP_END, _TAIL = b"PK\x03\x04", b"PK\x05\x06", 1 << 16


def weight_problems(files: NemoFiles) -> Iterator[str]:
    """Yields what is wrong with the weights of a base."""
    sizes = files.sizes
    legacy = [name for name in sizes if _LEGACY.match(name) or name == "model_weights.ckpt"]
    inside = {name.removeprefix(_FOLDER): size for name, size in sizes.items() if name.startswith(_FOLDER)}
    if not inside and not legacy:
        known = ", ".join(sorted(sizes)[:4])
        yield f"holds no weights (model_weights/... or model_weights.ckpt); it holds {known}"
    yield from (f"its {name} is empty" for name in legacy if not sizes[name])
    if inside and ".metadata" not in inside and not any(name.endswith(".zarray") for name in inside):
        missing = ".metadata" if any(name.endswith(".distcp") for name in inside) else "every file of weights"
        yield f"its {_FOLDER} is not whole: {missing} is missing"
    if files.can_seek:
        yield from _content_problems(files, legacy, inside)


def _content_problems(files: NemoFiles, legacy: Sequence[str], inside: Mapping[str, int]) -> Iterator[str]:
    for name in legacy:
        is_zip = files.read(name, 0, len(_ZIP)) == _ZIP
        if is_zip and _ZIP_END not in files.read(name, -_TAIL, _TAIL):
            yield f"its {name} is cut off: the directory at the end of a zip is missing"
    if "metadata.json" in inside:
        yield from _format_problems(files.read(f"{_FOLDER}metadata.json", 0, 1 << 16))
    if ".metadata" in inside and inside[".metadata"] <= _MAX_METADATA_BYTES:
        yield from _part_problems(inside, files.read(f"{_FOLDER}.metadata", 0, inside[".metadata"]))


def _format_problems(content: bytes) -> Iterator[str]:
    try:
        stated = json.loads(content)
        name, version = stated["sharded_backend"], stated["sharded_backend_version"]
    except (ValueError, KeyError, TypeError):
        yield f"its {_FOLDER}metadata.json is damaged: it does not state the format of the weights"
        return
    if name not in _BACKENDS or not isinstance(version, int) or version > _BACKENDS[name]:
        known = ", ".join(f"{known} {newest}" for known, newest in _BACKENDS.items())
        yield f"its weights have the format {name} {version}, which is newer than this release reads ({known})"


def _part_problems(inside: Mapping[str, int], metadata: bytes) -> Iterator[str]:
    """Compares the files of a torch_dist checkpoint with what `.metadata` needs of them."""
    try:
        needed = _needed(metadata)
    except Exception as error:  # whatever a damaged pickle raises
        yield f"its {_FOLDER}.metadata is damaged: {type(error).__name__}: {error}".splitlines()[0]
        return
    for name, size in sorted(needed.items()):
        if name not in inside:
            yield f"its {_FOLDER}{name} is missing, and .metadata names it"
        elif inside[name] < size:
            yield f"its {_FOLDER}{name} is cut off: it has {inside[name]:,} bytes, and .metadata needs {size:,}"


def _needed(content: bytes) -> dict[str, int]:
    """Each file's name to the end of the last tensor in it."""
    found: dict[str, int] = {}
    metadata = _Unpickler(io.BytesIO(content)).load()
    for stored in metadata.fields["storage_data"].values():
        path, offset, length = (stored.fields[name] for name in ("relative_path", "offset", "length"))
        found[path] = max(found.get(path, 0), offset + length)
    return found


class _Plain:
    """In place of every class of the pickle: keeps the fields that it was pickled with."""

    fields: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.fields = dict(state) if isinstance(state, Mapping) else {}

    def __call__(self, *args: Any) -> Any:
        return _Plain()


class _PlainDict(dict[Any, Any]):
    """In place of an OrderedDict or a defaultdict."""

    def __init__(self, *args: Any) -> None:
        super().__init__()


class _Unpickler(pickle.Unpickler):
    """Runs no code that the pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        return _PlainDict if module == "collections" else type(name, (_Plain,), {})
