# SPDX-License-Identifier: Apache-2.0
"""The minimum that an adapter must send, from shapes: bytes that one rank sends, by rings, in float32.

There are T ranks in the tensor group, n tokens in a microbatch, M microbatches in a step, L layers per stage, P stages.

- Beside the base's collectives, which then carry only the base's tensors, each linear exchanges h or its gradient. Each
  of the T ranks holds a summand (or a part of the sequence), and all ranks need the whole: r numbers per token. An
  all-reduce sends at least 2 (T-1)/T of what it sums. Under sequence parallelism, an all-gather and a reduce-scatter
  send the same.
- Inside the base's collectives, a microbatch sends nothing more: a row's update joins the partial sums that the base
  sums, and a column's share joins the gradient of the input. Each rank then holds only a partial sum of the replicated
  factors' gradients, which needs a sum over T once per step. If the r-wide tensors are smaller, they are sent instead.
- Every stage adds to the gradients of tied A and B, and every stage needs the sum: an all-reduce over P of the local
  parts.
"""

from __future__ import annotations

from fractions import Fraction

from adapted_models import Sizes

from nemo_tied_lora.planning.parallel_layout import Layout

__all__ = ["least_beside_the_base", "least_of_any_method"]

_ELEMENT = 4
_COLUMNS = ("linear_qkv", "linear_fc1")


def least_beside_the_base(
    sizes: Sizes, rank: int, layout: Layout, *, tokens: int, microbatches: int
) -> dict[str, Fraction]:
    """Phase ("microbatch", "step") to the minimum of a method that leaves the base's collectives unchanged."""
    h = _layers(sizes, layout) * len(sizes.linears()) * tokens * rank
    partial = sum(_partial(sizes, rank, layout).values()) if layout.sequence_parallel else 0
    return {
        "microbatch": _all_reduce(h, layout.tp_size),
        "step": _all_reduce(partial, layout.tp_size) + _all_reduce(_tied(sizes, rank, layout), layout.pp_size),
    }


def least_of_any_method(
    sizes: Sizes, rank: int, layout: Layout, *, tokens: int, microbatches: int
) -> dict[str, Fraction]:
    """Phase ("microbatch", "step") to the minimum of any exact method, even one that changes the base's messages."""
    exchanged = microbatches * _layers(sizes, layout) * tokens * rank
    summed = sum(min(partial, exchanged) for partial in _partial(sizes, rank, layout).values())
    pipeline = _all_reduce(_tied(sizes, rank, layout), layout.pp_size)
    return {"microbatch": Fraction(0), "step": _all_reduce(summed, layout.tp_size) + pipeline}


def _layers(sizes: Sizes, layout: Layout) -> int:
    return sizes.layers // layout.pp_size


def _partial(sizes: Sizes, rank: int, layout: Layout) -> dict[str, int]:
    """Target to the number of `tl6` elements that tensor-parallel ranks hold whole: A, u of columns; B, u, v of rows."""
    layers, partial = _layers(sizes, layout), {}
    for target, (width_in, width_out) in sizes.linears().items():
        own = layers * (rank if target in _COLUMNS else rank + width_out)
        partial[target] = own + rank * (width_in if target in _COLUMNS else width_out)
    return partial


def _tied(sizes: Sizes, rank: int, layout: Layout) -> int:
    """The number of elements of A and B on one rank."""
    total = 0
    for target, (width_in, width_out) in sizes.linears().items():
        split, whole = (width_out, width_in) if target in _COLUMNS else (width_in, width_out)
        total += rank * (whole + split // layout.tp_size)
    return total


def _all_reduce(elements: int, ranks: int) -> Fraction:
    return Fraction(2 * (ranks - 1), ranks) * elements * _ELEMENT
