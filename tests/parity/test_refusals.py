# SPDX-License-Identifier: Apache-2.0
"""One process: what a layout cannot do is refused by name, and would fail without the refusal."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from megatron.core.transformer import TransformerConfig

from nemo_tied_lora import ConfigError
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.megatron_version import counts_repeated_gradients, splits_query_groups
from nemo_tied_lora.planning.parallel_layout import Layout, check
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import build_gpt
from tests.parity import loops
from tests.parity.runs import OVERLAP_AND_FULL
from tests.parity.training import train

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "ffn_hidden_size": 40,
    "encoder_seq_length": 12,
}


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


@pytest.mark.parametrize("tp_size", [2, 4])
def test_fewer_query_groups_than_tensor_parallel_ranks_are_refused_by_name(tp_size: int) -> None:
    layout = Layout(tp_size=tp_size, devices=tp_size)
    assert check(Architecture.from_model_config({**MODEL, "num_query_groups": 1}), layout) == [
        f"model.tensor_model_parallel_size={tp_size}: model.num_query_groups=1 is not divisible by it; use one of 1"
    ]
    assert check(Architecture.from_model_config({**MODEL, "num_query_groups": tp_size}), layout) == []


@pytest.mark.parametrize("tp_size", [2, 4])
def test_fewer_query_groups_than_tensor_parallel_ranks_would_fail(tp_size: int) -> None:
    """megatron-core's configuration fails. The newer release accepts it, and test_layouts.py trains it."""
    fails = pytest.raises(ValueError, match=rf"num_query_groups \(1\) must be a multiple of .*\({tp_size}\)")
    with nullcontext() if splits_query_groups() else fails:
        TransformerConfig(
            num_layers=1,
            hidden_size=32,
            num_attention_heads=8,
            num_query_groups=1,
            tensor_model_parallel_size=tp_size,
        )


def test_overlapping_sums_with_full_recomputation_are_refused_by_name() -> None:
    """Newer releases can train it, and test_layouts.py does."""
    if counts_repeated_gradients():
        return
    with pytest.raises(ConfigError, match=r"overlap_grad_reduce=True: not possible .* before megatron-core 0\.16"):
        train(OVERLAP_AND_FULL)


def test_overlapping_sums_with_full_recomputation_would_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason for the refusal. If this no longer fails, remove the refusal."""
    monkeypatch.setattr(loops, "check_ddp", lambda *_: None)
    fails = pytest.raises(AssertionError, match="Cannot set grad twice")
    with nullcontext() if counts_repeated_gradients() else fails:
        train(OVERLAP_AND_FULL)


def test_megatrons_attention_for_the_cpu_refuses_context_parallelism() -> None:
    """The reason for the suite's own attention. If this no longer fails, remove that attention."""
    with pytest.raises(AssertionError, match="Context parallelism is only supported by TEDotProductAttention"):
        build_gpt(context_parallel_size=2)
