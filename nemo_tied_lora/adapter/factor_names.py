# SPDX-License-Identifier: Apache-2.0
"""The names of an adapter's tensors, in memory, in files and in messages. Imports no torch.

linear_qkv.A                       tied: shared by all layers
layers.7.linear_qkv.u              belongs to layer 7, counted from 0 over all stages
experts.5.linear_fc1.A             tied over the layers, of expert 5 alone (see `experts`)
layers.7.experts.5.linear_fc1.u    belongs to expert 5 of layer 7
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nemo_tied_lora.adapter.experts import group_of, own_names, tied_name, tied_names
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["FactorName", "each_linear", "expected_shapes", "factor_names", "names_of_linear"]


@dataclass(frozen=True)
class FactorName:
    """layer: None for a tied tensor. linear: as in `experts`. factor: "A", "B", "u" or "v"."""

    layer: int | None
    linear: str
    factor: str

    def __str__(self) -> str:
        prefix = "" if self.layer is None else f"layers.{self.layer}."
        return f"{prefix}{self.linear}.{self.factor}"

    @classmethod
    def parse(cls, name: str) -> FactorName:
        """The inverse of `str`."""
        linear, _, factor = name.rpartition(".")
        if not linear.startswith("layers."):
            return cls(None, linear, factor)
        _, layer, linear = linear.split(".", 2)
        return cls(int(layer), linear, factor)

    @property
    def group(self) -> str:
        """The group of linears that the tensor's linear belongs to."""
        return group_of(self.linear)

    @property
    def stacked(self) -> str:
        """The name without the numbers of layer and expert: files stack the tensors that share it."""
        return f"{self.group}.{self.factor}"


def factor_names(config: TiedLoraConfig, shapes: Mapping[str, LinearShape]) -> Iterator[FactorName]:
    """Every stored tensor of an adapter, tied ones first, in the same order on every rank."""
    tied = [factor for factor in config.stored if factor in config.tied]
    for group, shape in shapes.items():
        for linear in tied_names(group, shape.num_experts, config.experts):
            yield from (FactorName(None, linear, factor) for factor in tied)
    own = [factor for factor in config.stored if factor not in config.tied]
    for layer, linear, _ in each_linear(shapes):
        yield from (FactorName(layer, linear, factor) for factor in own)


def expected_shapes(config: TiedLoraConfig, shapes: Mapping[str, LinearShape]) -> dict[str, tuple[int, ...]]:
    """Name to whole shape of every stored tensor, in the order of `factor_names`."""
    return {str(n): shapes[n.group].factor_shape(n.factor, config.rank) for n in factor_names(config, shapes)}


def names_of_linear(config: TiedLoraConfig, layer: int, linear: str) -> dict[str, FactorName]:
    """Factor to name of the stored tensors that one linear uses, tied or not."""
    return {
        factor: FactorName(None, tied_name(linear, config.experts), factor)
        if factor in config.tied
        else FactorName(layer, linear, factor)
        for factor in config.stored
    }


def each_linear(shapes: Mapping[str, LinearShape]) -> Iterator[tuple[int, str, LinearShape]]:
    """(layer, name, shape of its group) of every adapted linear, layer by layer."""
    for layer in sorted({layer for shape in shapes.values() for layer in shape.layers}):
        for group, shape in shapes.items():
            if layer in shape.layers:
                yield from ((layer, linear, shape) for linear in own_names(group, shape.num_experts))
