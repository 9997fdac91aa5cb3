# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter as low-rank deltas of Megatron's linears, and its tensors read into them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.conversion.hf_families import BaseSizes, Part
from nemo_tied_lora.errors import Problems

__all__ = ["LoraDeltas", "LowRank", "read_deltas"]


@dataclass(frozen=True)
class LowRank:
    """One layer's delta P Q with P (out, k) and Q (k, in)."""

    P: torch.Tensor
    Q: torch.Tensor


@dataclass
class LoraDeltas:
    """All deltas of an adapter, with rows in Megatron's order."""

    deltas: dict[str, dict[int, LowRank]]
    """Target to layer to delta."""
    sizes: BaseSizes
    base: dict[str, Any]
    """NeMo's model keys of the base."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers with a delta of any target."""
        return tuple(sorted({layer for by_layer in self.deltas.values() for layer in by_layer}))


def read_deltas(
    path: Path,
    state: Mapping[str, torch.Tensor],
    parts: Mapping[str, tuple[Part, ...]],
    sizes: BaseSizes,
    *,
    pattern: str,
    marks: tuple[str, str],
    scale: Callable[[str, int], float],
) -> dict[str, dict[int, LowRank]]:
    """Target to layer to delta, float64.

    A target may consist of several linears, each with a LoRA: the delta has their A's one below the other, and each B in
    its own rows and columns.

    Args:
        path: the file or folder, for messages.
        state: all tensors of the file, by name.
        parts: target to the linears that hold its rows.
        pattern: matches the name of an A; its groups are the layer's number and the linear's name below the layer.
        marks: the words in the names of A and of B that differ.
        scale: called with the name and the rank of an A; the factor of its update.

    Raises:
        ConfigError: lists every tensor that is not part of a LoRA of the base's linears, or has another shape.
    """
    places = {part.name: (target, i) for target, linears in parts.items() for i, part in enumerate(linears)}
    found: dict[tuple[str, int], dict[int, LowRank]] = {}
    problems, rest = Problems(), dict(state)
    for name in [name for name in state if marks[0] in name]:
        A, B, match = rest.pop(name), rest.pop(name.replace(*marks), None), re.match(pattern, name)
        if match is None or match[2] not in places or int(match[1]) >= sizes.num_layers:
            problems.append(f"path={path}: {name} is not a LoRA of a linear in layers 0 to {sizes.num_layers - 1}")
            continue
        target, index = places[match[2]]
        width, rows = sizes.linears[target].in_features, len(sizes.rows(target, parts[target][index].share))
        if B is None or A.shape[1:] != (width,) or B.shape != (rows, len(A)):
            got = f"{tuple(A.shape)}, {None if B is None else tuple(B.shape)}"
            needed = f"(r, {width}), ({rows}, r)"
            problems.append(f"path={path}: {name} and its {marks[1].strip('.')} are {got}; the base needs {needed}")
            continue
        linears = found.setdefault((target, int(match[1])), {})
        linears[index] = LowRank(B.double() * scale(name, len(A)), A.double())
    problems += [f"path={path}: {name} is not a LoRA of a linear" for name in rest]
    if not found and not problems:
        problems.append(f"path={path}: holds no LoRA tensors")
    problems.raise_if_any()
    deltas: dict[str, dict[int, LowRank]] = {}
    for target, layer in sorted(found, key=lambda key: (TARGETS.index(key[0]), key[1])):
        rows_of = [sizes.rows(target, part.share) for part in parts[target]]
        delta = _joined(found[target, layer], rows_of, sizes.linears[target].out_features)
        deltas.setdefault(target, {})[layer] = delta
    return deltas


def _joined(linears: Mapping[int, LowRank], rows_of: list[torch.Tensor], out_features: int) -> LowRank:
    """One delta of the LoRAs of a target's linears. rows_of: each linear's rows in the target."""
    P, start = torch.zeros(out_features, sum(len(part.Q) for part in linears.values()), dtype=torch.float64), 0
    for index, part in linears.items():
        P[rows_of[index], start : start + len(part.Q)] = part.P
        start += len(part.Q)
    return LowRank(P, torch.cat([part.Q for part in linears.values()]))
