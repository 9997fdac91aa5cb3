# SPDX-License-Identifier: Apache-2.0
"""Pure: a HybridModel's layers have GPTModel's numbers where its pattern is pairs, else their places in the pattern."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemo_tied_lora.adapter.layer_numbers import LayerNumbers


def numbers_of(pattern: str | None, num_layers: int = 7) -> LayerNumbers:
    return LayerNumbers.of(
        SimpleNamespace(config=SimpleNamespace(num_layers=num_layers), hybrid_layer_pattern=pattern)
    )


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("*-*-*-", [0, 0, 1, 1, 2, 2]),
        ("*-*|-*-", [0, 0, 1, 1, 2, 2]),  # a stage ends inside a pair
        ("*-*-/*-", [0, 0, 1, 1]),  # after the stroke: multi-token prediction
        ("*E*-", [0, 0, 1, 1]),
        ("G-G-*-", [0, 0, 1, 1, 2, 2]),
        ("+-+E", [0, 0, 1, 1]),
        ("M*-M*-", [0, 1, 2, 3, 4, 5]),
        ("M-M-*-", [0, 1, 2, 3, 4, 5]),
        ("*-*", [0, 1, 2]),
        ("-*-*", [0, 1, 2, 3]),
        ("***", [0, 1, 2]),
        ("", []),
    ],
)
def test_a_pattern_of_pairs_has_gpt_models_numbers_and_any_other_has_its_places(
    pattern: str, numbers: list[int]
) -> None:
    found = numbers_of(pattern)
    assert [found.at(place) for place in range(found.num_places)] == numbers
    assert found.count == len(set(numbers))
    assert found.paired is (found.count < found.num_places)
    assert found.own_pattern == (None if found.paired else pattern)


def test_a_gpt_model_has_its_own_numbers_and_keys() -> None:
    found, key = numbers_of(None), "decoder.layers.3.mlp.linear_fc1.weight"
    assert (found.count, found.at(5), found.own_pattern, found.note) == (7, 5, None, "")
    assert found.key(key) == key


def test_the_keys_of_a_pattern_of_pairs_are_gpt_models() -> None:
    paired, other = numbers_of("*-*E"), numbers_of("M*-")
    keys = {
        "decoder.layers.0.self_attention.linear_qkv.weight": "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.1.mlp.linear_fc1.weight": "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.2.input_layernorm.weight": "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.bias": "decoder.layers.0.mlp.linear_fc1.layer_norm_bias",
        "decoder.layers.3.pre_mlp_layernorm.weight": "decoder.layers.1.pre_mlp_layernorm.weight",  # before experts
        "decoder.final_norm.weight": "decoder.final_layernorm.weight",
        "embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
        "mtp.layers.1.mlp.linear_fc1.weight": "mtp.layers.1.mlp.linear_fc1.weight",
    }
    assert {key: paired.key(key) for key in keys} == keys
    assert {key: other.key(key) for key in keys} == {key: key for key in keys}


def test_a_message_about_a_missing_target_says_what_each_letter_has() -> None:
    assert "the linears of G, M are no targets" in numbers_of("MG*-").note
    assert "no targets" not in numbers_of("*-*").note
