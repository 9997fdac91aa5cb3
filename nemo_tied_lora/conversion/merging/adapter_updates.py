# SPDX-License-Identifier: Apache-2.0
"""What adapters add to any part of any weight: the sum of weight * (alpha / r) diag(v) B diag(u) A, in float32."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_tied_lora.adapter.full_state import factors_of_layer
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.errors import ConfigError

__all__ = ["Updates"]

_LINEAR = re.compile(
    r"^decoder\.layers\.(?:(\d+)\.)?(?:self_attention\.(linear_qkv|linear_proj)|mlp\.(linear_fc[12]))\.weight$"
)


@dataclass(frozen=True)
class _Term:
    """One adapter on one linear: B (out, r) with v and every scale folded in, A (r, in) with u."""

    A: torch.Tensor
    B: torch.Tensor


class Updates:
    """Adapters with their weights, ready to be added to pieces of the base.

    Raises:
        ConfigError: an adapter has experts, or two of them were made for linears of different shapes.
    """

    def __init__(self, adapters: Sequence[tuple[str, AdapterFile, float]]):
        problems = []
        self._shapes: dict[tuple[int, str], tuple[int, int]] = {}
        for name, file, _ in adapters:
            for target, linear in file.shapes.items():
                if "." in target:
                    problems.append(f"{name}: {target}: experts' linears cannot be merged yet; use the adapter beside")
                for layer in linear.layers:
                    shape = (linear.out_features, linear.in_features)
                    known = self._shapes.setdefault((layer, target), shape)
                    if known != shape:
                        problems.append(f"{name}: {target} has shape {shape}, another adapter's {known}")
        if problems:
            raise ConfigError(dict.fromkeys(problems))
        self._adapters = list(adapters)
        self._seen = dict.fromkeys(self._shapes, 0)
        self.largest = 0.0
        """The largest absolute change so far, of any element."""

    def adapts(self, key: str) -> bool:
        """Whether some layer of this weight is adapted."""
        target = _target(key)
        return any(known == target for _, known in self._shapes)

    def add(self, key: str, part: torch.Tensor, offset: Sequence[int]) -> torch.Tensor:
        """The merged part, in the part's own dtype.

        Args:
            key: the weight's name, as in `Piece`.
            part: (layers, rows, columns), or (rows, columns) where the key has the layer's number.
            offset: of its first element in the whole weight.

        Raises:
            ConfigError: it lies outside the adapter's weight, or the sum is not finite.
        """
        match, target = _LINEAR.match(key), _target(key)
        if match is None or target is None:
            return part
        if match[1] is not None:
            part, offset = part.unsqueeze(0), (int(match[1]), *offset)
            return self._add_layers(target, part, offset).squeeze(0)
        return self._add_layers(target, part, offset)

    def check_complete(self) -> None:
        """That every element of every adapted weight was updated once.

        Raises:
            ConfigError: the base lacks some, or holds some twice.
        """
        wrong = [
            f"base: layer {layer} {target}: {seen} of {rows * columns} elements were found"
            for (layer, target), (rows, columns) in self._shapes.items()
            if (seen := self._seen[layer, target]) != rows * columns
        ]
        if wrong:
            raise ConfigError(wrong)

    def _add_layers(self, target: str, part: torch.Tensor, offset: Sequence[int]) -> torch.Tensor:
        merged = part.clone()
        first_layer, row, column = offset
        for i, weight in enumerate(part):
            shape = self._shapes.get((first_layer + i, target))
            if shape is None:
                continue
            rows, columns = weight.shape
            if row + rows > shape[0] or column + columns > shape[1]:
                raise ConfigError([f"base: layer {first_layer + i} {target} is larger than the adapter's {shape}"])
            dtype = torch.promote_types(weight.dtype, torch.float32)
            change = torch.zeros(weight.shape, dtype=dtype)
            for term in self._terms(
                first_layer + i, target, slice(row, row + rows), slice(column, column + columns), dtype
            ):
                change.addmm_(term.B, term.A)
            merged[i] = (weight.to(dtype) + change).to(weight.dtype)
            if not torch.isfinite(merged[i]).all():
                raise ConfigError(
                    [
                        f"layer {first_layer + i} {target}: the merged weight is not finite in {weight.dtype}; nothing is written"
                    ]
                )
            self.largest = max(self.largest, float(change.abs().max())) if change.numel() else self.largest
            self._seen[first_layer + i, target] += weight.numel()
        return merged

    def _terms(self, layer: int, target: str, rows: slice, columns: slice, dtype: torch.dtype) -> list[_Term]:
        terms = []
        for _, file, share in self._adapters:
            if target not in file.shapes or layer not in file.shapes[target].layers:
                continue
            factors = factors_of_layer(file.config, file.state, layer, target)
            A, B = factors["A"][:, columns].to(dtype), factors["B"][rows].to(dtype)
            if "u" in factors:
                A = A * factors["u"].to(dtype).unsqueeze(1)
            scale = share * file.config.scale
            B = B * (factors["v"][rows].to(dtype) * scale).unsqueeze(1) if "v" in factors else B * scale
            terms.append(_Term(A, B))
        return terms


def _target(key: str) -> str | None:
    match = _LINEAR.match(key)
    return None if match is None else match[2] or match[3]
