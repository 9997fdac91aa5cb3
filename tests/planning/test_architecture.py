# SPDX-License-Identifier: Apache-2.0
"""The sizes of a base, its linears and its number of parameters. Pure maths, without torch."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.architecture import Architecture, selected_linears
from tests.harness.small_architecture import small


def test_null_and_absent_sizes_mean_what_nemo_means() -> None:
    cfg = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "encoder_seq_length": 8}
    arch = Architecture.from_model_config({**cfg, "kv_channels": None})
    assert (arch.ffn_hidden_size, arch.num_query_groups, arch.kv_channels) == (96, 4, 6)
    assert (arch.gated, arch.bias, arch.norm_bias, arch.learned_positions, arch.shared_output) == (
        *(False, True, True, True, True),
    )
    assert (arch.vocab_size, arch.num_parameters) == (None, None)


@pytest.mark.parametrize(
    ("activation", "gated"),
    [
        ("gelu", False),
        ("squared-relu", False),
        ("swiglu", True),
        ("fast-swiglu", True),
        ("geglu", True),
        ("reglu", True),
    ],
)
def test_a_gated_mlp_doubles_fc1(activation: str, gated: bool) -> None:
    shapes = selected_linears(small(activation=activation), TiedLoraConfig())
    assert shapes["linear_fc1"].out_features == (88 if gated else 44)
    assert shapes["linear_fc2"].in_features == 44


def test_target_shapes_with_grouped_queries_and_wide_heads() -> None:
    shapes = selected_linears(small(), TiedLoraConfig(layers=(1, 3)))
    assert {target: (s.in_features, s.out_features, len(s.layers)) for target, s in shapes.items()} == {
        "linear_qkv": (20, 6 * (4 + 2 * 2), 2),
        "linear_proj": (24, 20, 2),
        "linear_fc1": (20, 88, 2),
        "linear_fc2": (44, 20, 2),
    }


@pytest.mark.parametrize(
    ("changes", "per_layer", "outside"),
    [
        ({}, 20 * 48 + 24 * 20 + 20 * 88 + 44 * 20 + (48 + 20 + 88 + 20) + 80, 40 + 2000 + 16 * 20),
        ({"bias": False, "normalization": "rmsnorm"}, 20 * 48 + 24 * 20 + 20 * 88 + 44 * 20 + 40, 20 + 2000 + 320),
        ({"bias": False, "qkv_bias": True}, 20 * 48 + 24 * 20 + 20 * 88 + 44 * 20 + 48 + 80, 40 + 2000 + 320),
        (
            {"bias": False, "qk_layernorm": True, "share_embeddings_and_output_weights": False}
            | {"position_embedding_type": "rope"},
            20 * 48 + 24 * 20 + 20 * 88 + 44 * 20 + 80 + 24,
            40 + 4000,
        ),
    ],
)
def test_the_bases_parameters_counted_by_hand(changes: dict[str, Any], per_layer: int, outside: int) -> None:
    assert small(**changes).num_parameters == 4 * per_layer + outside


def test_missing_and_wrong_sizes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Architecture.from_model_config({"hidden_size": 10, "num_attention_heads": 3, "ffn_hidden_size": 0})
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        *("model.num_layers", "model.encoder_seq_length", "model.hidden_size=10", "model.ffn_hidden_size=0"),
    ]
    with pytest.raises(ConfigError) as caught:
        small(num_query_groups=3, num_moe_experts=0, multi_latent_attention=True)
    assert len(caught.value.problems) == 3
    for key, value in (("num_layers", "4"), ("kv_channels", 1.5), ("override_vocab_size", 0)):
        with pytest.raises(ConfigError, match=f"model.{key}={value!r}: must be a whole number"):
            small(**{key: value})
