# SPDX-License-Identifier: Apache-2.0
"""Turns a weight into codes and back. The only file that uses bitsandbytes, on the CPU and on CUDA.

=======  ===================================================================  ============================
kind     value of an element                                                  bits a weight
=======  ===================================================================  ============================
nf4      absmax of its block * one of 16 fixed numbers (arXiv 2305.14314)     4 + 16 / block size
int8     absmax of its row / 127 * a whole number from -127 to 127            8 + 32 / in
=======  ===================================================================  ============================

The blocks of nf4 run along `in`, and `in` is a multiple of the block size. So a block lies in one row, and the codes of
some rows, or of some columns that begin and end with a block, are these rows and columns of the whole weight's codes.

An absmax is an element of the weight. So for a bfloat16 weight, an absmax in bfloat16 loses nothing. `double` also
quantises the absmax: 8 bits each, by blocks of 256 around their mean. This mean depends on all of the weight, so codes
that are made of a shard decode to other values than the shard of the whole weight's codes.

The kernels know float16, bfloat16 and float32. Other weights are rounded to float32 first.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_tied_lora.errors import ConfigError

__all__ = [
    "Codes",
    "dequantize",
    "load_bitsandbytes",
    "quantize",
    "row_absmax",
]

_NESTED_BLOCK = 256
_SLAB = 1 << 20  # elements at a time: on a CPU, each takes up to 20 bytes while it is quantised
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The codes of one weight, or of one rank's shard of it."""

    kind: str
    shape: tuple[int, int]
    """(out, in) of the weight."""
    dtype: torch.dtype
    """Of the values that the codes stand for: the weight's, or float32 if the kernels do not know that."""
    block_size: int
    """Elements with one absmax. int8: in."""
    packed: torch.Tensor
    """nf4: (out * in / 2,) uint8, two codes in each. int8: (out, in) int8."""
    absmax: torch.Tensor
    """nf4: (out * in / block_size,), uint8 if double. int8: (out,) float32."""
    nested_absmax: torch.Tensor | None = None
    """Of double: (ceil(blocks / 256),) float32."""
    offset: torch.Tensor | None = None
    """Of double: () float32, the mean of all absmax."""

    @property
    def precision(self) -> str:
        """ "nf4/64", "nf4/64 double", "nf4/64 float32" (that of the absmax) or "int8/row"."""
        if self.kind == "int8":
            return "int8/row"
        more = " double" if self.offset is not None else " float32" if self.absmax.dtype == torch.float32 else ""
        return f"nf4/{self.block_size}{more}"

    @property
    def bytes_held(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def to(self, device: torch.device | str | None) -> Codes:
        """The same codes on another device."""
        return self._with(lambda tensor: tensor.to(device))

    def clone(self) -> Codes:
        """A copy with memory of its own."""
        return self._with(torch.Tensor.clone)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Codes:
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self._tensors().items()}
        return replace(self, **changed)

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {name: getattr(self, name) for name in ("packed", "absmax", "nested_absmax", "offset")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def quantize(
    weight: torch.Tensor,
    kind: str = "nf4",
    *,
    block_size: int = 64,
    double: bool = False,
    statistics: str = "bfloat16",
    absmax: torch.Tensor | None = None,
) -> Codes:
    """Makes the codes of a weight. The same bits in give the same codes out.

    Args:
        weight: (out, in), finite, on the CPU or a GPU. For nf4, `in` is a multiple of `block_size`.
        kind: one of `options.KINDS`.
        block_size, double, statistics: of nf4; see the module's text.
        absmax: of int8: (out,) float32. None: that of the weight's rows. A shard of a row needs that of the whole row.

    Raises:
        ConfigError: nf4 without bitsandbytes.
    """
    weight = weight.detach()
    if weight.dtype not in _KERNEL_DTYPES:
        weight = weight.float()
    if kind == "int8":
        return _int8(weight, row_absmax(weight) if absmax is None else absmax)
    functional = load_bitsandbytes()
    rows, columns = weight.shape
    assert columns % block_size == 0, f"{columns} columns are not whole blocks of {block_size}"
    packed = torch.empty(rows * columns // 2, dtype=torch.uint8, device=weight.device)
    blocks = torch.empty(rows * columns // block_size, dtype=torch.float32, device=weight.device)
    for start, slab in _slabs(weight):
        codes, state = functional.quantize_4bit(slab.contiguous(), blocksize=block_size, quant_type="nf4")
        first = start * columns
        packed[first // 2 : (first + slab.numel()) // 2] = codes.view(-1)
        blocks[first // block_size : (first + slab.numel()) // block_size] = state.absmax
    codes = Codes(
        kind="nf4",
        shape=(rows, columns),
        dtype=weight.dtype,
        block_size=block_size,
        packed=packed,
        absmax=blocks.to(getattr(torch, statistics)),
    )
    return _doubled(codes, blocks) if double else codes


def dequantize(codes: Codes) -> torch.Tensor:
    """Returns the weight for which the codes stand: (out, in) in the codes' dtype, in new memory."""
    if codes.kind == "int8":
        return _from_int8(codes)
    functional = load_bitsandbytes()
    absmax = codes.absmax
    if codes.offset is not None:
        absmax = functional.dequantize_blockwise(absmax, absmax=codes.nested_absmax, blocksize=_NESTED_BLOCK)
        absmax = absmax + codes.offset
    state = functional.QuantState(
        absmax=absmax.float(),
        shape=torch.Size(codes.shape),
        dtype=codes.dtype,
        blocksize=codes.block_size,
        quant_type="nf4",
    )
    weight: torch.Tensor = functional.dequantize_4bit(codes.packed, state)
    return weight


def row_absmax(weight: torch.Tensor) -> torch.Tensor:
    """(out,) float32: the largest absolute value in each row of a weight (out, in)."""
    least, most = weight.detach().aminmax(dim=1)
    return torch.maximum(-least, most).float()


def load_bitsandbytes() -> Any:
    """Imports bitsandbytes, and returns the module of its functions. A second call does nothing more.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(["kind=nf4: needs bitsandbytes; run: pip install 'nemo_tied_lora[quantized]'"])
    return _functional()


@functools.cache
def _functional() -> Any:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that a product of codes is missing, which this package does not use
    try:
        from bitsandbytes import functional
    finally:
        logger.setLevel(level)
    return functional


def _slabs(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (first row, some rows): so many that working on them needs little memory."""
    step = max(1, _SLAB // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield start, weight[start : start + step]


def _doubled(codes: Codes, blocks: torch.Tensor) -> Codes:
    offset = blocks.double().mean().float()  # in float64, so that its bits do not depend on the number of threads
    absmax, state = load_bitsandbytes().quantize_blockwise(blocks - offset, blocksize=_NESTED_BLOCK)
    return replace(codes, absmax=absmax, nested_absmax=state.absmax, offset=offset)


def _int8(weight: torch.Tensor, absmax: torch.Tensor) -> Codes:
    rows, columns = weight.shape
    packed = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    steps = torch.where(absmax > 0, 127.0 / absmax, 0.0).unsqueeze(1)
    for start, slab in _slabs(weight):
        whole = (slab.float() * steps[start : start + slab.shape[0]]).round_().clamp_(-127, 127)
        packed[start : start + slab.shape[0]] = whole
    shape = (rows, columns)
    return Codes(kind="int8", shape=shape, dtype=weight.dtype, block_size=columns, packed=packed, absmax=absmax)


def _from_int8(codes: Codes) -> torch.Tensor:
    weight = torch.empty(codes.shape, dtype=codes.dtype, device=codes.packed.device)
    steps = (codes.absmax / 127.0).unsqueeze(1)
    for start, slab in _slabs(codes.packed):
        weight[start : start + slab.shape[0]] = slab * steps[start : start + slab.shape[0]]
    return weight
