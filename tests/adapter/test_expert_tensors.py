# SPDX-License-Identifier: Apache-2.0
"""One process: the tensors of a mixture's experts: names, counts, tying, merging, gradients, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter.experts import group_of, name_at, own_names, tied_names
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.param_count import parameter_counts
from nemo_tied_lora.adapter.tied_linear import TiedLoraMixin
from nemo_tied_lora.checkpoint.base_identity import BaseMismatchError
from nemo_tied_lora.checkpoint.nemo_adapter_packing import largest_file
from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.planning.architecture import selected_linears
from tests.adapter.test_experts import EXPERTS, GROUPS, MIXTURE, RUNS, linears, logits, planned, randomised
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import build_gpt


def test_names_of_experts_are_global_and_free_of_megatrons_paths() -> None:
    assert name_at("self_attention.linear_qkv") == "linear_qkv"
    assert name_at("mlp.linear_fc1") == "linear_fc1"
    assert name_at("mlp.experts.local_experts.5.linear_fc1") == "experts.5.linear_fc1"
    assert name_at("mlp.shared_experts.linear_fc2") == "shared_experts.linear_fc2"
    assert name_at("mlp.experts.linear_fc1") is None
    assert group_of("experts.15.linear_fc2") == "experts.linear_fc2"
    assert own_names("experts.linear_fc1", 2) == ("experts.0.linear_fc1", "experts.1.linear_fc1")
    assert tied_names("experts.linear_fc1", 2, "per_expert") == own_names("experts.linear_fc1", 2)
    assert tied_names("experts.linear_fc1", 2, "tied") == ("experts.linear_fc1",)
    assert tied_names("linear_fc1", 1, "per_expert") == tied_names("linear_fc1", 1, "tied") == ("linear_fc1",)


def test_an_unknown_way_to_tie_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="experts='all': unknown; choose one of per_expert, tied"):
        TiedLoraConfig(experts="all")


def formula(config: TiedLoraConfig) -> dict[str, int]:
    """The count by the table in experts.py, written independently."""
    counts = {}
    for group, (inputs, outputs, layers, experts) in GROUPS.items():
        copies = dict.fromkeys("ABuv", layers * experts)
        copies |= dict.fromkeys(config.tied, 1 if config.experts == "tied" else experts)
        elements = {"A": config.rank * inputs, "B": config.rank * outputs, "u": config.rank, "v": outputs}
        counts[group] = sum(copies[f] * elements[f] for f in config.trained)
    return counts


@pytest.mark.parametrize("experts", ["per_expert", "tied"])
@pytest.mark.parametrize("preset", ["lora", "vera", "tl5", "tl6"])
def test_trained_parameters_are_the_formulas(preset: str, experts: str) -> None:
    single_process()
    model = build_gpt(**MIXTURE)
    adapter = inject(model, TiedLoraConfig.preset(preset, rank=3, experts=experts))
    expected = formula(adapter.config)
    assert adapter.num_parameters() == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(expected.values())
    in_file = {name: tensor.shape for name, tensor in adapter.full_state().items()}
    assert in_file == expected_shapes(adapter.config, adapter.shapes)


@pytest.mark.parametrize("experts", ["per_expert", "tied"])
def test_a_plan_counts_what_the_model_has(experts: str, tmp_path: Path) -> None:
    single_process()
    model, config = build_gpt(**MIXTURE), TiedLoraConfig(rank=3, experts=experts)
    assert planned().num_parameters == sum(parameter.numel() for parameter in model.parameters())
    adapter = inject(model, config)
    shapes = selected_linears(planned(), config)
    assert parameter_counts(shapes, config) == adapter.num_parameters()
    size = save_adapter(adapter, tmp_path / "moe.nemo").stat().st_size
    assert size <= largest_file(config, shapes, 8) <= size + 64 * 1024


def test_bad_sizes_of_a_mixture_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        planned(num_moe_experts=0, moe_ffn_hidden_size="28", moe_layer_freq=[1, 0])
    keys = ["model.num_moe_experts", "model.moe_ffn_hidden_size", "model.moe_layer_freq"]
    assert [problem.split("=")[0] for problem in caught.value.problems] == keys


@pytest.mark.parametrize("experts", ["per_expert", "tied"])
def test_what_is_tied_is_one_tensor_and_nothing_else_is(experts: str) -> None:
    """The linears of dense layers and of experts have the same shape here, and still share nothing."""
    single_process()
    model = build_gpt(**{**MIXTURE, "moe_ffn_hidden_size": 40, "moe_shared_expert_intermediate_size": 40})
    adapter = inject(model, TiedLoraConfig(rank=3, targets=["linear_fc1"], experts=experts))
    holders: dict[int, set[tuple[int, str]]] = {}
    for place, module in linears(adapter).items():
        holders.setdefault(id(module.tied_lora.factor("A")), set()).add(place)
        assert module.tied_lora.factor("B") is module.tied_lora.tied.B
    layers, routed = (0, 2, 3), range(EXPERTS)
    each = [{(layer, f"experts.{e}.linear_fc1") for layer in layers} for e in routed]
    shared = {(layer, "shared_experts.linear_fc1") for layer in layers}
    expected = [{(1, "linear_fc1")}, shared, *([set().union(*each)] if experts == "tied" else each)]
    assert sorted(map(sorted, holders.values())) == sorted(map(sorted, expected))
    owned = [module.tied_lora.factor(f) for module in linears(adapter).values() for f in "uv"]
    assert len({id(tensor) for tensor in owned}) == 2 * (1 + len(layers) * (EXPERTS + 1))


def test_the_adapter_starts_as_the_base_and_removal_restores_it() -> None:
    single_process()
    model = build_gpt(**MIXTURE)
    base, names = logits(model), [name for name, _ in model.named_parameters()]
    adapter = inject(model, TiedLoraConfig(rank=3))
    assert torch.equal(logits(model), base)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "tied_lora" not in n)
    adapter.remove()
    assert torch.equal(logits(model), base)
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(isinstance(module, TiedLoraMixin) for module in model.modules())


def test_merging_into_the_experts_equals_the_adapter_beside_them() -> None:
    single_process()
    model = build_gpt(**MIXTURE)
    base = logits(model)
    adapter = randomised(model, RUNS["tl6, per expert"])
    beside = logits(model)
    adapter.merge()
    assert torch.allclose(logits(model), beside, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(beside, base, rtol=1e-3)
    adapter.unmerge()
    assert torch.equal(logits(model), beside)


def test_an_expert_without_tokens_has_gradients_of_zero() -> None:
    single_process()
    adapter = randomised(build_gpt(**MIXTURE), RUNS["tl6, per expert"])
    logits(adapter.chunks[0].outer).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    still = {name for name, gradient in gradients.items() if not gradient.any()}  # type: ignore[union-attr]
    assert still == {name for name in gradients if "experts.2." in name}


def test_a_file_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    single_process()
    adapter = randomised(build_gpt(**MIXTURE), RUNS["tl6, tied"])
    path = save_adapter(adapter, tmp_path / "moe.nemo")
    loaded = load_adapter(build_gpt(**MIXTURE), path)
    assert all(torch.equal(a, b) for a, b in zip(*(x.full_state().values() for x in (adapter, loaded)), strict=True))
    smaller = build_gpt(**{**MIXTURE, "num_moe_experts": 3})
    with pytest.raises(BaseMismatchError, match="num_moe_experts: the adapter was trained on 4, this model has 3"):
        load_adapter(smaller, path)
    with pytest.raises(BaseMismatchError, match="num_moe_experts: the adapter was trained on 4, this model has None"):
        load_adapter(build_gpt(llama=True, groups=2), path)
    assert not any(isinstance(module, TiedLoraMixin) for module in smaller.modules())


def test_layers_without_experts_give_no_tensors_of_experts() -> None:
    single_process()
    adapter = inject(build_gpt(**MIXTURE), TiedLoraConfig(rank=3, layers=[1]))
    assert set(adapter.shapes) == set(TARGETS)
    assert not any("experts" in name for name, _ in adapter.named_parameters())
