# SPDX-License-Identifier: Apache-2.0
"""Saves a model's adapter to a `.nemo` file and loads it, on any layout; checks that the base is the right one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_tied_lora.adapter import full_state
from nemo_tied_lora.adapter.agreement import raise_together
from nemo_tied_lora.adapter.inject import inject
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.quantized.quantize_base import precision_facts
from nemo_tied_lora.adapter.replica_check import check_ties
from nemo_tied_lora.adapter.target_modules import gpt_model
from nemo_tied_lora.adapter.weight_checksums import fingerprint_model
from nemo_tied_lora.checkpoint.base_identity import check_architecture, check_weights, describe_base
from nemo_tied_lora.checkpoint.nemo_adapter_packing import order_of_writing
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile, AdapterFileError, read_adapter
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter

__all__ = ["load_adapter", "save_adapter"]


def save_adapter(
    adapter: Adapter, path: str | os.PathLike, facts: Mapping[str, Any] | None = None, *, tie_guard: bool = True
) -> Path:
    """Writes the adapter to a temporary file and renames it to `path`. All ranks must call it; rank 0 writes.

    The tensors are gathered one at a time and written as they arrive: no rank holds the whole adapter.

    Args:
        adapter: on any layout.
        path: the `.nemo` file.
        facts: plain values for the YAML (versions, training), beside the format's own keys. `base` may hold the base's
            `name` and its `tokenizer` (see `base_identity.tokenizer_identity`).
        tie_guard: whether the ranks first compare what they share (see `replica_check`).

    Returns:
        The path.

    Raises:
        TieError: ranks that hold the same tensor hold different bits.
        OSError: the file could not be written.
        ValueError: a tensor is not finite, the facts are too long, or a factor that should be stored as its seed is not
            what the seed gives.
        Each is raised on every rank, and an older file is unchanged.
    """
    path = Path(path)
    if tie_guard:
        check_ties(adapter, f"before {path} was written: ")
    base = dict((facts or {}).get("base") or {})
    with _base_weights_in_place(adapter):
        described = describe_base([chunk.body for chunk in adapter.chunks], tokenizer=base.get("tokenizer"))
    facts = {**(facts or {}), "base": {**base, **described}, **precision_facts(adapter.chunks[0].body)}
    factors = [chunk.factors for chunk in adapter.chunks]
    device = adapter.device
    names = order_of_writing(adapter.config, adapter.shapes)
    tensors = full_state.stream(adapter.config, adapter.shapes, factors, device, names)
    failure: Exception | None = None
    if _is_first_rank():
        try:
            masks = None if adapter.pruning is None else adapter.pruning.masks()
            write_adapter(path, adapter.config, adapter.shapes, tensors, facts, masks)
        except Exception as error:
            failure = error
    for _ in tensors:  # every rank takes part in gathering every tensor, even a rank 0 that failed
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

    What a rank budget has pruned stays pruned, also if the adapter is trained further.

    Args:
        model: as for `inject`.
        path: the `.nemo` file.
        allow_other_base: only warn if the adapter was trained on a base with other weights or another tokenizer. The
            architecture must always fit.
        tokenizer: the base's, as `base_identity.tokenizer_identity` returns it. None: not compared.

    Raises:
        AdapterFileError: the file cannot be read as an adapter, or the shapes of its linears are not the model's.
        BaseMismatchError: the base has another architecture, other weights or another tokenizer.
        ConfigError: as `inject`.
        RuntimeError: another rank failed, for instance because it does not see the file. Nothing is changed on any rank.
    """
    failure: Exception | None = None
    try:
        file, recorded, bodies = _read(path, model)
    except Exception as error:
        failure = error
    raise_together("load_adapter", failure)
    found: dict[str, Any] = {"tokenizer": tokenizer}
    if recorded.get("fingerprint"):
        found["fingerprint"] = fingerprint_model(bodies, recorded["fingerprint"].get("vocab_rows"))
    check_weights(recorded, found, str(path), allow_other_base=allow_other_base)
    adapter = inject(model, file.config)
    if adapter.shapes != file.shapes:
        differences = [
            f"{path}: {target}: the adapter was trained on {file.shapes.get(target)}, this model has "
            f"{adapter.shapes.get(target)}"
            for target in dict.fromkeys((*file.shapes, *adapter.shapes))
            if file.shapes.get(target) != adapter.shapes.get(target)
        ]
        adapter.remove()
        raise AdapterFileError("\n".join(differences))
    adapter.load_full_state(file.state)
    if adapter.pruning is not None:
        adapter.pruning.fix(file.masks)
    return adapter


def _read(
    path: str | os.PathLike, model: nn.Module | Sequence[nn.Module]
) -> tuple[AdapterFile, Mapping[str, Any], list[Any]]:
    """Returns the file, what it records of its base, and the model's GPTModels, of the recorded architecture."""
    file = read_adapter(path)
    recorded = file.yaml.get("base")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    bodies = [gpt_model(chunk) for chunk in ([model] if isinstance(model, nn.Module) else model)]
    check_architecture(recorded, bodies[0], str(path))
    return file, recorded, bodies


@contextlib.contextmanager
def _base_weights_in_place(adapter: Adapter) -> Iterator[None]:
    """Gives the model the base's own weights meanwhile, even if the adapter is merged into them."""
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
    """Broadcasts rank 0's failure, so that no rank waits forever or continues without a file."""
    reason = [f"{type(failure).__name__}: {failure}" if failure else None]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(reason, src=0)
    if failure is not None:
        raise failure
    if reason[0] is not None:
        raise OSError(f"{path}: rank 0 could not write it: {reason[0]}")


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
