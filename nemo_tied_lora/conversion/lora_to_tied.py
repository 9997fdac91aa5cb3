# SPDX-License-Identifier: Apache-2.0
"""The tied adapter that is closest to a LoRA adapter, whatever the LoRA was read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_tied_lora.adapter.factor_names import FactorName
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.tied_factors import initial_tensor
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.conversion.closest_tied_factors import Fit, fit_target, relative_errors, row_space_bound
from nemo_tied_lora.conversion.from_nemo_lora import read_nemo_lora
from nemo_tied_lora.conversion.from_peft_lora import read_peft_lora
from nemo_tied_lora.conversion.lora_deltas import LoraDeltas, LowRank
from nemo_tied_lora.conversion.untie_to_lora import expand, plain_alpha
from nemo_tied_lora.errors import ConfigError

__all__ = ["FittedAdapter", "errors_of_file", "fit_adapter", "read_lora"]


@dataclass
class FittedAdapter:
    """A tied adapter without a model, in the parts that `write_adapter` takes, and how well each target is fitted."""

    config: TiedLoraConfig
    shapes: dict[str, LinearShape]
    state: dict[str, torch.Tensor]
    fits: dict[str, Fit]
    bounds: dict[str, float]


def read_lora(path: Path, base: Mapping[str, Any] | None) -> LoraDeltas:
    """Reads either form.

    Args:
        path: peft's folder, or NeMo's `.nemo`.
        base: NeMo's model keys of the base; peft's folder does not know heads and groups, NeMo's file does.

    Raises:
        ConfigError: no such adapter, a damaged one, one that is no plain LoRA, or one that does not fit the base.
    """
    if path.is_dir():
        if base is None:
            raise ConfigError(
                ["base=null: name the base's .nemo: peft's folder does not say how its heads are grouped"]
            )
        return read_peft_lora(path, base)
    return read_nemo_lora(path, base)


def fit_adapter(
    lora: LoraDeltas,
    config: TiedLoraConfig,
    preset: str,
    *,
    max_iterations: int,
    tolerance: float,
    progress: Callable[[str, float], object] | None = None,
) -> FittedAdapter:
    """The closest tied adapter, target by target.

    A layer without a delta for a target that other layers have is fitted as zeros.

    Args:
        config: rank, seed, and the preset's fields; targets and layers are those of the LoRA.
        progress: called with the target and its relative error after each iteration.

    Raises:
        ConfigError: NaN, shapes, or a rank that does not fit.
    """
    layers = tuple(sorted({layer for by_layer in lora.deltas.values() for layer in by_layer}))
    state: dict[str, torch.Tensor] = {}
    shapes, fits, bounds = {}, {}, {}
    for target in config.targets:
        shape = replace(lora.sizes.linears[target], layers=layers)
        deltas = [lora.deltas[target].get(layer, _zero(shape)) for layer in layers]
        start = None
        if preset == "vera":
            A, B = (
                initial_tensor(FactorName(None, target, f), shape.factor_shape(f, config.rank), config) for f in "AB"
            )
            start = A, B
        fit = fit_target(
            deltas,
            config.rank,
            preset,
            start=start,
            seed=config.seed,
            max_iterations=max_iterations,
            tolerance=tolerance,
            progress=None if progress is None else partial(progress, target),
        )
        shapes[target], fits[target], bounds[target] = shape, fit, row_space_bound(deltas, config.rank)
        state.update(_named(fit, target, layers))
    return FittedAdapter(config, shapes, state, fits, bounds)


def errors_of_file(lora: LoraDeltas, file: AdapterFile) -> dict[str, float]:
    """Target to the relative error of all its layers together, of the adapter as a file holds it (float32)."""
    errors = {}
    for target, shape in file.shapes.items():
        deltas = [lora.deltas[target].get(layer, _zero(shape)) for layer in shape.layers]
        deltas = [LowRank(delta.P.double(), delta.Q.double()) for delta in deltas]
        plain = list(expand(file.config, {target: shape}, file.state))
        scale = plain_alpha(file.config) / file.config.rank
        A, B = [one.lora_A.double() for one in plain], [one.lora_B.double() * scale for one in plain]
        errors[target] = relative_errors(deltas, A, B, None, None)[1]
    return errors


def _named(fit: Fit, target: str, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The file's names: tied tensors once, the others with their layer."""
    named: dict[str, torch.Tensor] = {}
    for factor in "ABuv":
        value = getattr(fit, factor)
        if value is None:
            continue
        if factor in "AB" and isinstance(value, torch.Tensor):
            named[str(FactorName(None, target, factor))] = value.float().contiguous()
        else:
            for layer, tensor in zip(layers, value, strict=True):
                named[str(FactorName(layer, target, factor))] = tensor.float().contiguous()
    return named


def _zero(shape: LinearShape) -> LowRank:
    return LowRank(torch.zeros(shape.out_features, 1), torch.zeros(1, shape.in_features))
