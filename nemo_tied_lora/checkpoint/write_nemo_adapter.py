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
    STATE_MEMBER,
    order_of_writing,
    pack,
    tensors_in_file,
)
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
) -> Path:
    """Writes an adapter's file from its parts; see `save_adapter`.

    Args:
        shapes: group to whole shape.
        tensors: the whole state, or an iterator over it in the file's order (`order_of_writing`).
        facts: plain values for the YAML.

    Returns:
        The path.

    Raises:
        OSError: the file could not be written. ValueError: see `save_adapter`. An older file is unchanged.
    """
    names = order_of_writing(config, shapes)
    arriving = ((name, tensors[name]) for name in names) if isinstance(tensors, Mapping) else tensors
    try:
        return replace_file(path, lambda file: _write(file, config, shapes, arriving, facts))
    except OSError as error:
        reason = f"{error.strerror or error}; the adapter could not be written; an older file is unchanged"
        raise OSError(error.errno, reason, str(path)) from error


def _write(
    file: IO[bytes],
    config: TiedLoraConfig,
    shapes: Mapping[str, LinearShape],
    tensors: Iterator[tuple[str, torch.Tensor]],
    facts: Mapping[str, Any],
) -> None:
    """Writes the tar: the tensors as they arrive, then the YAML, which holds their checksum."""
    frozen = FrozenFactors(config, shapes)
    state: StateWriter | None = None
    for name, tensor in tensors:
        if state is None:
            state = StateWriter(file, pack(tensors_in_file(config, shapes)), tensor.dtype)
            file.write(member_header(STATE_MEMBER, state.size))
            state.begin()
        if name in frozen.names:
            frozen.check(name, tensor)
        else:
            state.add(name, tensor)
    assert state is not None
    format_keys = {
        "format_version": FORMAT_VERSION,
        "peft": {"peft_scheme": "tied_lora", "tied_lora": config.as_dict()},
        "targets": {group: shape.to_dict() for group, shape in shapes.items()},
        "state": state.end(),
        **({"frozen_factors": frozen.facts()} if frozen.names else {}),
    }
    content = seal({**format_keys, **facts, **format_keys})  # in this order; facts replace no key of the format
    file.write(pad_member(state.size) + member_header(CONFIG_MEMBER, len(content)) + content)
    file.write(pad_member(len(content)))
    file.write(end_tar(file.tell()))
