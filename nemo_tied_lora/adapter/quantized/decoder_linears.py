# SPDX-License-Identifier: Apache-2.0
"""Finds the linears of a Megatron model's decoder that can be quantised, and what stands in the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn

from nemo_tied_lora.adapter.experts import group_of, linear_of, name_at
from nemo_tied_lora.adapter.layer_numbers import LayerNumbers
from nemo_tied_lora.adapter.target_modules import gpt_model, wrappers
from nemo_tied_lora.adapter.tied_linear import linear_kind
from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.errors import ConfigError

__all__ = ["DecoderLinear", "find_decoder_linears", "model_bodies"]


@dataclass(frozen=True, kw_only=True)
class DecoderLinear:
    """One linear that can be quantised.

    layer: numbered globally from 0 (see `layer_numbers`). short_name: "linear_qkv" or "experts.5.linear_fc1" (see
    `experts`). kind: "column" or "row".
    """

    layer: int
    short_name: str
    module: Any
    kind: str

    @property
    def name(self) -> str:
        """ "layers.3.linear_qkv"."""
        return f"layers.{self.layer}.{self.short_name}"

    @property
    def group(self) -> str:
        """ "linear_qkv", "experts.linear_fc1" and so on."""
        return group_of(self.short_name)


def model_bodies(model: nn.Module | Sequence[nn.Module]) -> list[Any]:
    """The GPTModels of a stage's chunks.

    Raises:
        ConfigError: there is none.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    if not chunks:
        raise ConfigError(["model: an empty list; pass this stage's chunks"])
    return [gpt_model(chunk) for chunk in chunks]


def find_decoder_linears(chunk: nn.Module, body: Any) -> tuple[list[DecoderLinear], list[str]]:
    """Finds the linears that have the names of an adapter's targets.

    Args:
        chunk: the module that the user passed.
        body: the GPTModel in it.

    Returns:
        The linears, and one line per problem: of the model, and of linears that cannot be quantised. None is skipped.
    """
    linears: list[DecoderLinear] = []
    places: dict[str, list[str]] = {}  # by reason
    numbers = LayerNumbers.of(body)
    for layer in body.decoder.layers:
        number = numbers.at(layer.layer_number - 1)
        for path, module in layer.named_modules():
            place = f"layer {number} {path}"
            if path.endswith("experts") and linear_of(path) == "experts" and not hasattr(module, "local_experts"):
                places.setdefault(_grouped(module), []).append(place)
            name = name_at(path) if linear_of(path) in TARGETS else None
            if name is None or type(module).__name__.startswith("Identity"):
                continue
            reason = _of_linear(module)
            if reason is None:
                kind = "column" if isinstance(module, ColumnParallelLinear) else "row"
                linears.append(DecoderLinear(layer=number, short_name=name, module=module, kind=kind))
            else:
                places.setdefault(reason, []).append(place)
    reasons = [f"{_named(found)}: {reason}" for reason, found in places.items()]
    return linears, [*_of_wrappers(chunk), *_of_config(body.config), *reasons, *_shared(body, linears)]


def _named(places: Sequence[str]) -> str:
    """The first place, and the number of others."""
    more = len(places) - 1
    return places[0] + (f" and {more} other{'s' if more > 1 else ''}" if more else "")


def _of_wrappers(chunk: nn.Module) -> Iterator[str]:
    for wrapper in (chunk, *wrappers(chunk)):
        name = type(wrapper).__name__
        if "FullyShard" in name or "FSDP" in name:
            yield (
                f"model: is wrapped in {name}, which cannot split or gather codes; use tensor and pipeline parallelism, and "
                "Megatron's DDP, with a quantised base"
            )
        elif hasattr(wrapper, "ddp_config") or hasattr(wrapper, "reducer"):
            yield f"model: is wrapped in {name} already; quantise first, then inject, then wrap it"
    if any(_compiled(module) for module in chunk.modules()):
        yield "torch.compile: the model is compiled, which a quantised base cannot be; pass the model itself"


def _compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` returns, or was compiled in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _of_config(config: Any) -> Iterator[str]:
    """Yields one line per setting of Megatron that captures CUDA graphs, which would keep each weight whole."""
    for key, off in (("enable_cuda_graph", False), ("external_cuda_graph", False), ("cuda_graph_impl", "none")):
        value = getattr(config, key, off)
        if value not in (off, None):
            yield f"{key}={value!r}: a CUDA graph keeps the memory of every dequantised weight; set it to {off!r}"


def _grouped(module: nn.Module) -> str:
    return (
        f"moe_grouped_gemm=True: a {type(module).__name__} multiplies all experts at once, in which codes cannot be "
        "dequantised one by one; build the model with moe_grouped_gemm=False"
    )


def _of_linear(module: Any) -> str | None:
    """The reason why a linear cannot be quantised; None if it can."""
    cls = type(module).__name__
    if not isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
        owner = "Transformer Engine's " if linear_kind(module) or cls.startswith("TE") else ""
        return (
            f"{owner}{cls} cannot hold codes; build the layers with megatron-core's ColumnParallelLinear and "
            "RowParallelLinear (Transformer Engine's attention and norms may stay)"
        )
    weight = module.weight
    if weight is None or weight.is_meta or not weight.is_floating_point():
        what = "no weight" if weight is None else f"a weight on {weight.device} of {weight.dtype}"
        return f"has {what}; load the base's weights before quantize_base"
    if weight.grad is not None or hasattr(weight, "main_grad"):
        return "its weight has a gradient, and a quantised weight is frozen; quantise a base that is not trained"
    if not _finite(weight):
        return "its weight holds NaN or infinity; repair the base's file"
    return None


@torch.no_grad()
def _finite(weight: torch.Tensor) -> bool:
    least, most = weight.aminmax()  # NaN if there is one
    return bool(torch.isfinite(least) and torch.isfinite(most))


def _shared(body: nn.Module, linears: Iterable[DecoderLinear]) -> Iterator[str]:
    """Yields one line per weight whose memory another parameter uses too: it would not be freed, or be quantised twice."""
    owners: dict[int, list[str]] = {}
    for path, module in body.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                owners.setdefault(parameter.untyped_storage().data_ptr(), []).append(f"{path}.{name}")
    told: set[int] = set()
    for linear in linears:
        place = linear.module.weight.untyped_storage().data_ptr()
        if len(owners[place]) > 1 and place not in told:
            told.add(place)
            yield f"model: {' and '.join(owners[place])} share memory; give each a memory of its own before quantize_base"
