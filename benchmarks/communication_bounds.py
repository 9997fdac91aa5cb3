# SPDX-License-Identifier: Apache-2.0
"""What an adapter must send, from shapes alone; bytes sent by one rank, collectives as rings, float32.

With T ranks in the tensor group, n tokens in a microbatch, M microbatches in a step, L layers a stage, P stages:

- Beside the base's collectives, which carry the base's tensors and nothing else, a linear must exchange h or its gradient:
  each of the T ranks holds a summand (or a part of the sequence), all of them need the whole, and r numbers a token is
  the least that determines it. An all-reduce cannot send less than 2 (T-1)/T of what it sums, and the all-gather and
  reduce-scatter of sequence parallelism come to the same.
- Inside the base's collectives nothing is added to a microbatch: a row's update is added to the partial sums before the
  base sums them, a column's share of the input's gradient before the base sums that. What every rank then has of the
  replicated factors' gradients is a partial sum over its own slice, to be summed over T once a step; or the r-wide
  tensors themselves are exchanged, where they are smaller.
- Tied A and B get a gradient from every stage and every stage needs the sum: an all-reduce over P of their local parts.
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
    """ "microbatch" and "step": the least of a method that leaves the base's collectives as they are."""
    h = _layers(sizes, layout) * len(sizes.linears()) * tokens * rank
    partial = sum(_partial(sizes, rank, layout).values()) if layout.sequence_parallel else 0
    return {
        "microbatch": _all_reduce(h, layout.tp_size),
        "step": _all_reduce(partial, layout.tp_size) + _all_reduce(_tied(sizes, rank, layout), layout.pp_size),
    }


def least_of_any_method(
    sizes: Sizes, rank: int, layout: Layout, *, tokens: int, microbatches: int
) -> dict[str, Fraction]:
    """ "microbatch" and "step": the least of any exact method, also of one that adds to the base's own messages."""
    exchanged = microbatches * _layers(sizes, layout) * tokens * rank
    summed = sum(min(partial, exchanged) for partial in _partial(sizes, rank, layout).values())
    pipeline = _all_reduce(_tied(sizes, rank, layout), layout.pp_size)
    return {"microbatch": Fraction(0), "step": _all_reduce(summed, layout.tp_size) + pipeline}


def _layers(sizes: Sizes, layout: Layout) -> int:
    return sizes.layers // layout.pp_size


def _partial(sizes: Sizes, rank: int, layout: Layout) -> dict[str, int]:
    """Target to the elements of `tl6` that every tensor-parallel rank holds whole: A, u of columns; B, u, v of rows."""
    layers, partial = _layers(sizes, layout), {}
    for target, (width_in, width_out) in sizes.linears().items():
        own = layers * (rank if target in _COLUMNS else rank + width_out)
        partial[target] = own + rank * (width_in if target in _COLUMNS else width_out)
    return partial


def _tied(sizes: Sizes, rank: int, layout: Layout) -> int:
    """Elements of A and B on one rank."""
    total = 0
    for target, (width_in, width_out) in sizes.linears().items():
        split, whole = (width_out, width_in) if target in _COLUMNS else (width_in, width_out)
        total += rank * (whole + split // layout.tp_size)
    return total


def _all_reduce(elements: int, ranks: int) -> Fraction:
    return Fraction(2 * (ranks - 1), ranks) * elements * _ELEMENT
