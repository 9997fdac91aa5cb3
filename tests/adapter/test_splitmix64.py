# SPDX-License-Identifier: Apache-2.0
"""Pure maths: the words are those of splitmix64."""

from __future__ import annotations

import torch

from nemo_tied_lora.adapter.splitmix64 import GOLDEN_GAMMA, as_int64, mix_

MASK = 2**64 - 1


def mixed(word: int) -> int:
    """The published algorithm on Python integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
    return word ^ word >> 31


def test_the_first_words_of_seed_0_are_the_published_ones() -> None:
    words = mix_(torch.arange(1, 4) * GOLDEN_GAMMA)
    assert [word & MASK for word in words.tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_every_word_is_mixed_in_place_as_unsigned_integers_are() -> None:
    words = [0, 1, 2**63 - 1, 2**63, MASK, *(mixed(number) for number in range(95))]
    tensor = torch.tensor([as_int64(word) for word in words]).reshape(10, 10)
    assert mix_(tensor) is tensor
    assert [word & MASK for word in tensor.reshape(-1).tolist()] == [mixed(word) for word in words]
