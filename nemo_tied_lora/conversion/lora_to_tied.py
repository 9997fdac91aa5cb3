# SPDX-License-Identifier: Apache-2.0
"""The tied adapter that is closest to a LoRA adapter, whatever the LoRA was read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_tied_lora.adapter.shapes import TargetSpec, factor_shape
from nemo_tied_lora.adapter.tied_factors import initial_tensor
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.conversion.closest_tied_factors import Fit, fit_target, relative_errors, row_space_bound
from nemo_tied_lora.conversion.from_nemo_lora import read_nemo_lora
from nemo_tied_lora.conversion.from_peft_lora import read_peft_lora
from nemo_tied_lora.conversion.hf_families import BaseShape
from nemo_tied_lora.conversion.lora_deltas import LoraDeltas, LowRank
from nemo_tied_lora.conversion.untie_to_lora import expand, plain_alpha
from nemo_tied_lora.errors import ConfigError

__all__ = ["FittedAdapter", "errors_of_file", "fit_adapter", "read_lora"]


@dataclass
class FittedAdapter:
    """A tied adapter without a model, in the parts that `write_adapter` takes, and how well each target is fitted."""

    config: TiedLoraConfig
    specs: dict[str, TargetSpec]
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
    specs, fits, bounds = {}, {}, {}
    for target in config.targets:
        spec = _spec(target, lora.shape, layers)
        deltas = [lora.deltas[target].get(layer, _zero(spec)) for layer in layers]
        start = None
        if preset == "vera":
            A, B = (initial_tensor(f, target, None, factor_shape(f, spec, config.rank), config) for f in "AB")
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
        specs[target], fits[target], bounds[target] = spec, fit, row_space_bound(deltas, config.rank)
        state.update(_named(fit, target, layers))
    return FittedAdapter(config, specs, state, fits, bounds)


def errors_of_file(lora: LoraDeltas, file: AdapterFile) -> dict[str, float]:
    """Target to the relative error of all its layers together, of the adapter as a file holds it (float32)."""
    errors = {}
    for target, spec in file.specs.items():
        deltas = [lora.deltas[target].get(layer, _zero(spec)) for layer in spec.layers]
        deltas = [LowRank(delta.P.double(), delta.Q.double()) for delta in deltas]
        plain = list(expand(file.config, {target: spec}, file.state))
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
            named[f"{target}.{factor}"] = value.float().contiguous()
        else:
            for layer, tensor in zip(layers, value, strict=True):
                named[f"layers.{layer}.{target}.{factor}"] = tensor.float().contiguous()
    return named


def _spec(target: str, shape: BaseShape, layers: tuple[int, ...]) -> TargetSpec:
    return TargetSpec(
        kind="column" if target in ("linear_qkv", "linear_fc1") else "row",
        in_features=shape.in_features(target),
        out_features=shape.out_features(target),
        blocks=2 if target == "linear_fc1" and shape.gated else 1,
        layers=layers,
    )


def _zero(spec: TargetSpec) -> LowRank:
    return LowRank(torch.zeros(spec.out_features, 1), torch.zeros(1, spec.in_features))
