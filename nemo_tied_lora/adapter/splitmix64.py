# SPDX-License-Identifier: Apache-2.0
"""splitmix64 on tensors: pseudorandom 64-bit words, the same on every device and in every version of torch.

The generator of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), with the constants
of Vigna's splitmix64.c. int64 stands for unsigned words: sums and products wrap around to the same bits.
"""

from __future__ import annotations

import torch

__all__ = ["GOLDEN_GAMMA", "as_int64", "mix_"]


def as_int64(word: int) -> int:
    """Returns the int64 that has the bits of a word in 0 .. 2^64 - 1."""
    return word - 2**64 if word >= 2**63 else word


GOLDEN_GAMMA = as_int64(0x9E3779B97F4A7C15)
"""The step between states: word number i (from 1) of a seed is mix_(seed + i * GOLDEN_GAMMA)."""

_ROUNDS = ((30, as_int64(0xBF58476D1CE4E5B9)), (27, as_int64(0x94D049BB133111EB)))


def mix_(words: torch.Tensor) -> torch.Tensor:
    """Mixes each word of an int64 tensor in place with a bijection, and returns the tensor."""
    for shift, factor in _ROUNDS:
        words.bitwise_xor_(_shift_right(words, shift)).mul_(factor)
    return words.bitwise_xor_(_shift_right(words, 31))


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts unsigned: without the copies of the sign bit, which would lose bits."""
    return words.bitwise_right_shift(bits).bitwise_and_((1 << (64 - bits)) - 1)
