# SPDX-License-Identifier: Apache-2.0
"""Fits a tied adapter to a LoRA adapter of peft or stock NeMo."""

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
    """A tied adapter in the parts that `write_adapter` takes, and the quality of the fit."""

    config: TiedLoraConfig
    shapes: dict[str, LinearShape]
    state: dict[str, torch.Tensor]
    fits: dict[str, Fit]
    """Target to its fit."""
    bounds: dict[str, float]
    """Target to the lower bound of its relative error (`row_space_bound`)."""
    notes: tuple[str, ...] = ()
    """What the user should know about the LoRA."""


def read_lora(path: Path, base: Mapping[str, Any] | None) -> LoraDeltas:
    """Reads a LoRA.

    Args:
        path: peft's folder, or NeMo's `.nemo`.
        base: NeMo's model keys of the base. None only for NeMo's `.nemo`, which holds them.

    Raises:
        ConfigError: there is no such adapter, it is damaged, it is not plain LoRA, or it does not fit the base.
    """
    if not path.is_dir():
        lora = read_nemo_lora(path, base)
    elif base is None:
        raise ConfigError(["base=null: name the base's .nemo: peft's folder does not record how heads are grouped"])
    else:
        lora = read_peft_lora(path, base)
    if all(delta.is_zero for by_layer in lora.deltas.values() for delta in by_layer.values()):
        fix = "every B is 0, as before training; name a trained LoRA"
        raise ConfigError([f"path={path}: this LoRA changes nothing: {fix}"])
    return lora


def fit_adapter(
    lora: LoraDeltas,
    config: TiedLoraConfig,
    preset: str,
    *,
    max_iterations: int,
    tolerance: float,
    progress: Callable[[str, float], object] | None = None,
) -> FittedAdapter:
    """Fits the closest tied adapter, target by target.

    If a target has no delta in some layer, the fit takes zeros for it. A target whose deltas are all zero is left out: a
    note says so.

    Args:
        config: rank, seed and the preset's fields. The result has the targets and layers of the LoRA.
        max_iterations, tolerance: see `fit_target`.
        progress: called with the target and its relative error after each iteration.

    Raises:
        ConfigError: the LoRA holds NaN or infinity, the rank does not fit, or the factors are too large for float32.
    """
    zero = [target for target, by_layer in lora.deltas.items() if all(delta.is_zero for delta in by_layer.values())]
    lora = replace(lora, deltas={target: found for target, found in lora.deltas.items() if target not in zero})
    notes = lora.notes + tuple(
        f"{target}: the LoRA's updates are 0 in every layer; the tied adapter leaves it out" for target in zero
    )
    layers = lora.layers
    some = None if len(layers) == lora.sizes.num_layers else layers
    config = replace(config, targets=tuple(lora.deltas), layers=some)
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
    large = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if large:
        raise ConfigError(
            [f"{large[0]}: the fitted factor exceeds float32; the LoRA's numbers or its alpha are too large"]
        )
    return FittedAdapter(config, shapes, state, fits, bounds, notes)


def errors_of_file(lora: LoraDeltas, file: AdapterFile) -> dict[str, float]:
    """Target to the relative error of the adapter in a file (float32), over all its layers."""
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
    """The fitted factors by their names in the file."""
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
