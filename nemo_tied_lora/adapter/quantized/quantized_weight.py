# SPDX-License-Identifier: Apache-2.0
"""A weight that holds codes, and is whole only while it is multiplied.

Megatron's Column- and RowParallelLinear do three things with a frozen weight (0.13 and 0.16: `LinearWithFrozenWeight`):
they save it for backward, multiply x by its transpose, and multiply the gradient by it. `QuantizedWeight` stands for the
weight in these: it dequantises inside each product and frees the result at once. Between the products only codes live.

So a linear keeps its class, and all that depends on it (injection, sequence parallelism, experts) works unchanged, with
the bits that the dequantised weight would give. Transformer Engine's linears read the weight's memory instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from nemo_tied_lora.adapter.quantized.kernels import Codes, dequantize

__all__ = ["QuantizedWeight"]

_aten = torch.ops.aten
_PRODUCTS = {
    *(_aten.mm.default, _aten.mv.default, _aten.bmm.default, _aten.matmul.default, _aten.linear.default),
    *(_aten.addmm.default, _aten.addmv.default, _aten.baddbmm.default),
    # The first part of a product with a batch of strided matrices. It returns the weight whole.
    _aten.expand.default,
}
_NOT_COMPILED = "torch.compile: not possible with a quantised base; call the model without it"
_FROZEN = "a quantised weight is frozen: train an adapter, or load the base without quantising it"


class QuantizedWeight(torch.Tensor):
    """A weight (out, in) that holds the codes of this rank's shard (out/T, in) of a column or (out, in/T) of a row.

    It has the weight's shape, dtype and device. It can be multiplied, transposed, moved to another device or dtype, and
    copied. Everything else raises. It never gets a gradient.

    Args:
        codes: what it holds.
        dtype: the dtype that it has. None: that of the codes' values.
        transposed: whether it has the shape (in, out).
    """

    codes: Codes
    transposed: bool

    @staticmethod
    def __new__(cls, codes: Codes, dtype: torch.dtype | None = None, transposed: bool = False) -> QuantizedWeight:
        rows, columns = codes.shape
        size, strides = ((columns, rows), (1, columns)) if transposed else ((rows, columns), (columns, 1))
        with torch.inference_mode(False):  # an inference tensor could not be a view of a parameter
            made: QuantizedWeight = torch.Tensor._make_wrapper_subclass(
                cls, size, strides=strides, dtype=dtype or codes.dtype, device=codes.packed.device, requires_grad=False
            )
        made.codes, made.transposed = codes, transposed
        return made

    @property
    def bytes_held(self) -> int:
        """The bytes of the codes and their statistics."""
        return self.codes.bytes_held

    def dequantize(self) -> torch.Tensor:
        """Returns the whole weight in this tensor's shape and dtype: what a product with it uses."""
        whole = dequantize(self.codes).to(self.dtype)
        return whole.t() if self.transposed else whole

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({tuple(self.shape)}, {self.codes.precision}, dtype={self.dtype})"

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedWeight:
        """Raises RuntimeError if asked for a gradient."""
        if requires_grad:
            raise RuntimeError(_FROZEN)
        return self

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.codes, self.dtype, self.transposed, dict(vars(self)))

    def __tensor_flatten__(self) -> NoReturn:
        """torch asks for it when it compiles a model. That it exists makes `nn.Module.to` replace the tensor whole."""
        raise NotImplementedError(_NOT_COMPILED)

    @classmethod
    def __tensor_unflatten__(cls, *_: Any) -> NoReturn:
        raise NotImplementedError(_NOT_COMPILED)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            plain = [arg.dequantize() if isinstance(arg, cls) else arg for arg in args]
            return func(*plain, **(kwargs or {}))
        change = _CHANGES.get(func)
        if change is None or not isinstance(args[0], cls):
            raise NotImplementedError(
                f"{func}: not possible with a quantised weight, which can only be multiplied; dequantize() returns a plain "
                "tensor, and a base without quantize_base holds one"
            )
        return change(args[0], *args[1:], **(kwargs or {}))


def _transposed(weight: QuantizedWeight, *dims: int) -> QuantizedWeight:
    same = len({dim % 2 for dim in dims}) == 1  # transpose(0, 0)
    return _like(weight, weight.codes, weight.dtype, weight.transposed is same)


def _same(weight: QuantizedWeight) -> QuantizedWeight:
    return _like(weight, weight.codes, weight.dtype, weight.transposed)


def _cloned(weight: QuantizedWeight, memory_format: Any = None) -> QuantizedWeight:
    return _like(weight, weight.codes.clone(), weight.dtype, weight.transposed)


def _moved(
    weight: QuantizedWeight, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> QuantizedWeight:
    codes = weight.codes if device is None else weight.codes.to(device)
    return _like(weight, codes, dtype or weight.dtype, weight.transposed)


_CHANGES: dict[Any, Callable[..., QuantizedWeight]] = {
    _aten.t.default: _transposed,
    _aten.transpose.int: _transposed,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.clone.default: _cloned,
    _aten._to_copy.default: _moved,
}


def _like(weight: QuantizedWeight, codes: Codes, dtype: torch.dtype, transposed: bool) -> QuantizedWeight:
    """A new tensor with the attributes that Megatron has set on the weight: `nn.Module.to` makes one."""
    return _rebuilt(codes, dtype, transposed, _attributes(weight))


def _rebuilt(codes: Codes, dtype: torch.dtype, transposed: bool, attributes: dict[str, Any]) -> QuantizedWeight:
    made = QuantizedWeight(codes, dtype, transposed)
    vars(made).update(attributes)
    return made


def _attributes(weight: QuantizedWeight) -> dict[str, Any]:
    own = ("codes", "transposed", "_is_param")
    return {name: value for name, value in vars(weight).items() if name not in own}
