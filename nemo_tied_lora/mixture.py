# SPDX-License-Identifier: Apache-2.0
"""The experts of a model from plain config values: how many, how wide, in which layers. Neither torch nor a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from nemo_tied_lora.config import ConfigError

__all__ = ["LinearGroup", "Mixture"]


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one shape that may share A and B (see `experts`), whole, over all layers of a model."""

    in_features: int
    out_features: int
    layers: tuple[int, ...]
    num_experts: int = 1


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What megatron-core's mixture of experts puts in the place of some layers' MLP."""

    num_experts: int
    ffn_hidden_size: int
    """Width inside one expert."""
    shared_ffn_hidden_size: int | None = None
    """Width inside the shared experts together. None: there are none."""
    layers: tuple[int, ...]
    """The layers, from 0, that have experts; the others are dense."""

    @classmethod
    def from_model_config(cls, cfg: Mapping[str, Any]) -> Mixture | None:
        """From megatron-core's keys num_moe_experts, moe_ffn_hidden_size, moe_shared_expert_intermediate_size and
        moe_layer_freq; None for a dense model. Absent and null keys mean what they mean there.

        Raises:
            ConfigError: all bad values together.
        """
        if cfg.get("num_moe_experts") is None:
            return None
        hidden, ffn = cfg.get("hidden_size"), cfg.get("ffn_hidden_size")
        width = cfg.get("moe_ffn_hidden_size") or ffn or 4 * (hidden if _is_size(hidden) else 1)
        sizes = {"num_moe_experts": cfg["num_moe_experts"], "moe_ffn_hidden_size": width}
        shared = cfg.get("moe_shared_expert_intermediate_size")
        if shared is not None:
            sizes["moe_shared_expert_intermediate_size"] = shared
        problems = [
            f"model.{name}={value!r}: must be a whole number of at least 1"
            for name, value in sizes.items()
            if not _is_size(value)
        ]
        num_layers = cfg.get("num_layers")
        layers = _layers_with_experts(cfg.get("moe_layer_freq"), num_layers if _is_size(num_layers) else 1)
        if layers is None and _is_size(num_layers):
            problems.append(
                f"model.moe_layer_freq={cfg['moe_layer_freq']!r}: must be a whole number of at least 1, or a list of "
                f"num_layers={num_layers} zeros and ones"
            )
        if problems:
            raise ConfigError(problems)
        return cls(
            num_experts=sizes["num_moe_experts"],
            ffn_hidden_size=width,
            shared_ffn_hidden_size=shared,
            layers=layers or (),
        )

    def groups(self, hidden_size: int, gated: bool) -> dict[str, LinearGroup]:
        """The experts' and the shared experts' linears."""
        parts = {
            "experts": (self.ffn_hidden_size, self.num_experts),
            "shared_experts": (self.shared_ffn_hidden_size, 1),
        }
        found = {}
        for name, (width, experts) in parts.items():
            if width is not None:
                rows = width * (2 if gated else 1)
                found[f"{name}.linear_fc1"] = LinearGroup(hidden_size, rows, self.layers, experts)
                found[f"{name}.linear_fc2"] = LinearGroup(width, hidden_size, self.layers, experts)
        return found


def _layers_with_experts(freq: object, num_layers: int) -> tuple[int, ...] | None:
    """None where the value means nothing to megatron-core."""
    if freq is None:
        freq = 1
    if _is_size(freq):
        return tuple(range(0, num_layers, freq))
    if isinstance(freq, list) and len(freq) == num_layers and all(has in (0, 1) for has in freq):
        return tuple(layer for layer, has in enumerate(freq) if has)
    return None


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
