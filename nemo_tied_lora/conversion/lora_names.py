# SPDX-License-Identifier: Apache-2.0
"""Finds the pairs of A and B among the tensors of a LoRA's file, and names everything that is not such a pair.

Many tensors often have one fault, so each message speaks for all of its kind: their number, and the first of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from nemo_tied_lora.conversion.hf_families import BaseSizes, Part
from nemo_tied_lora.errors import Problems

__all__ = ["LoraLayout", "Pair", "checked_pairs"]


@dataclass(frozen=True, kw_only=True)
class LoraLayout:
    """How a file names its tensors, `<layers>.<number>.<linear>.<side>.weight`, and what its configuration says of each."""

    where: str
    """The file or folder, for messages."""
    layers: tuple[str, ...]
    """The names that the list of layers may have."""
    sides: tuple[str, str]
    """The words for A and for B."""
    module: Callable[[str], str]
    """Makes the name that the configuration uses of `<layers>.<number>.<linear>`."""
    rank: Callable[[str], int]
    """The rank of a linear, by its name in the configuration."""
    scale: Callable[[str], float]
    """The factor of its update."""
    is_target: Callable[[str], bool] | None
    """Whether the configuration gives it a LoRA. None: unknown."""


@dataclass(frozen=True)
class Pair:
    """The A (r, in) and B (out, r) of one linear."""

    target: str
    layer: int
    part: int
    """The number of the linear among the target's."""
    module: str
    A: torch.Tensor
    B: torch.Tensor


@dataclass(frozen=True)
class _Name:
    """A tensor's name in its parts."""

    full: str
    layers: str
    layer: int
    linear: str
    side: str
    adapter: str


def checked_pairs(
    state: Mapping[str, torch.Tensor], parts: Mapping[str, tuple[Part, ...]], sizes: BaseSizes, layout: LoraLayout
) -> list[Pair]:
    """All pairs of a file.

    Raises:
        ConfigError: a line for each kind of tensor that does not belong there or has another form.
    """
    problems = Problems(_unusable(state))
    named = [name for name in map(_parser(layout), state) if isinstance(name, _Name)]
    problems += _strangers(state, named, layout)
    places = {part.name: (target, i) for target, linears in parts.items() for i, part in enumerate(linears)}
    problems += _misplaced(named, places, sizes, layout)
    empty = {name for name, tensor in state.items() if tensor.numel() == 0}
    fitting = [n for n in named if _fits(n, places, sizes, layout) and n.full not in empty]
    pairs, lone = _paired(state, fitting, places, layout)
    problems += [] if empty else lone
    problems += _shapes(pairs, parts, sizes, layout)
    problems += [] if problems else _against_config(pairs, parts, sizes, layout)
    Problems(f"{layout.where}: {problem}" for problem in problems).raise_if_any()
    return pairs


def _parser(layout: LoraLayout) -> Callable[[str], _Name | None]:
    sides = "|".join(layout.sides)
    pattern = re.compile(rf"^(.*?)\.(\d+)\.(.+)\.({sides})(?:\.([^.]+))?\.weight$")

    def parse(full: str) -> _Name | None:
        match = pattern.match(full)
        return match and _Name(full, match[1], int(match[2]), match[3], match[4], match[5] or "")

    return parse


def _many(names: Iterable[str]) -> str:
    """The first of some names and the number of the others."""
    first, *others = list(names)
    return f"{first} and {len(others)} more" if others else first


def _unusable(state: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Tensors without numbers, not of a floating-point type, or with NaN or infinity."""
    if not state:
        yield "holds no tensors"
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        yield (
            f"{_many(empty)}: shape {tuple(state[empty[0]].shape)}, without numbers, as DeepSpeed's ZeRO-3 leaves them; "
            "save the adapter again with stage3_gather_16bit_weights_on_model_save=true, or by zero_to_fp32.py"
        )
    integers = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    if integers:
        yield f"{_many(integers)}: dtype {state[integers[0]].dtype}, which is not a floating-point type; save it unquantized"
    wrong = [n for n, t in state.items() if t.is_floating_point() and not torch.isfinite(t.double()).all()]
    if wrong:
        count = int((~torch.isfinite(state[wrong[0]].double())).sum())
        place = re.search(r"\.(\d+)\.(.+?)\.(?:lora_|adapter_layer\.|linear_)", wrong[0])
        at = f" (layer {place[1]}, {place[2]})" if place else ""
        yield f"{_many(wrong)}{at}: {count} of {state[wrong[0]].numel()} numbers are NaN or infinity; use an earlier checkpoint"


def _strangers(state: Mapping[str, torch.Tensor], named: list[_Name], layout: LoraLayout) -> Iterator[str]:
    """Tensors that are not an A or B below a numbered layer, and a second adapter."""
    strange = sorted(state.keys() - {name.full for name in named})
    if strange:
        of = (
            f"{len(strange)} of {len(state)} tensors"
            if named
            else f"none of {len(state)} tensors is the LoRA of a layer"
        )
        kind = f"not the {' or '.join(layout.sides)} of a linear in a layer"
        yield f"{of}: {_many(strange)}: {kind}; a tied adapter has no place for it"
    adapters = sorted({name.adapter for name in named})
    if len(adapters) > 1:
        yield f"holds {len(adapters)} adapters ({', '.join(map(repr, adapters))}); save one of them alone"


def _fits(name: _Name, places: Mapping[str, object], sizes: BaseSizes, layout: LoraLayout) -> bool:
    return name.layers in layout.layers and name.linear in places and name.layer < sizes.num_layers


def _misplaced(
    named: list[_Name], places: Mapping[str, object], sizes: BaseSizes, layout: LoraLayout
) -> Iterator[str]:
    """Other prefixes, linears that the base does not have, and layers beyond its last."""
    elsewhere = [name for name in named if name.layers not in layout.layers]
    for prefix in sorted({name.layers for name in elsewhere}):
        count = sum(name.layers == prefix for name in elsewhere)
        yield (
            f"{count} of {len(named)} tensors begin with {prefix}. but this base's begin with {layout.layers[0]}.: "
            "name the base that the LoRA was trained on, or rename them if nothing but the name differs"
        )
    here = [name for name in named if name.layers in layout.layers]
    for linear in sorted({name.linear for name in here} - places.keys()):
        names = _many(name.full for name in here if name.linear == linear)
        yield f"{names}: the base's layers have no {linear}; they have {', '.join(places)}"
    beyond = [name for name in here if name.linear in places and name.layer >= sizes.num_layers]
    if beyond:
        largest = max(name.layer for name in beyond)
        names = _many(name.full for name in beyond)
        yield (
            f"{names}: the base has layers 0 to {sizes.num_layers - 1}, the LoRA goes up to layer {largest}; "
            "name the base that it was trained on"
        )


def _paired(
    state: Mapping[str, torch.Tensor],
    names: list[_Name],
    places: Mapping[str, tuple[str, int]],
    layout: LoraLayout,
) -> tuple[list[Pair], list[str]]:
    """The pairs, and a line for those whose other side is missing."""
    sides: dict[tuple[str, int, str], dict[str, _Name]] = {}
    for name in names:
        sides.setdefault((name.layers, name.layer, name.linear), {})[name.side] = name
    pairs: list[Pair] = []
    lone: dict[str, list[str]] = {side: [] for side in layout.sides}
    for (layers, layer, linear), found in sides.items():
        if len(found) == 1:
            (one,) = found.values()
            lone[one.side].append(one.full)
            continue
        A, B = (state[found[side].full] for side in layout.sides)
        target, part = places[linear]
        pairs.append(Pair(target, layer, part, layout.module(f"{layers}.{layer}.{linear}"), A, B))
    words = dict(zip(layout.sides, reversed(layout.sides), strict=True))
    return pairs, [
        f"{_many(names)}: without its {words[side]}; the file is not whole" for side, names in lone.items() if names
    ]


def _shapes(
    pairs: list[Pair], parts: Mapping[str, tuple[Part, ...]], sizes: BaseSizes, layout: LoraLayout
) -> Iterator[str]:
    """Pairs of other shapes than the base's linears; a line for each linear and shape."""
    wrong: dict[tuple[str, str, str], list[Pair]] = {}
    for pair in pairs:
        share = parts[pair.target][pair.part].share
        width, rows = sizes.linears[pair.target].in_features, len(sizes.rows(pair.target, share))
        A, B = tuple(pair.A.shape), tuple(pair.B.shape)
        if len(A) != 2 or A[1] != width or (rows, A[0]) != B:
            name = parts[pair.target][pair.part].name
            wrong.setdefault((name, f"{A} and {B}", f"(r, {width}) and ({rows}, r)"), []).append(pair)
    for (linear, got, needed), found in wrong.items():
        layers = sorted(pair.layer for pair in found)
        of = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers from {layers[0]} to {layers[-1]}"
        yield f"{linear} in {of}: A and B are {got}; the base needs {needed}; name the base that it was trained on"


def _against_config(
    pairs: list[Pair], parts: Mapping[str, tuple[Part, ...]], sizes: BaseSizes, layout: LoraLayout
) -> Iterator[str]:
    """Tensors that contradict the LoRA's own configuration: other ranks, or other linears than it names."""
    other = [pair for pair in pairs if len(pair.A) != layout.rank(pair.module)]
    if other:
        names = _many(pair.module for pair in other)
        expected = layout.rank(other[0].module)
        yield f"{names}: its rank is {len(other[0].A)}, but {expected} by the configuration; the two files do not belong together"
    if layout.is_target is None:
        return
    found = {pair.module for pair in pairs}
    extra = [pair.module for pair in pairs if not layout.is_target(pair.module)]
    if extra:
        yield (
            f"{_many(extra)}: the file holds its LoRA, but the configuration does not name it, so it would not be loaded; "
            "correct one of them"
        )
    linears = [part.name for linears in parts.values() for part in linears]
    every = [layout.module(f"{layout.layers[0]}.{i}.{name}") for i in range(sizes.num_layers) for name in linears]
    missing = [module for module in every if module not in found and layout.is_target(module)]
    if missing:
        yield f"{_many(missing)}: the configuration names it, but the file holds no LoRA of it; the file is not whole"
