# SPDX-License-Identifier: Apache-2.0
"""Which layouts are refused, with which remedy, and which layers a stage holds. Pure maths, without torch."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.parallel_layout import Layout, check, stage_layers
from tests.harness.small_architecture import small


def test_stages_and_chunks_hold_the_layers_in_megatrons_order() -> None:
    arch = small(num_layers=8)
    assert stage_layers(arch, Layout(pp_size=2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert stage_layers(arch, Layout(pp_size=2, virtual_pp_size=2)) == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("changes", "layout", "words"),
    [
        ({}, {"tp_size": 2, "devices": 3}, ["world size 3", "tensor 2 x pipeline 1 x context 1 = 2", "4 ranks"]),
        ({}, {"tp_size": 2, "devices": 4, "num_nodes": 2, "dp_size": 2}, ["world size 8", "set dp_size to 4"]),
        ({"num_layers": 6}, {"pp_size": 4, "devices": 4}, ["num_layers=6", "use one of 1, 2, 3, 6"]),
        (
            {"num_layers": 8},
            {"pp_size": 2, "virtual_pp_size": 3, "devices": 2},
            ["virtual_pipeline_model_parallel_size=3", "a stage's layers, 4", "use one of 1, 2, 4"],
        ),
        ({}, {"virtual_pp_size": 2}, ["virtual_pipeline_model_parallel_size=2", "at least 2 pipeline stages"]),
        (
            {"num_attention_heads": 6, "ffn_hidden_size": 40},
            {"tp_size": 4, "devices": 4},
            ["num_attention_heads=6", "num_query_groups=2"],
        ),
        ({"ffn_hidden_size": 45}, {"tp_size": 2, "devices": 2}, ["ffn_hidden_size=45", "use one of 1"]),
        ({"override_vocab_size": 99}, {"tp_size": 2, "devices": 2}, ["override_vocab_size=99"]),
        (
            {"encoder_seq_length": 15},
            {"tp_size": 2, "devices": 2, "sequence_parallel": True},
            ["sequence_parallel=true", "encoder_seq_length=15", "length of 16", "or sequence_parallel=false"],
        ),
        (
            {"encoder_seq_length": 20, "num_query_groups": 4},
            {"tp_size": 4, "cp_size": 2, "devices": 8, "sequence_parallel": True},
            ["sequence_parallel=true", "encoder_seq_length=20 / context_parallel_size=2", "length of 24"],
        ),
        ({"encoder_seq_length": 18}, {"cp_size": 2, "devices": 2}, ["context_parallel_size=2", "length of 20"]),
        (
            {},
            {"devices": 3, "micro_batch_size": 2, "global_batch_size": 8},
            ["global_batch_size=8", "micro_batch_size=2 x data-parallel size 3", "use 12"],
        ),
        (
            {},
            {"pp_size": 2, "virtual_pp_size": 2, "devices": 2, "micro_batch_size": 1, "global_batch_size": 3},
            ["global_batch_size=3", "number of microbatches, 3", "use 4"],
        ),
    ],
    ids=[
        "world size",
        "data parallel size",
        "layers over stages",
        "layers over chunks",
        "chunks without stages",
        "heads",
        "mlp",
        "vocabulary",
        "sequence over tensor parallel",
        "sequence over tensor and context parallel",
        "sequence over context parallel",
        "batch",
        "microbatches of an interleaved schedule",
    ],
)
def test_a_wrong_layout_is_refused_with_value_and_remedy(
    changes: dict[str, Any], layout: dict[str, Any], words: list[str]
) -> None:
    problems = check(small(**changes), Layout(**layout), TiedLoraConfig(rank=2))
    assert problems
    text = "\n".join(problems)
    for word in words:
        assert word in text
    assert all(": " in problem and ("use" in problem or "set" in problem or "ask" in problem) for problem in problems)


def test_every_problem_of_a_layout_is_reported() -> None:
    layout = Layout(tp_size=8, pp_size=3, cp_size=3, devices=5, sequence_parallel=True)
    problems = check(small(), layout, TiedLoraConfig(rank=21, layers=(3, 4)))
    named = [problem.split(":")[0].split("=")[0] for problem in problems]
    assert named == [
        "trainer.num_nodes",
        *(["model.tensor_model_parallel_size"] * 4),
        "model.context_parallel_size",
        "model.pipeline_model_parallel_size",
        "layers",
        *(["rank"] * 4),
    ]


def test_a_good_layout_is_accepted_and_the_rank_need_not_be_divisible() -> None:
    layout = Layout(
        tp_size=2,
        pp_size=2,
        cp_size=2,
        devices=8,
        num_nodes=2,
        dp_size=2,
        sequence_parallel=True,
        virtual_pp_size=2,
        micro_batch_size=2,
        global_batch_size=16,
    )
    assert check(small(), layout, TiedLoraConfig(rank=3)) == []
    assert (layout.world_size, layout.resolved_dp_size) == (16, 2)


def test_the_rank_may_reach_the_smaller_side_of_each_target() -> None:
    assert check(small(), Layout(), TiedLoraConfig(rank=20)) == []
    (problem,) = check(small(), Layout(), TiedLoraConfig(rank=21, targets=("linear_fc2",)))
    assert problem == "rank=21: more than the 20 of linear_fc2's smaller side; use at most 20, " + (
        "or leave linear_fc2 out of targets"
    )


def test_a_layout_from_nemos_keys() -> None:
    model: dict[str, Any] = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "sequence_parallel": True,
    }
    model |= {"virtual_pipeline_model_parallel_size": 2, "context_parallel_size": None, "global_batch_size": 8}
    layout = Layout.from_config({"model": model, "trainer": {"devices": [0, 1, 2, 3], "num_nodes": 2}})
    assert layout == Layout(
        tp_size=2, pp_size=4, virtual_pp_size=2, sequence_parallel=True, devices=4, num_nodes=2, global_batch_size=8
    )
    assert Layout.from_config({"model": None}) == Layout()


def test_wrong_layout_values_are_reported_together() -> None:
    model = {"tensor_model_parallel_size": 0, "sequence_parallel": "yes", "num_layers_in_first_pipeline_stage": 3}
    with pytest.raises(ConfigError) as caught:
        Layout.from_config({"model": model, "trainer": {"devices": "auto"}})
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "model.num_layers_in_first_pipeline_stage=3",
        "model.tensor_model_parallel_size=0",
        "trainer.devices='auto'",
        "model.sequence_parallel='yes'",
    ]
