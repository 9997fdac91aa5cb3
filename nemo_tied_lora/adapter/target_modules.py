# SPDX-License-Identifier: Apache-2.0
"""Finds the linears of a Megatron model that an adapter can use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from nemo_tied_lora.adapter.experts import group_of, linear_of, name_at
from nemo_tied_lora.adapter.layer_numbers import LayerNumbers
from nemo_tied_lora.adapter.tied_linear import linear_kind
from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.errors import ConfigError

__all__ = ["AdaptableLinear", "find_adaptable_linears", "gpt_model", "used_twice", "wrappers"]

_ONE_ADAPTER = "one module cannot have two adapters: give each layer a linear of its own"


@dataclasses.dataclass(frozen=True)
class AdaptableLinear:
    """One linear that can be adapted."""

    layer: int
    """Numbered globally from 0 (see `layer_numbers`)."""
    name: str
    """ "linear_qkv" or "experts.5.linear_fc1" (see `experts`)."""
    module: Any
    kind: str
    """ "column" or "row"."""
    num_blocks: int
    """2 for a gated linear_fc1, else 1."""

    @property
    def group(self) -> str:
        """The group whose linears may share A and B with this one."""
        return group_of(self.name)


def find_adaptable_linears(body: Any, targets: Iterable[str] = TARGETS) -> tuple[list[AdaptableLinear], list[str]]:
    """Finds the linears of one chunk that have a target's name.

    Args:
        body: a module with a `decoder`.

    Returns:
        The linears, and one line per problem. A linear that has a target's name but cannot be adapted is a problem; it
        is never skipped.
    """
    linears: list[AdaptableLinear] = []
    problems: list[str] = []
    seen: dict[tuple[int, str], Any] = {}
    numbers = LayerNumbers.of(body)
    for layer in body.decoder.layers:
        number = numbers.at(layer.layer_number - 1)
        aliases = set()  # a module that a layer registers under a second path is still one linear
        for path, module in layer.named_modules(remove_duplicate=False):
            target = linear_of(path)
            if target == "experts" and not hasattr(module, "local_experts"):
                problems += _grouped_experts(f"layer {number} {path}", module, targets)
            name = name_at(path) if target in targets else None
            if name is None or type(module).__name__.startswith("Identity"):
                continue
            if (name, module) in aliases:
                continue
            aliases.add((name, module))
            kind = _adaptable_kind(module)
            if seen.get((number, name)) is module:
                problems.append(f"targets: layer {number} is in the model twice, as one module object; {_ONE_ADAPTER}")
            elif (number, name) in seen:
                problems.append(f"targets: layer {number} {path}: a second {name}, cannot be adapted; drop {target}")
            elif kind is None:
                cls = type(module).__name__
                problems.append(f"targets: layer {number} {path}: a {cls} cannot be adapted; drop {target}")
            else:
                seen[number, name] = module
                gated = target == "linear_fc1" and bool(getattr(body.config, "gated_linear_unit", False))
                linears.append(AdaptableLinear(number, name, module, kind, 2 if gated else 1))
    return linears, problems


def used_twice(linears: Iterable[AdaptableLinear]) -> list[str]:
    """One line per linear whose module object is that of another linear, in the same layer or in another one.

    Each linear needs its own u and v, and a module can have only one of each.
    """
    first: dict[Any, AdaptableLinear] = {}
    problems = []
    for linear in linears:
        known = first.setdefault(linear.module, linear)
        if known is not linear:
            problems.append(
                f"targets: layer {linear.layer} {linear.name} is the same module object as layer {known.layer} "
                f"{known.name}; {_ONE_ADAPTER}, or drop {linear_of(linear.name)}"
            )
    return problems


def _adaptable_kind(module: nn.Module) -> str | None:
    """ "column" or "row"; None if the module is not a parallel linear, or itself gathers its output or splits its input."""
    whole = getattr(module, "gather_output", False) or not getattr(module, "input_is_parallel", True)
    return None if whole else linear_kind(module)


def _grouped_experts(place: str, module: nn.Module, targets: Iterable[str]) -> Iterable[str]:
    wanted = [target for target in ("linear_fc1", "linear_fc2") if target in targets]
    if wanted:
        cls, drop = type(module).__name__, " and ".join(wanted)
        yield (
            f"moe_grouped_gemm=True: {place}: a {cls} holds all experts in one tensor, which cannot be adapted yet; "
            f"build the model with moe_grouped_gemm=False, or drop {drop}"
        )


def wrappers(chunk: nn.Module) -> list[Any]:
    """The modules around a GPTModel or HybridModel, such as DDP and Float16Module, the outermost first."""
    found: list[Any] = []
    body: Any = chunk
    while not hasattr(body, "decoder") and isinstance(getattr(body, "module", None), nn.Module):
        found.append(body)
        body = body.module
    return found


def gpt_model(chunk: nn.Module) -> Any:
    """The GPTModel or HybridModel inside wrappers such as DDP and Float16Module.

    Raises:
        ConfigError: the module has none.
    """
    body: Any = [chunk, *(wrapper.module for wrapper in wrappers(chunk))][-1]
    layers = getattr(getattr(body, "decoder", None), "layers", None)
    if layers is None or not hasattr(body, "config"):
        raise ConfigError(
            [f"model: a {type(chunk).__name__} has no Megatron linears (no decoder.layers of a TransformerBlock)"]
        )
    return body
