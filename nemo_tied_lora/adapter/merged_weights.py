# SPDX-License-Identifier: Apache-2.0
"""Computes the weights of linears with their updates: W + (alpha / r) diag(v) B diag(u) A. Changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from nemo_tied_lora.adapter.injected_chunk import Chunk
from nemo_tied_lora.adapter.quantized.quantized_weight import QuantizedWeight
from nemo_tied_lora.adapter.tied_linear import LinearAdapter
from nemo_tied_lora.errors import Problems

__all__ = ["changed_since_merge", "merged_weights", "version_of"]


def merged_weights(chunks: Sequence[Chunk]) -> list[tuple[Chunk, Any, torch.Tensor]]:
    """Returns (chunk, linear's module, its merged weight) of this rank's adapted linears.

    Each weight is this rank's shard, computed in float32 or wider and cast to the base's dtype.

    Raises:
        ConfigError: the base is quantised; or an adapted linear's weight is a parameter of another module too. Names both.
        ValueError: a merged weight is not finite.
    """
    Problems(itertools.chain(_quantised(chunks), _shared_weights(chunks))).raise_if_any()
    return [(chunk, linear.module, _merged(linear.module)) for chunk in chunks for linear in chunk.linears]


def version_of(weight: torch.Tensor) -> int:
    """torch's counter of changes in place. A cast or a move of the model does not count; loading a state dict does."""
    return 0 if weight.is_inference() else weight._version  # an inference tensor counts nothing


def changed_since_merge(chunks: Sequence[Chunk]) -> list[str]:
    """The names of merged linears whose weights were changed in place since the merge."""
    return [
        f"layer {linear.layer} {linear.name}"
        for chunk in chunks
        for linear in chunk.linears
        if version_of(linear.module.weight) != chunk.versions.get(linear.module, version_of(linear.module.weight))
    ]


def _quantised(chunks: Sequence[Chunk]) -> Iterator[str]:
    """Yields one line if the base is quantised. A sum with an update would lie between the codes."""
    weights = [linear.module.weight for chunk in chunks for linear in chunk.linears]
    codes = next((weight.codes for weight in weights if isinstance(weight, QuantizedWeight)), None)
    if codes is not None:
        yield (
            f"merge: the base is quantised ({codes.precision}), and its codes cannot hold an update; use tied-lora merge on its "
            "file, which holds the weights as they were, or use the adapter without merging it"
        )


def _shared_weights(chunks: Sequence[Chunk]) -> Iterator[str]:
    """Yields one line per weight that an adapted linear shares. One parameter cannot hold the updates of two linears.

    A weight that is a view of another parameter's memory is not shared: merging gives it memory of its own.
    """
    owners: dict[int, dict[nn.Module, str]] = {}
    for index, chunk in enumerate(chunks):
        place = f"chunk {index} " if len(chunks) > 1 else ""
        for path, module in chunk.body.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), {}).setdefault(module, f"{place}{path}")
    adapted = {id(linear.module.weight) for chunk in chunks for linear in chunk.linears}
    for weight, modules in owners.items():
        if weight in adapted and len(modules) > 1:
            yield (
                f"merge: {' and '.join(modules.values())} share one weight, which cannot hold an update for each; use the "
                "adapter without merging it, or give each linear a weight of its own before inject"
            )


def _merged(module: nn.Module) -> torch.Tensor:
    adapter: LinearAdapter = module.tied_lora  # type: ignore[assignment]
    weight: torch.Tensor = module.weight.data  # type: ignore[assignment]
    with torch.no_grad():
        A, h_scale, B = adapter.folded(torch.promote_types(weight.dtype, torch.float32))
        A = A if h_scale is None else A * h_scale.unsqueeze(1)
        merged = (weight.to(A.dtype) + B @ A).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError("merge: a merged weight is not finite; the base or the adapter holds NaN or infinity")
    return merged
