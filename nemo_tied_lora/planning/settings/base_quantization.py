# SPDX-License-Identifier: Apache-2.0
"""The key `model.base_quantization`: how the frozen base's linears are held, and what it cannot be combined with.

Imports neither torch nor NeMo.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from nemo_tied_lora.adapter.quantized.options import BLOCK_SIZES, DEFAULTS, KINDS, option_problems
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.architecture import Architecture, selected_linears
from nemo_tied_lora.planning.parallel_layout import Layout

__all__ = [
    "INSTALL",
    "KEY",
    "BaseQuantization",
    "continued_lines",
    "quantization_lines",
    "quantization_problems",
]

KEY = "model.base_quantization"
INSTALL = "pip install 'nemo_tied_lora[quantized]'"
_WITHOUT = "leave model.base_quantization null"
# Settings of NeMo with which the linears would be Transformer Engine's, or their weights would be captured or moved.
_REFUSED = {
    "transformer_engine": "Transformer Engine's linears cannot hold a quantised weight; set model.transformer_engine=false "
    "(++model.transformer_engine=false), which builds megatron-core's own",
    "fp8": "needs Transformer Engine's linears, which cannot hold a quantised weight; set model.fp8=false",
    "enable_cuda_graph": "a CUDA graph would keep every dequantised weight; set model.enable_cuda_graph=false",
    "cpu_offloading": "Transformer Engine would move the weights; set model.cpu_offloading=false",
}


@dataclass(frozen=True, kw_only=True)
class BaseQuantization:
    """How the decoder's linears are held. Embeddings, output layer, norms and routers stay as they are.

    Raises:
        ConfigError: with all wrong values.
    """

    kind: str
    """nf4: 4-bit codes, and the largest absolute value of each block. int8: 8-bit codes, and one scale per row."""
    block_size: int = 64
    """For nf4: weights in a block, which runs along the linear's input."""
    statistics: str = "bfloat16"
    """For nf4: the dtype of the blocks' largest values, as they are stored."""
    double: bool = False
    """For nf4: quantise the blocks' largest values too. Codes then depend on the tensor-parallel size."""

    def __post_init__(self) -> None:
        options = {name: getattr(self, name) for name in DEFAULTS}
        option_problems(self.kind, prefix=f"{KEY}.", **options).raise_if_any()

    @classmethod
    def from_setting(cls, value: object) -> BaseQuantization | None:
        """Reads the key's value: null, a kind, or a mapping with `kind`. None for null.

        Raises:
            ConfigError: with all problems.
        """
        if value is None:
            return None
        if not isinstance(value, Mapping):
            if value not in KINDS:
                choices = f"choose one of null, {', '.join(KINDS)}, or a mapping as {{kind: nf4, double: true}}"
                raise ConfigError([f"{KEY}={value!r}: unknown; {choices}"])
            return cls(kind=str(value))
        problems = Problems()
        given = problems.known_keys(KEY, value, [field.name for field in fields(cls)])
        given = {name: each for name, each in given.items() if each is not None}
        if "kind" not in given:
            problems.append(f"{KEY}.kind: missing; choose one of {', '.join(KINDS)}")
            problems.raise_if_any()
        return problems.build(cls, **given)

    @classmethod
    def from_precision(cls, precision: object) -> BaseQuantization | None:
        """Reads what an adapter's file records as `base_precision`. None: a dtype, nothing, or a kind of another release."""
        match = _PRECISION.fullmatch(str(precision))
        if match is None:
            return None
        if match["block"] is None:
            return cls(kind="int8")
        if int(match["block"]) not in BLOCK_SIZES:
            return None
        return cls(
            kind="nf4",
            block_size=int(match["block"]),
            statistics=match["statistics"] or "bfloat16",
            double=match["double"] is not None,
        )

    @property
    def precision(self) -> str:
        """The name that adapters record: "nf4/64", "nf4/64 float32", "nf4/64 double" or "int8/row"."""
        if self.kind == "int8":
            return "int8/row"
        parts = [f"nf4/{self.block_size}"]
        parts += [self.statistics] if self.statistics != "bfloat16" and not self.double else []
        return " ".join([*parts, "double"] if self.double else parts)

    @property
    def setting(self) -> str:
        """The key's value that asks for it, as a command line has it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = [f"{f.name}: {_shown(values[f.name])}" for f in fields(self)[1:] if values[f.name] != f.default]
        return f"{{kind: {self.kind}, {', '.join(changed)}}}" if changed else self.kind


_PRECISION = re.compile(r"int8/row|nf4/(?P<block>\d+)(?: (?P<statistics>float32))?(?P<double> double)?")


def quantization_problems(
    setting: object,
    model: Mapping[str, Any] | None,
    arch: Architecture | None,
    layout: Layout | None,
    *,
    here: bool = True,
) -> Iterator[str]:
    """Yields one line per reason why the base cannot be quantised.

    Args:
        setting: the key's value.
        model: the base's model keys, with those of the run over them. None: unknown.
        arch: of the base. None: unknown.
        layout: of the run. None: unknown.
        here: False if another machine will run it, so that it does not matter what is installed here.
    """
    problems = Problems()
    quantization = problems.attempt(BaseQuantization.from_setting, setting)
    yield from problems
    if setting is None:
        return
    is_nf4 = quantization is not None and quantization.kind == "nf4"
    if here and is_nf4 and importlib.util.find_spec("bitsandbytes") is None:
        yield f"{KEY}=nf4: needs bitsandbytes, which is not installed: {INSTALL}; int8 does without it"
    yield from _key_problems(model or {})
    if quantization is not None and is_nf4 and arch is not None and layout is not None:
        yield from _block_problems(quantization, arch, layout)


def quantization_lines(setting: object) -> list[str]:
    """What a user should know of a value that has no problems."""
    quantization = BaseQuantization.from_setting(setting)
    if quantization is None or not quantization.double:
        return []
    return [
        f"{KEY}.double=true: the statistics' codes depend on the tensor-parallel size, so the base, and with it losses and "
        "adapter, differ a little from one size to another; double: false does not"
    ]


def continued_lines(key: str, path: object, recorded: str | None, setting: object) -> list[str]:
    """What a user should know if training continues an adapter on a base in another precision than it was trained on.

    The dtypes of bases that are not quantised count as the same precision.

    Args:
        key: the key with the adapter's path.
        recorded: the adapter's `base_precision`.
        setting: the run's value of `model.base_quantization`, without problems.
    """
    trained, now = BaseQuantization.from_precision(recorded), BaseQuantization.from_setting(setting)
    if trained == now:
        return []
    held = ["not quantised" if one is None else f"in {one.precision}" for one in (trained, now)]
    value = "null" if trained is None else trained.setting
    return [
        f"{key}={path}: its training had a base that was {held[0]}, this run's is {held[1]}; the training continues on this one; "
        f"{KEY}={value} gives the base of the adapter"
    ]


def _key_problems(model: Mapping[str, Any]) -> Iterator[str]:
    for name, reason in _REFUSED.items():
        if model.get(name):
            yield f"{KEY}: not possible with model.{name}={_shown(model[name])}: {reason}; or {_WITHOUT}"
    name = model.get("name") or ""
    if name in _SPECS_OF_TRANSFORMER_ENGINE:
        yield (
            f"{KEY}: not possible with model.name={name} of the base, whose layers are Transformer Engine's: these cannot "
            f"hold a quantised weight; set model.name='' (++model.name=''), or {_WITHOUT}"
        )


# NeMo's names of layer specs (megatron_gpt_model.get_specs, NeMo 2.4).
_SPECS_OF_TRANSFORMER_ENGINE = (
    *("te_gpt", "megatron_falcon_gpt", "megatron_gemma2", "megatron_gpt_full_te_layer_autocast"),
    *("modelopt", "te_gpt_hyena"),
)


def _block_problems(quantization: BaseQuantization, arch: Architecture, layout: Layout) -> Iterator[str]:
    """Yields the linears whose part of the input is no whole number of blocks: a shard's codes would be others."""
    size = quantization.block_size
    inputs = {group: (shape.in_features, shape.kind == "row") for group, shape in _linears(arch).items()}

    def fits(tp_size: int, block: int) -> list[bool]:
        return [width % ((tp_size if is_row else 1) * block) == 0 for width, is_row in inputs.values()]

    heads = math.gcd(arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size)
    others = [tp for tp in range(1, layout.tp_size) if heads % tp == 0 and all(fits(tp, size))]
    smaller = [block for block in BLOCK_SIZES if block < size and all(fits(layout.tp_size, block))]
    remedies = [f"tensor_model_parallel_size={max(others)}"] if others else []
    remedies += [f"{KEY}={{kind: nf4, block_size: {max(smaller)}}}"] if smaller else []
    remedy = " or ".join([*remedies, f"{KEY}=int8"])
    for (group, (width, is_row)), fitting in zip(inputs.items(), fits(layout.tp_size, size), strict=True):
        if not fitting:
            over = f" / tensor_model_parallel_size={layout.tp_size}" if is_row and layout.tp_size > 1 else ""
            yield (
                f"{KEY}: the inputs of {group}, {width}{over}, are not divisible by the block size {size}; use {remedy}"
            )


def _linears(arch: Architecture) -> dict[str, LinearShape]:
    """Group to shape of every linear of the decoder."""
    return selected_linears(arch, TiedLoraConfig())


def _shown(value: object) -> str:
    """A value as YAML shows it."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), str(value))
