# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter's `.nemo` file without a model; see `nemo_adapter_packing` for its contents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.checkpoint.nemo_adapter_format import StateWriter, seal
from nemo_tied_lora.checkpoint.nemo_adapter_packing import (
    CONFIG_MEMBER,
    FORMAT_VERSION,
    PRUNED_VERSION,
    STATE_MEMBER,
    order_of_writing,
    pack,
)
from nemo_tied_lora.checkpoint.pruned_tensors import PrunedTensors
from nemo_tied_lora.checkpoint.seeded_factors import FrozenFactors
from nemo_tied_lora.checkpoint.tar import end_tar, member_header, pad_member
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.files import replace_file

__all__ = ["write_adapter"]


def write_adapter(
    path: Path,
    config: TiedLoraConfig,
    shapes: Mapping[str, LinearShape],
    tensors: Iterator[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
    masks: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes an adapter's file from its parts; see `save_adapter`.

    Args:
        shapes: group to whole shape.
        tensors: the whole state, or an iterator over it in the file's order (`order_of_writing`).
        facts: plain values for the YAML.
        masks: of a rank budget: the name of each u to its mask, (rank,) bool.

    Returns:
        The path.

    Raises:
        OSError: the file could not be written. ValueError: see `save_adapter`. An older file is unchanged.
    """
    names = order_of_writing(config, shapes)
    arriving = ((name, tensors[name]) for name in names) if isinstance(tensors, Mapping) else tensors
    try:
        return replace_file(path, lambda file: _write(file, config, shapes, arriving, facts, masks or {}))
    except OSError as error:
        reason = f"{error.strerror or error}; the adapter could not be written; an older file is unchanged"
        raise OSError(error.errno, reason, str(path)) from error


def _write(
    file: IO[bytes],
    config: TiedLoraConfig,
    shapes: Mapping[str, LinearShape],
    tensors: Iterator[tuple[str, torch.Tensor]],
    facts: Mapping[str, Any],
    masks: Mapping[str, torch.Tensor],
) -> None:
    """Writes the tar: the tensors as they arrive, then the YAML, which holds their checksum."""
    frozen, pruned = FrozenFactors(config, shapes), PrunedTensors(config, shapes, masks)
    state: StateWriter | None = None
    for name, tensor in tensors:
        dtype = tensor.dtype
        if state is None:
            state = StateWriter(file, pack(pruned.shapes), tensor.dtype)
            file.write(member_header(STATE_MEMBER, state.size))
            state.begin()
        if name in frozen.names:
            frozen.check(name, tensor)
        else:
            state.add(name, pruned.packed(name, tensor))
    assert state is not None
    for name, mask in pruned.mask_tensors(dtype):
        state.add(name, mask)
    format_keys = {
        "format_version": PRUNED_VERSION if masks else FORMAT_VERSION,
        "peft": {"peft_scheme": "tied_lora", "tied_lora": config.as_dict()},
        "targets": {group: shape.to_dict() for group, shape in shapes.items()},
        "state": state.end(),
        **({"frozen_factors": frozen.facts()} if frozen.names else {}),
    }
    content = seal({**format_keys, **facts, **format_keys})  # in this order; facts replace no key of the format
    file.write(pad_member(state.size) + member_header(CONFIG_MEMBER, len(content)) + content)
    file.write(pad_member(len(content)))
    file.write(end_tar(file.tell()))
