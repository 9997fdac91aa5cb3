# SPDX-License-Identifier: Apache-2.0
"""One process, a tiny real megatron-core GPT: what injection refuses, and that refusal and removal restore the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject
from tests.adapter.test_inject import logits, randomise, stored, values
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import build_gpt


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def test_the_base_is_frozen_and_keeps_its_keys() -> None:
    model = build_gpt(num_layers=2)
    keys, weights = list(model.state_dict()), values(model)
    adapter = inject(model, TiedLoraConfig(rank=3))
    assert [name for name, p in model.named_parameters() if p.requires_grad and "decoder.tied_lora." not in name] == []
    added = [key for key in model.state_dict() if key not in keys]
    assert [key for key in model.state_dict() if key in keys] == keys
    assert sorted(added) == sorted(f"decoder.tied_lora.{name}" for name in stored(adapter))
    # A base checkpoint still loads: only the adapter's keys are missing.
    result = model.load_state_dict(weights, strict=False)
    assert [key for key in result.missing_keys if key not in added and not key.endswith("_extra_state")] == []
    assert result.unexpected_keys == []


@pytest.mark.parametrize("had_flag", [None, False, True])
def test_remove_restores_everything(had_flag: bool | None) -> None:
    model = build_gpt(num_layers=2, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if had_flag is not None:
        model.config.has_cond_embedder = had_flag
    model.embedding.requires_grad_(False)
    before = description(model)
    output = logits(model)
    adapter = inject(model, TiedLoraConfig(rank=3))
    randomise(adapter)
    assert description(model) != before
    assert not torch.equal(logits(model), output)
    adapter.remove()
    assert description(model) == before
    assert torch.equal(logits(model), output)


def test_a_model_in_ddp_is_refused_because_its_buffers_lack_the_adapters_gradients() -> None:
    model = build_gpt(num_layers=2)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    outer = nn.Module()
    outer.module = wrapped
    before = description(model)
    for chunks in (wrapped, [outer]):
        with pytest.raises(ConfigError, match="is wrapped in DistributedDataParallel already; inject first"):
            inject(chunks, TiedLoraConfig(rank=3))
    assert description(model) == before


def description(model: nn.Module) -> dict[str, Any]:
    """Everything that injection could leave behind: classes, attributes, hooks, keys, flags, the config."""
    return {
        "modules": [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        ],
        "keys": list(model.state_dict()),
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "config": dict(vars(model.config)),  # type: ignore[arg-type]
    }


def test_remove_then_inject_again_starts_anew() -> None:
    model = build_gpt(num_layers=2)
    adapter = inject(model, TiedLoraConfig(rank=3))
    start = values(adapter.chunks[0].factors)
    randomise(adapter)
    adapter.remove()
    again = values(inject(model, TiedLoraConfig(rank=3)).chunks[0].factors)
    assert again.keys() == start.keys()
    assert all(torch.equal(again[name], start[name]) for name in start)


def test_injecting_twice_is_an_error_and_changes_nothing() -> None:
    model = build_gpt(num_layers=1)
    inject(model, TiedLoraConfig(rank=3))
    before = description(model)
    with pytest.raises(RuntimeError, match=r"already; call adapter\.remove"):
        inject(model, TiedLoraConfig(rank=2))
    assert description(model) == before


def test_a_model_without_megatron_linears_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: a Sequential has no Megatron linears"):
        inject(nn.Sequential(nn.Linear(4, 4)), TiedLoraConfig())


def test_a_missing_target_is_refused_with_those_that_exist() -> None:
    model = build_gpt(num_layers=1)
    model.decoder.layers[0].mlp = nn.Identity()
    refused(
        model, ["targets: linear_fc1 matches no linear of this model; it has linear_qkv, linear_proj"], targets=["all"]
    )
    refused(model, ["targets: none of linear_fc1, linear_fc2 is a Megatron linear of this model"], targets=["mlp"])


def test_a_layer_out_of_range_is_refused_with_the_range() -> None:
    refused(build_gpt(num_layers=2), ["layers: [2, 9] do not exist; the model has layers 0 to 1"], layers=[0, 2, 9])


def test_a_rank_above_the_smaller_side_is_refused_for_each_target() -> None:
    message = [
        "rank=25: more than 24, the smaller side of linear_qkv",
        "rank=25: more than 24, the smaller side of linear_fc2",
    ]
    refused(build_gpt(num_layers=1), message, rank=25)
    inject(build_gpt(num_layers=1), TiedLoraConfig(rank=24))


def test_a_linear_of_another_kind_is_refused_and_not_skipped() -> None:
    model = build_gpt(num_layers=2)
    model.decoder.layers[1].mlp.linear_fc2 = nn.Linear(40, 24)
    refused(model, ["targets: layer 1 mlp.linear_fc2: a Linear cannot be adapted; drop linear_fc2"])


def test_a_linear_that_gathers_its_output_is_refused() -> None:
    model = build_gpt(num_layers=1)
    model.decoder.layers[0].mlp.linear_fc1.gather_output = True
    refused(model, ["targets: layer 0 mlp.linear_fc1: a ColumnParallelLinear cannot be adapted"])


def test_a_linear_that_splits_its_input_itself_is_refused() -> None:
    model = build_gpt(num_layers=1)
    model.decoder.layers[0].mlp.linear_fc2.input_is_parallel = False
    refused(model, ["targets: layer 0 mlp.linear_fc2: a RowParallelLinear cannot be adapted"])


def test_layers_of_different_shapes_are_refused() -> None:
    model, wider = build_gpt(num_layers=2), build_gpt(num_layers=2, ffn=48)
    model.decoder.layers[1].mlp = wider.decoder.layers[1].mlp
    refused(model, ["targets: linear_fc1 has shape (24, 48) in layer 1 but (24, 40) elsewhere"])


def test_a_layer_selection_that_a_target_lacks_is_refused() -> None:
    model = build_gpt(num_layers=2)
    model.decoder.layers[1].mlp = nn.Identity()
    refused(model, ["layers: [1] has no layer with a linear_fc1"], layers=[1])


def test_several_errors_are_reported_together_and_nothing_is_changed() -> None:
    model = build_gpt(num_layers=2)
    model.decoder.layers[1].mlp.linear_fc2 = nn.Linear(40, 24)
    messages = [
        "a Linear cannot be adapted",
        "layers: [7] do not exist",
        "rank=30: more than 24, the smaller side of linear_qkv",
    ]
    refused(model, messages, rank=30, layers=[1, 7])


def refused(model: nn.Module, messages: list[str], **fields: Any) -> None:
    """Checks that `inject` raises one ConfigError with all messages, one per line, and does not change the model."""
    before = description(model)
    with pytest.raises(ConfigError) as error:
        inject(model, TiedLoraConfig(**{"rank": 3, **fields}))
    for message in messages:
        assert [problem for problem in error.value.problems if message in problem], (message, error.value.problems)
    assert description(model) == before
