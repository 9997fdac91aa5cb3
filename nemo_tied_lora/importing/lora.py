# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter, peft's folder or stock NeMo's `.nemo`, as low-rank deltas of Megatron's linears, and the tied adapter
that is closest to it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from nemo_tied_lora.config import TARGETS, ConfigError, TiedLoraConfig
from nemo_tied_lora.expansion import expand, plain_alpha
from nemo_tied_lora.export.adapter_file import AdapterFile
from nemo_tied_lora.export.nemo_lora import ADAPTER_MODULES
from nemo_tied_lora.export.tar import read_tar
from nemo_tied_lora.factors import initial_tensor
from nemo_tied_lora.fitting import Fit, LowRank, fit_target, relative_errors, row_space_bound
from nemo_tied_lora.huggingface.layouts import BaseShape, Family, family_of_base
from nemo_tied_lora.sharding import TargetSpec, factor_shape

__all__ = ["FittedAdapter", "LoraDeltas", "errors_of_file", "fit_adapter", "read_lora"]


@dataclass
class LoraDeltas:
    """Every delta of an adapter, in Megatron's row order: target -> layer -> P Q. `base`: NeMo's keys of its base."""

    deltas: dict[str, dict[int, LowRank]]
    shape: BaseShape
    base: dict[str, Any]


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
        return _read_peft(path, base)
    return _read_nemo(path, base)


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


def _read_peft(folder: Path, base: Mapping[str, Any]) -> LoraDeltas:
    config = _json(folder / "adapter_config.json")
    _check_plain(config, folder)
    family, shape = family_of_base(base, "base"), BaseShape.from_model_config(base, "base")
    state = _peft_tensors(folder)
    found: dict[tuple[int, str, int], LowRank] = {}
    problems = []
    pattern = re.compile(
        rf"^base_model\.model\.{re.escape(family.layers)}\.(\d+)\.(.+)\.lora_A(?:\.default)?\.weight$"
    )
    places = {part.name: (t, i) for t, parts in family.targets.items() for i, part in enumerate(parts)}
    for name in [n for n in state if ".lora_A." in n]:
        match = pattern.match(name)
        if match is None or match[2] not in places or int(match[1]) >= shape.num_layers:
            problems.append(f"path={folder}: {name} is no linear of the base's layers 0 to {shape.num_layers - 1}")
            continue
        A, B = state.pop(name), state.pop(name.replace(".lora_A", ".lora_B"), None)
        target, index = places[match[2]]
        rows = len(shape.rows(target, family.targets[target][index].share))
        if B is None or A.shape[1] != shape.in_features(target) or B.shape != (rows, len(A)):
            got = f"{tuple(A.shape)}, {None if B is None else tuple(B.shape)}"
            needed = f"(r, {shape.in_features(target)}), ({rows}, r)"
            problems.append(f"path={folder}: {name} and its lora_B are {got}; the base needs {needed}")
            continue
        found[int(match[1]), target, index] = LowRank(B.double() * _scale(config, name, len(A)), A.double())
    problems += [f"path={folder}: {name} is no LoRA of a linear" for name in state if ".lora_A." not in name]
    if not found and not problems:
        problems.append(f"path={folder}: holds no LoRA tensors")
    if problems:
        raise ConfigError(problems)
    return LoraDeltas(_fused(found, family, shape), shape, dict(base))


def _fused(
    found: Mapping[tuple[int, str, int], LowRank], family: Family, shape: BaseShape
) -> dict[str, dict[int, LowRank]]:
    """The parts of a fused linear as one delta: their A's one below the other, their B's in their own rows and columns."""
    deltas: dict[str, dict[int, LowRank]] = {}
    for target in TARGETS:
        for layer in sorted({layer for layer, t, _ in found if t == target}):
            parts = {
                i: found[layer, target, i] for i in range(len(family.targets[target])) if (layer, target, i) in found
            }
            width = sum(len(part.Q) for part in parts.values())
            P, start = torch.zeros(shape.out_features(target), width, dtype=torch.float64), 0
            for index, part in parts.items():
                P[shape.rows(target, family.targets[target][index].share), start : start + len(part.Q)] = part.P
                start += len(part.Q)
            deltas.setdefault(target, {})[layer] = LowRank(P, torch.cat([part.Q for part in parts.values()]))
    return deltas


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r of one linear, with peft's patterns."""
    module = name.removeprefix("base_model.model.").split(".lora_A")[0]
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _check_plain(config: Mapping[str, Any], folder: Path) -> None:
    where, problems = f"path={folder}: adapter_config.json", []
    if config.get("peft_type") != "LORA":
        problems.append(f"{where}: peft_type={config.get('peft_type')!r}: only LORA can be fitted")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        problems.append(f"{where}: lora_alpha={config.get('lora_alpha')!r}: must be a number")
    for key in ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication"):
        if config.get(key):
            problems.append(f"{where}: {key}={config[key]!r}: a tied adapter has no such thing")
    if config.get("bias", "none") != "none":
        problems.append(f"{where}: bias={config['bias']!r}: a tied adapter trains no biases")
    if problems:
        raise ConfigError(problems)


def _peft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        if (folder / "adapter_model.safetensors").is_file():
            return load_file(folder / "adapter_model.safetensors")
        if (folder / "adapter_model.bin").is_file():
            return dict(torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a damaged file raises
        raise ConfigError([f"path={folder}: its weights cannot be read: {type(error).__name__}: {error}"]) from error
    raise ConfigError([f"path={folder}: holds neither adapter_model.safetensors nor adapter_model.bin"])


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}; this is no peft adapter"]) from error
    if not isinstance(value, dict):
        raise ConfigError([f"{path}: holds no keys; this is no peft adapter"])
    return value


def _read_nemo(path: Path, base: Mapping[str, Any] | None) -> LoraDeltas:
    members = read_tar(path, ("model_config.yaml", "model_weights.ckpt"))
    try:
        description = yaml.safe_load(members["model_config.yaml"])
        state = torch.load(io.BytesIO(members["model_weights.ckpt"]), map_location="cpu", weights_only=True)
        section = description["peft"]["lora_tuning"]
        alpha = section.get("alpha", section["adapter_dim"])
    except Exception as error:  # whatever a damaged or other file raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError([f"path={path}: is no stock NeMo LoRA of the single-rank form: {reason}"]) from error
    shape = BaseShape.from_model_config(base or description, "base" if base else f"path={path}: model_config.yaml")
    targets = {module: target for target, module in ADAPTER_MODULES.items()}
    pattern = re.compile(r"^model\.(?:module\.)?decoder\.layers\.(\d+)\.(.+)\.linear_in\.weight$")
    deltas: dict[str, dict[int, LowRank]] = {}
    problems = []
    for name in [n for n in state if n.endswith(".linear_in.weight")]:
        match = pattern.match(name)
        A, B = state.pop(name), state.pop(name.replace(".linear_in.", ".linear_out."), None)
        target = targets.get(match[2]) if match else None
        if match is None or target is None or B is None:
            problems.append(
                f"path={path}: {name} is no LoRA of one of the four linears (variant: canonical is not read)"
            )
        elif A.shape[1] != shape.in_features(target) or B.shape != (shape.out_features(target), len(A)):
            needed = f"(r, {shape.in_features(target)}), ({shape.out_features(target)}, r)"
            problems.append(
                f"path={path}: {name} and its linear_out are {tuple(A.shape)}, {tuple(B.shape)}; the base needs {needed}"
            )
        else:
            deltas.setdefault(target, {})[int(match[1])] = LowRank(B.double() * (alpha / len(A)), A.double())
    problems += [f"path={path}: {name} is no LoRA of a linear" for name in state]
    if not deltas and not problems:
        problems.append(f"path={path}: holds no LoRA tensors")
    if problems:
        raise ConfigError(problems)
    own = {key: value for key, value in description.items() if key != "peft"}
    return LoraDeltas({t: deltas[t] for t in TARGETS if t in deltas}, shape, dict(base or own))
