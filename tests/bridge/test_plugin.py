# SPDX-License-Identifier: Apache-2.0
"""One process: what Bridge asks of a PEFT method, and the traps that only its users meet."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import sys
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
    assert own == {one.name for one in dataclasses.fields(TiedLoraConfig)} | {"restore_from_path", "allow_other_base"}
    assert TiedLoRA.preset("vera", rank=3).config() == TiedLoraConfig.preset("vera", rank=3)


def test_a_field_may_change_until_the_method_is_applied() -> None:
    peft = TiedLoRA(rank=4)
    peft.rank, peft.targets = 3, ["linear_qkv"]
    applied(peft)
    assert peft.adapter.config == TiedLoraConfig(rank=3, targets=["linear_qkv"])


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("dim", 64, r"dim=64: .* write rank"),
        ("target_modules", ["linear_qkv"], "target_modules=.* write targets"),
        ("rnk", 5, r"rnk=5: .*did you mean rank\?"),
        ("dim", None, "dim=None: not a field of TiedLoRA; the fields are rank, alpha, "),
        ("preset", "vera", "preset='vera': not a field of TiedLoRA"),
    ],
)
def test_a_recipe_that_sets_an_unknown_field_is_refused_there(name: str, value: Any, remedy: str) -> None:
    peft = TiedLoRA()
    with pytest.raises(ConfigError, match=remedy):
        setattr(peft, name, value)


def test_bridge_may_set_what_it_keeps_in_a_method() -> None:
    peft = TiedLoRA()
    peft.params_to_save, peft._cached = {"a"}, 1
    assert (peft.params_to_save, peft._cached) == ({"a"}, 1)


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
    copy.copy(peft).alpha = 5.0
    assert peft._set == {"rank", "layers"}, "a copy notes its own fields"
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


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TiedLoRA]:
    """An adapter's file, and the method that it was saved from."""
    single_process()
    first = TiedLoRA(rank=3, alpha=5.0, targets=["linear_fc1"], layers=[0, 2])
    applied(first)
    return str(save_adapter(first.adapter, tmp_path_factory.mktemp("file") / "adapter.nemo")), first


def test_an_adapters_file_is_where_training_starts_and_the_fields_become_its_own(file: tuple[str, TiedLoRA]) -> None:
    path, first = file
    again = TiedLoRA(restore_from_path=path)
    build(fill_base, again, ddp=False)
    assert again.adapter.config == again.config() == first.adapter.config
    assert (again.rank, again.alpha, again.layers) == (3, 5.0, [0, 2]), "Bridge records the fields"
    expected = first.adapter.full_state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.adapter.full_state().items())
    again.rank = 8
    with pytest.raises(ConfigError, match=r"rank=8: the adapter in .* has 3; leave the field out, or set it to that"):
        again.read_file()


def set_later(peft: TiedLoRA) -> TiedLoRA:
    peft.rank = 8
    return peft


def changed_in_place(peft: TiedLoRA) -> TiedLoRA:
    peft.targets.remove("linear_fc1")
    return peft


@pytest.mark.parametrize(
    ("make", "problems"),
    [
        (lambda path: TiedLoRA(rank=4, dropout=0.1, restore_from_path=path), ["rank=4", "dropout=0.1"]),
        (lambda path: TiedLoRA(8, restore_from_path=path), ["rank=8"]),
        (lambda path: TiedLoRA(rank=8, layers=None, restore_from_path=path), ["rank=8", "layers=None"]),
        (lambda path: set_later(TiedLoRA(restore_from_path=path)), ["rank=8"]),
        (lambda path: changed_in_place(TiedLoRA(restore_from_path=path)), ["targets=['linear_qkv', "]),
        (lambda path: copy.deepcopy(set_later(TiedLoRA(restore_from_path=path))), ["rank=8"]),
        (lambda path: TiedLoRA.preset("vera", restore_from_path=path), ["trained=['v', 'u']"]),
        (lambda path: TiedLoRA.preset("tl6", rank=8, restore_from_path=path), ["rank=8"]),
        (lambda path: TiedLoRA.preset(None, rank=3, alpha=None, restore_from_path=path), []),
        (lambda path: copy.deepcopy(TiedLoRA(restore_from_path=path)), []),
    ],
)
def test_a_field_that_was_set_must_have_the_files_value_also_if_it_is_the_default(
    make: Any, problems: list[str], file: tuple[str, TiedLoRA]
) -> None:
    peft, found = make(file[0]), list[str]()
    try:
        peft.read_file()
    except ConfigError as refused:
        found += refused.problems
    assert len(found) == len(problems)
    assert all(
        line.startswith(start) and "the adapter in" in line for line, start in zip(found, problems, strict=True)
    )
    if not problems:
        assert peft.config() == file[1].config()


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"restore_from_path=/nope\.nemo: no such file; name the \.nemo file"):
        build(fill_base, TiedLoRA(restore_from_path="/nope.nemo"), ddp=False)


def test_another_base_is_refused_and_the_field_that_the_error_names_allows_it(file: tuple[str, TiedLoRA]) -> None:
    def other_base(model: list[Any]) -> list[Any]:
        fill_base(model)[0].decoder.layers[1].mlp.linear_fc2.weight.data[0, 0] += 1
        return model

    with pytest.raises(ConfigError, match="or set allow_other_base=true"):
        build(other_base, TiedLoRA(restore_from_path=file[0]), ddp=False)
    allowed = TiedLoRA(restore_from_path=file[0], allow_other_base=True)
    build(other_base, allowed, ddp=False)
    assert allowed.adapter.config == file[1].adapter.config


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
