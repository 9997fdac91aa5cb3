# SPDX-License-Identifier: Apache-2.0
"""A model's adapter <-> its `.nemo` file, on any layout; see `adapter_file` for the file, `base_identity` for what ties
it to a base.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_tied_lora.adapter import full_state
from nemo_tied_lora.adapter.inject import inject
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.replica_check import check_ties
from nemo_tied_lora.adapter.target_modules import gpt_model
from nemo_tied_lora.checkpoint.base_identity import check_architecture, check_weights, describe_base
from nemo_tied_lora.checkpoint.nemo_adapter_format import FORMAT_VERSION, order_of_writing
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile, AdapterFileError, is_adapter_file, read_adapter
from nemo_tied_lora.checkpoint.weight_checksums import fingerprint_model
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter

__all__ = [
    "FORMAT_VERSION",
    "AdapterFile",
    "AdapterFileError",
    "is_adapter_file",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]


def save_adapter(
    adapter: Adapter, path: str | os.PathLike, facts: Mapping[str, Any] | None = None, *, tie_guard: bool = True
) -> Path:
    """Writes the adapter beside `path` and renames it there. All ranks must call it; rank 0 writes.

    The tensors are gathered one at a time and written as they come: no rank holds the whole adapter.

    Args:
        adapter: on any layout.
        path: of the `.nemo` file.
        facts: plain values to keep in the YAML (versions, training), beside the format's own keys. `base` may hold the
            base's `name` and its `tokenizer` (see `base_identity.tokenizer_identity`).
        tie_guard: whether the ranks compare what they share first (see `tie_guard`).

    Raises:
        TieError: ranks that hold the same tensor hold different bits, on every rank; an older file is as it was.
        OSError: it could not be written. ValueError: a tensor is not finite, or a factor that should be stored as its
            seed is not what the seed gives. On every rank; an older file is as it was.
    """
    path = Path(path)
    if tie_guard:
        check_ties(adapter, f"before {path} was written: ")
    base = dict((facts or {}).get("base") or {})
    with _base_weights_in_place(adapter):
        described = describe_base([chunk.body for chunk in adapter.chunks], tokenizer=base.get("tokenizer"))
    factors = [chunk.factors for chunk in adapter.chunks]
    device = next(adapter.chunks[0].body.parameters()).device
    names = order_of_writing(adapter.config, adapter.specs)
    tensors = full_state.stream(adapter.config, adapter.specs, factors, device, names)
    failure: Exception | None = None
    if _is_first_rank():
        try:
            write_adapter(
                path, adapter.config, adapter.specs, tensors, {**(facts or {}), "base": {**base, **described}}
            )
        except Exception as error:
            failure = error
    for _ in tensors:  # the other ranks take part in every gathering, and so does a first rank that failed
        pass
    _raise_on_every_rank(path, failure)
    return path


def load_adapter(
    model: nn.Module | Sequence[nn.Module],
    path: str | os.PathLike,
    *,
    allow_other_base: bool = False,
    tokenizer: Mapping[str, Any] | None = None,
) -> Adapter:
    """Injects the file's adapter into a base model on any layout. All ranks must call it.

    Args:
        model: as for `inject`.
        path: of the `.nemo` file.
        allow_other_base: load it also where the base's weights or tokenizer are not those that it was trained on, with
            a warning. The architecture must fit in any case.
        tokenizer: the base's, as `base_identity.tokenizer_identity` describes it; None: not compared.

    Raises:
        AdapterFileError: the file cannot be read as an adapter, or its target shapes are not this model's.
        BaseMismatchError: another architecture, with each difference; other weights or another tokenizer.
        ConfigError: as `inject`.
    """
    file = read_adapter(path)
    recorded = file.yaml.get("base")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    bodies = [gpt_model(chunk) for chunk in ([model] if isinstance(model, nn.Module) else model)]
    check_architecture(recorded, bodies[0], str(path))
    found: dict[str, Any] = {"tokenizer": tokenizer}
    if recorded.get("fingerprint"):
        found["fingerprint"] = fingerprint_model(bodies, recorded["fingerprint"].get("vocab_rows"))
    check_weights(recorded, found, str(path), allow_other_base=allow_other_base)
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


@contextlib.contextmanager
def _base_weights_in_place(adapter: Adapter) -> Iterator[None]:
    """The base's own weights also while the adapter is merged into them."""
    swapped = [(module, weight) for chunk in adapter.chunks for module, weight in chunk.originals.items()]
    merged: list[Any] = [module.weight.data for module, _ in swapped]
    try:
        for module, weight in swapped:
            module.weight.data = weight
        yield
    finally:
        for (module, _), weight in zip(swapped, merged, strict=True):
            module.weight.data = weight


def _raise_on_every_rank(path: Path, failure: Exception | None) -> None:
    """Rank 0 tells the others how its write ended: they would wait for it for ever, or go on without a file."""
    told = [f"{type(failure).__name__}: {failure}" if failure else None]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise OSError(f"{path}: rank 0 could not write it: {told[0]}")


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
