# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter's `.nemo` file, without a model; see `nemo_adapter_format` for what is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from nemo_tied_lora.adapter.full_state import expected_shapes
from nemo_tied_lora.adapter.shapes import TargetSpec
from nemo_tied_lora.checkpoint import nemo_adapter_format
from nemo_tied_lora.checkpoint.nemo_adapter_format import (
    CONFIG_MEMBER,
    FORMAT_VERSION,
    STATE_MEMBER,
    order_of_writing,
)
from nemo_tied_lora.checkpoint.seeded_factors import FrozenFactors
from nemo_tied_lora.checkpoint.tar import (
    end_tar,
    member_header,
    pad_member,
)
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.files import replace_file

__all__ = ["write_adapter"]


def write_adapter(
    path: Path,
    config: TiedLoraConfig,
    specs: Mapping[str, TargetSpec],
    tensors: Iterator[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
) -> Path:
    """Writes an adapter's file from its parts, without a model; see `save_adapter`.

    Args:
        tensors: the whole state, or an iterator over it in the order in which the file holds it.
        facts: plain values for the YAML.

    Raises:
        OSError: it could not be written. ValueError: see `save_adapter`. An older file is as it was.
    """
    names = order_of_writing(config, specs)
    arriving = ((name, tensors[name]) for name in names) if isinstance(tensors, Mapping) else tensors
    try:
        return replace_file(path, lambda file: _write(file, config, specs, arriving, facts))
    except OSError as error:
        reason = f"{error.strerror or error}; the adapter could not be written; an older file is as it was"
        raise OSError(error.errno, reason, str(path)) from error


def _write(
    file: IO[bytes],
    config: TiedLoraConfig,
    specs: Mapping[str, TargetSpec],
    tensors: Iterator[tuple[str, torch.Tensor]],
    facts: Mapping[str, Any],
) -> None:
    """The tar: the tensors as they arrive, then the YAML, which holds their checksum."""
    shapes = expected_shapes(config, specs)
    frozen = FrozenFactors(config, specs)
    state: nemo_adapter_format.StateWriter | None = None
    for name, tensor in tensors:
        if state is None:
            packed = nemo_adapter_format.pack({n: shape for n, shape in shapes.items() if n not in frozen.shapes})
            state = nemo_adapter_format.StateWriter(file, packed, tensor.dtype)
            file.write(member_header(STATE_MEMBER, state.size))
            state.begin()
        if name in frozen.shapes:
            frozen.check(name, tensor)
        else:
            state.add(name, tensor)
    assert state is not None
    own = {
        "format_version": FORMAT_VERSION,
        "peft": {"peft_scheme": "tied_lora", "tied_lora": config.as_dict()},
        "targets": {t: {**dataclasses.asdict(s), "layers": list(s.layers)} for t, s in specs.items()},
        "state": state.end(),
        **({"frozen_factors": frozen.facts()} if frozen.shapes else {}),
    }
    content = nemo_adapter_format.seal({**own, **{key: value for key, value in facts.items() if key not in own}})
    file.write(pad_member(state.size) + member_header(CONFIG_MEMBER, len(content)) + content)
    file.write(pad_member(len(content)))
    file.write(end_tar(file.tell()))
