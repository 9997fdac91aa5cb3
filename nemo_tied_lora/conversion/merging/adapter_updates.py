# SPDX-License-Identifier: Apache-2.0
"""Adds the updates of adapters, weight * (alpha / r) diag(v) B diag(u) A, to any part of any weight, in float32."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.conversion.untie_to_lora import PlainLora, plain_alpha, plain_lora
from nemo_tied_lora.errors import ConfigError, Problems

__all__ = ["Updates"]

_LINEAR = re.compile(
    r"^decoder\.layers\.(?:(\d+)\.)?(?:self_attention\.(linear_qkv|linear_proj)|mlp\.(linear_fc[12]))\.weight$"
)


class Updates:
    """Adapters with their weights, to add to pieces of the base.

    Args:
        adapters: (name for messages, file, weight).

    Raises:
        ConfigError: an adapter has experts, or two adapters were made for linears of different shapes.
    """

    def __init__(self, adapters: Sequence[tuple[str, AdapterFile, float]]):
        problems = Problems()
        self._shapes: dict[tuple[int, str], tuple[int, int]] = {}
        for name, file, _ in adapters:
            for target, linear in file.shapes.items():
                if "." in target:
                    problems.append(
                        f"{name}: {target}: experts' linears cannot be merged yet; use the adapter without merging"
                    )
                for layer in linear.layers:
                    shape = (linear.out_features, linear.in_features)
                    known = self._shapes.setdefault((layer, target), shape)
                    if known != shape:
                        problems.append(f"{name}: {target} has shape {shape}, another adapter's {known}")
        Problems(dict.fromkeys(problems)).raise_if_any()
        self._adapters = list(adapters)
        self._seen = dict.fromkeys(self._shapes, 0)
        self.largest = 0.0
        """The largest absolute change of an element so far."""

    def adapts(self, key: str) -> bool:
        """Returns whether an adapter updates some layer of this weight."""
        target = _target(key)
        return any(known == target for _, known in self._shapes)

    def add(self, key: str, part: torch.Tensor, offset: Sequence[int]) -> torch.Tensor:
        """Returns the merged part, in the part's dtype.

        Args:
            key: the weight's name, as in `Piece`.
            part: (layers, rows, columns), or (rows, columns) if the key has the layer's number.
            offset: the position of its first element in the whole weight.

        Raises:
            ConfigError: the part is outside the adapter's weight, or the sum is not finite.
        """
        match, target = _LINEAR.match(key), _target(key)
        if match is None or target is None:
            return part
        if match[1] is not None:
            part, offset = part.unsqueeze(0), (int(match[1]), *offset)
            return self._add_layers(target, part, offset).squeeze(0)
        return self._add_layers(target, part, offset)

    def check_complete(self) -> None:
        """Checks that every element of every adapted weight was updated once.

        Raises:
            ConfigError: the base lacks elements, or holds some twice.
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
            for lora, scale in self._loras(first_layer + i, target):
                B, A = lora.lora_B[row : row + rows] * scale, lora.lora_A[:, column : column + columns]
                change.addmm_(B.to(dtype), A.to(dtype))
            merged[i] = (weight.to(dtype) + change).to(weight.dtype)
            if not torch.isfinite(merged[i]).all():
                problem = f"the merged weight is not finite in {weight.dtype}; nothing is written"
                raise ConfigError([f"layer {first_layer + i} {target}: {problem}"])
            self.largest = max(self.largest, float(change.abs().max())) if change.numel() else self.largest
            self._seen[first_layer + i, target] += weight.numel()
        return merged

    def _loras(self, layer: int, target: str) -> Iterator[tuple[PlainLora, float]]:
        """(the LoRA, its factor) for each adapter that updates the linear."""
        for _, file, weight in self._adapters:
            if target in file.shapes and layer in file.shapes[target].layers:
                lora = plain_lora(file.config, file.state, layer, target)
                yield lora, weight * plain_alpha(file.config) / file.config.rank


def _target(key: str) -> str | None:
    match = _LINEAR.match(key)
    return None if match is None else match[2] or match[3]
