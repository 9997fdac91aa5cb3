# SPDX-License-Identifier: Apache-2.0
"""One process: what Bridge asks of a PEFT method, and the traps that only its users meet."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.bridge.peft.base import PEFT

from nemo_tied_lora import ConfigError, TiedLoraConfig, save_adapter
from nemo_tied_lora.bridge import TiedLoRA
from nemo_tied_lora.platform import detect, no_bridge_kernels
from tests.bridge.bridge_model import build, fill_base, logits
from tests.harness.ranks import single_process


@pytest.fixture(autouse=True)
def one_rank() -> None:
    single_process()


def applied(peft: TiedLoRA) -> list[Any]:
    """A base with this adapter, not wrapped. Its factors are random: none is 0."""
    model = build(fill_base, peft, ddp=False)
    for parameter in peft.adapter.parameters():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def test_the_fields_and_defaults_are_those_of_the_configuration() -> None:
    assert TiedLoRA().config() == TiedLoraConfig()
    own = {one.name for one in dataclasses.fields(TiedLoRA) if one.init}
    assert own == {one.name for one in dataclasses.fields(TiedLoraConfig)} | {"restore_from_path"}
    assert TiedLoRA.preset("vera", rank=3).config() == TiedLoraConfig.preset("vera", rank=3)


def test_a_field_may_change_until_the_method_is_applied() -> None:
    peft = TiedLoRA(rank=4)
    peft.rank, peft.targets = 3, ["linear_qkv"]
    applied(peft)
    assert peft.adapter.config == TiedLoraConfig(rank=3, targets=["linear_qkv"])


def test_wrong_fields_are_refused_together_and_foreign_keys_say_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"dim=8: .* write rank\n.*target_modules=.* write targets"):
        TiedLoRA(dim=8, target_modules=["linear_qkv"])
    with pytest.raises(ConfigError) as refused:
        TiedLoRA(rank=0, dropout=2.0)
    assert len(refused.value.problems) == 2


def test_a_rank_budget_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"rank_budget=\{'target_rank': 2\}: not with Megatron-Bridge"):
        TiedLoRA(rank_budget={"target_rank": 2})
    with pytest.raises(ConfigError, match=r"rank_budget=.*: not with Megatron-Bridge"):
        TiedLoRA.preset("adalora")


def test_a_recipe_can_copy_and_pickle_it() -> None:
    peft = TiedLoRA(rank=3, layers=[1, 2])
    assert copy.deepcopy(peft) == pickle.loads(pickle.dumps(peft)) == dataclasses.replace(peft) == peft


def test_a_copy_of_an_applied_method_holds_no_model() -> None:
    """Bridge copies a model's configuration, with its hooks, and sends it to the other stages."""
    peft = TiedLoRA(rank=3)
    applied(peft)
    assert copy.copy(peft).adapter is pickle.loads(pickle.dumps(peft)).adapter is None
    assert peft.adapter is not None


@pytest.mark.parametrize(("preset", "lost"), [("tl6", 0), ("vera", 8)])
def test_the_filter_keeps_frozen_factors_which_bridges_own_would_lose(preset: str, lost: int) -> None:
    """VeRA's A and B of four targets are frozen; Bridge's filter keeps what is trained."""
    peft = TiedLoRA.preset(preset, rank=3)
    (chunk,) = applied(peft)
    peft.set_params_to_save([chunk])
    keys = [key for key in chunk.sharded_state_dict() if "_extra_state" not in key]
    kept = [key for key in keys if peft.adapter_key_filter(key)]
    assert len(kept) == len(list(peft.adapter.chunks[0].factors.parameters())) == 40
    assert set(kept) <= peft.params_to_save
    assert kept == [key for key in keys if peft.adapter_key_filter((key, None))]
    trained = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
    peft.params_to_save = trained
    assert len(kept) - sum(PEFT.adapter_key_filter(peft, key) for key in keys) == lost


@pytest.mark.parametrize("dropped", ["decoder.tied_lora.linear_qkv.A", "decoder.tied_lora.layers.2.linear_fc2.v"])
def test_a_resume_that_drops_a_tensor_is_noticed_though_bridge_loads_without_strict(dropped: str) -> None:
    peft = TiedLoRA(rank=3)
    (chunk,) = applied(peft)
    state = {key: value for key, value in chunk.state_dict().items() if peft.adapter_key_filter(key)}
    chunk.load_state_dict(state, strict=False)
    del state[dropped]
    with pytest.raises(RuntimeError, match=rf"lacks {re.escape(dropped)} of the adapter"):
        chunk.load_state_dict(state, strict=False)


def test_a_base_is_loaded_into_a_model_whose_adapter_is_off() -> None:
    peft = TiedLoRA(rank=3)
    (chunk,) = applied(peft)
    base = {key: value for key, value in chunk.state_dict().items() if not peft.adapter_key_filter(key)}
    with pytest.raises(RuntimeError, match=r"and \d+ more of the adapter.*inside disable_adapter\(model\)"):
        chunk.load_state_dict(base, strict=False)
    with peft.disable_adapter([chunk]):
        chunk.load_state_dict(base)


def test_switched_off_the_model_is_the_base_and_switched_on_it_is_the_adapted_one_again() -> None:
    """RL's reference policy: the same model without its adapter."""
    base = logits(build(fill_base, ddp=False))
    peft = TiedLoRA(rank=3)
    model = applied(peft)
    adapted, trained = logits(model), [id(parameter) for parameter in peft.adapter.parameters()]
    assert not torch.equal(adapted, base)
    with peft.disable_adapter(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    assert [id(parameter) for parameter in model[0].parameters() if parameter.requires_grad] == trained


def test_an_adapter_of_another_model_is_not_switched() -> None:
    peft = TiedLoRA(rank=3)
    with pytest.raises(RuntimeError, match=r"not applied to this model; .*peft\(model\)"):
        peft.disable_adapter_layers(build(fill_base, ddp=False))
    applied(peft)
    with pytest.raises(RuntimeError, match="not applied to this model"):
        peft.enable_adapter_layers(build(fill_base, ddp=False))


def test_an_adapter_hook_before_the_base_hook_gives_the_same_model() -> None:
    """Bridge's loader finds a base weight by its name, which an adapter does not change."""
    after, before = TiedLoRA(rank=3), TiedLoRA(rank=3)
    (expected,), (found,) = build(fill_base, after, ddp=False), build(before, copied_base, ddp=False)
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(logits([found]), logits([expected]))


def test_a_hook_after_ddp_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is wrapped in DistributedDataParallel already; inject first"):
        build(fill_base, post_wrap_hook=TiedLoRA(rank=3))


def test_not_for_training_nothing_requires_a_gradient() -> None:
    peft = TiedLoRA(rank=3)
    (chunk,) = build(fill_base, lambda model: peft(model, training=False), ddp=False)
    assert not chunk.training
    assert not any(parameter.requires_grad for parameter in chunk.parameters())


def test_an_adapters_file_is_where_training_starts(tmp_path: Path) -> None:
    first = TiedLoRA(rank=3, alpha=5.0, targets=["linear_fc1"])
    applied(first)
    path = save_adapter(first.adapter, tmp_path / "adapter.nemo")
    again = TiedLoRA(restore_from_path=str(path))
    build(fill_base, again, ddp=False)
    assert again.adapter.config == first.adapter.config
    expected = first.adapter.full_state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.adapter.full_state().items())
    wrong = TiedLoRA(rank=4, alpha=5.0, dropout=0.1, restore_from_path=str(path))
    with pytest.raises(ConfigError, match=r"rank=4: the adapter in .* has 3; .*\n.*dropout=0\.1: .* has 0\.0"):
        build(fill_base, wrong, ddp=False)


def copied_base(model: list[Any]) -> list[Any]:
    """Loads the base by name, as Bridge's loader does, into a model that has an adapter."""
    source = dict(build(fill_base, ddp=False)[0].named_parameters())
    for name, parameter in model[0].named_parameters():
        if name in source:
            parameter.data.copy_(source[name])
    return model


def test_bridges_lora_alone_sees_a_stand_in_for_transformer_engine() -> None:
    """Without one, Bridge cannot be imported on this machine. Whoever asks for Transformer Engine finds none."""
    assert not detect.has_transformer_engine()
    assert "transformer_engine" not in sys.modules
    layers = sys.modules[no_bridge_kernels.OWNER]
    assert not isinstance(torch.nn.Linear(1, 1), layers.te.Linear)
    assert no_bridge_kernels.enable() == ()
