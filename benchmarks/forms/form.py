# SPDX-License-Identifier: Apache-2.0
"""A form of adapter, and how many parameters it trains. Imports no torch.

    Delta W_l = s diag(v_l) B_g R_l A_g          l: a layer; g: the group of layers that share A and B

A (r, in), B (out, r), R_l (r, r), v_l (out). R_l may be absent, diagonal (the paper's u) or full. v_l may be absent, free,
one number for each block of outputs, or V c_l with k directions V (out, k) that all layers share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.errors import ConfigError, Problems, is_whole_number

__all__ = ["CORES", "STARTS", "VECTORS", "Form", "Linear", "fitted", "trained_parameters"]

STARTS = ("xavier", "normal", "orthogonal", "gradient", "zero")
"""How A or B starts. orthogonal: orthogonal rows of A, columns of B, of xavier's length. gradient: the leading directions
of the loss's gradient with respect to W, pooled over the group's layers, of length 1."""
CORES = ("none", "diagonal", "full")
VECTORS = ("none", "free", "blocks", "directions")


@dataclass(frozen=True)
class Linear:
    """One target: (out, in) in each layer."""

    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of adapter, at one rank. The update starts at 0: exactly one of B, R, v does.

    Raises:
        ConfigError: with all fields that are wrong.
    """

    rank: int
    group: int | None = None
    """So many layers that follow each other share A and B. 1: untied. None: all layers."""
    targets: Sequence[str] = TARGETS
    start_A: str = "xavier"
    start_B: str = "zero"
    train_A: bool = True
    train_B: bool = True
    core: str = "none"
    """R_l: none, diagonal (u) or full."""
    start_core: float = 1.0
    """R_l starts as this times the identity."""
    v: str = "none"
    """v_l: none, free, blocks or directions."""
    v_size: int = 1
    """Outputs of a block, or the number of directions."""
    start_v: float = 0.0
    """Every number of v_l at the start: 0 or 1."""
    shared_A: bool = False
    """Targets with equally many inputs share A."""
    scale: float = 1.0
    """s."""
    keep: int | None = None
    """AdaLoRA: so many entries of u stay at the end, as a mean over all linears. `rank` is the rank at the start."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        problems = Problems()
        for name, choices in (("start_A", STARTS), ("start_B", STARTS), ("core", CORES), ("v", VECTORS)):
            problems.one_of(name, getattr(self, name), choices)
        for name in ("rank", "v_size"):
            problems.whole_number(name, getattr(self, name))
        if self.group is not None and not is_whole_number(self.group):
            problems.append(f"group={self.group!r}: must be a whole number of at least 1, or null for all layers")
        if self.keep is not None and (self.core != "diagonal" or self.group != 1 or not 1 <= self.keep <= self.rank):
            problems.append(f"keep={self.keep}: needs an untied form with a diagonal core, and at most the rank")
        problems += [f"targets: {target!r} is unknown" for target in self.targets if target not in TARGETS]
        zeros = [
            name
            for name, at_zero in (
                ("B", self.start_B == "zero"),
                ("R", self.core != "none" and self.start_core == 0),
                ("v", self.v != "none" and self.start_v == 0),
            )
            if at_zero
        ]
        if len(zeros) != 1:
            problems.append(f"start: exactly one of B, R, v must start at 0, not {', '.join(zeros) or 'none'}")
        if zeros == ["B"] and not self.train_B:
            problems.append("train_B=False: a frozen B cannot start at 0")
        problems.raise_if_any()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Form:
        """Reads the fields from plain values; those that are missing have their defaults.

        Raises:
            ConfigError: with all problems.
        """
        unknown = [name for name in values if name not in {field.name for field in fields(cls)}]
        if unknown:
            raise ConfigError([f"form.{name}: not a field of a form" for name in unknown])
        return cls(**values)

    def settings(self) -> dict[str, Any]:
        """All fields as JSON values. What a form without pruning does not have is left out."""
        values = {**asdict(self), "targets": list(self.targets)}
        return values if self.keep is not None else {k: v for k, v in values.items() if k != "keep"}

    def groups(self, layers: int) -> list[int]:
        """The group of each layer, from 0."""
        size = self.group or layers
        return [layer // size for layer in range(layers)]

    def blocks(self, out_features: int) -> int:
        """How many numbers v_l has for a linear, before they are spread over its outputs."""
        return {"free": out_features, "blocks": -(-out_features // self.v_size), "directions": self.v_size}.get(
            self.v, 0
        )

    def names_of_A(self, linears: Mapping[str, Linear]) -> dict[str, str]:
        """Target to the target under whose name its A is held: another one where A is shared."""
        first: dict[int, str] = {}
        names = {}
        for target in self.targets:
            width = linears[target].in_features
            names[target] = first.setdefault(width, target) if self.shared_A else target
        return names


def trained_parameters(form: Form, linears: Mapping[str, Linear], layers: int) -> int:
    """How many numbers are trained, on all layers and targets.

    Of a form with `keep`: how many are left, if all linears keep equally many; u is folded into B.
    """
    if form.keep is not None:
        return layers * form.keep * sum(linears[t].in_features + linears[t].out_features for t in form.targets)
    groups, total = max(form.groups(layers)) + 1, 0
    own_A = set(form.names_of_A(linears).values())
    core = {"none": 0, "diagonal": form.rank, "full": form.rank**2}[form.core]
    for target in form.targets:
        linear = linears[target]
        total += groups * form.rank * linear.in_features * (form.train_A and target in own_A)
        total += groups * form.rank * linear.out_features * form.train_B
        total += layers * (core + form.blocks(linear.out_features))
        total += linear.out_features * form.v_size * (form.v == "directions")
    return total


def fitted(
    values: Mapping[str, Any],
    linears: Mapping[str, Linear],
    layers: int,
    budget: int,
    *,
    largest: int | None = None,
    prunes: float | None = None,
) -> Form:
    """The form with the largest rank that trains at most `budget` parameters.

    Args:
        values: the form's fields without rank.
        largest: a bound on the rank; None: the smallest side of its targets.
        prunes: the rank at the start, times the one that is kept.

    Raises:
        ConfigError: rank 1 is too much already.
    """
    targets = values.get("targets", TARGETS)
    sides = [side for target in targets for side in (linears[target].in_features, linears[target].out_features)]
    best = None
    for rank in range(1, min(*sides, largest or min(sides)) + 1):
        ranks = {"rank": rank} if prunes is None else {"rank": math.ceil(prunes * rank), "keep": rank}
        form = Form.of({**values, **ranks})
        if trained_parameters(form, linears, layers) > budget:
            break
        best = form
    if best is None:
        raise ConfigError([f"budget={budget}: this form trains more at rank 1"])
    return best
