# SPDX-License-Identifier: Apache-2.0
"""One process, a tiny real megatron-core GPT: an adapter that is merged, removed or cast, and linears that share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nemo_tied_lora import Adapter, ConfigError, TiedLoraConfig, check_ddp, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter.replica_check import check_ties
from tests.adapter.test_inject import logits, loss_of, randomise, stored
from tests.adapter.test_inject_refused import description, refused
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import build_gpt


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def adapted(model: nn.Module | None = None, **fields: Any) -> tuple[Any, Adapter]:
    """A model with a random adapter."""
    model = build_gpt(num_layers=2) if model is None else model
    adapter = inject(model, TiedLoraConfig(**{"rank": 3, **fields}))
    randomise(adapter)
    return model, adapter


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "tied_lora" not in n}


# Removed


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "load_full_state": ({},),
    "clip_gradients": (1.0,),
    "parameter_groups": (1e-3,),
    "megatron_optimizer": (None, []),
    "follow_optimizer": (None, 1),
}


def public_calls() -> list[str]:
    """Every public method and property of an adapter, except `attached`, which answers False."""
    return [name for name in dir(Adapter) if not name.startswith("_") and name != "attached"]


def call(adapter: Adapter, name: str) -> None:
    """Calls the method, or reads the property."""
    getattr(adapter, name)(*ARGUMENTS.get(name, ()))


@pytest.mark.parametrize("name", public_calls())
def test_after_remove_every_method_says_so(name: str) -> None:
    model, adapter = adapted(build_gpt(num_layers=1))
    adapter.remove()
    assert not adapter.attached
    before = description(model)
    with pytest.raises(
        RuntimeError, match=rf"^{name}: the adapter was removed from the model; inject or load it again$"
    ):
        call(adapter, name)
    assert description(model) == before


def test_after_remove_saving_and_checking_say_so_too(tmp_path: Path) -> None:
    _, adapter = adapted(build_gpt(num_layers=1))
    adapter.remove()
    with pytest.raises(RuntimeError, match="the adapter was removed from the model"):
        save_adapter(adapter, tmp_path / "adapter.nemo")
    with pytest.raises(RuntimeError, match="the adapter was removed from the model"):
        check_ties(adapter)
    assert list(tmp_path.iterdir()) == []


# Merged


def test_what_would_be_wrong_while_merged_is_refused() -> None:
    model, adapter = adapted()
    loss_of(model).backward()
    state = adapter.full_state()
    adapter.merge()
    before = weights_of(model)
    calls: dict[str, Callable[[], Any]] = {
        "merge": adapter.merge,
        "detach": adapter.detach,
        "reduce_gradients": adapter.reduce_gradients,
        "gradient_norm": adapter.gradient_norm,
        "clip_gradients": lambda: adapter.clip_gradients(1.0),
        "load_full_state": lambda: adapter.load_full_state(state),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"^{name}: the adapter is merged.*; call unmerge\(\) first"):
            call()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())
    adapter.unmerge()
    for name in ("reduce_gradients", "gradient_norm", "clip_gradients"):
        calls[name]()


@pytest.mark.parametrize("training", [False, True])
def test_merge_and_unmerge_give_the_adapters_output_and_the_bases_bits(training: bool, tmp_path: Path) -> None:
    model, adapter = adapted()
    model.train(training)
    base, output = weights_of(model), logits(model)
    adapter.unmerge()  # does nothing
    adapter.merge()
    torch.testing.assert_close(logits(model), output, rtol=1e-9, atol=1e-12)
    merged = {name: value for name, value in model.state_dict().items() if name in base}
    assert not torch.equal(
        merged["decoder.layers.1.mlp.linear_fc1.weight"], base["decoder.layers.1.mlp.linear_fc1.weight"]
    )
    save_adapter(adapter, tmp_path / "adapter.nemo")
    adapter.unmerge()
    adapter.unmerge()
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights_of(model).items())
    assert torch.equal(logits(model), output)
    adapter.remove()
    load_adapter(model, tmp_path / "adapter.nemo")  # it names the base's own weights
    assert torch.equal(logits(model), output)


def test_remove_leaves_a_merged_adapter_in_the_weights() -> None:
    model, adapter = adapted()
    output = logits(model)
    adapter.merge()
    merged = weights_of(model)
    adapter.remove()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in weights_of(model).items())
    torch.testing.assert_close(logits(model), output, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("start", "cast"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float64")])
def test_a_model_that_is_cast_while_merged_gets_its_own_weights_in_the_new_dtype(start: str, cast: str) -> None:
    model, adapter = adapted(build_gpt(num_layers=2, dtype=getattr(torch, start)))
    expected = {name: tensor.to(getattr(torch, cast)) for name, tensor in weights_of(model).items()}
    adapter.merge()
    model.to(getattr(torch, cast))
    adapter.unmerge()
    got = weights_of(model)
    assert all(got[name].dtype == tensor.dtype and torch.equal(got[name], tensor) for name, tensor in expected.items())
    loss_of(model).backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_weights_that_were_loaded_while_merged_are_not_overwritten() -> None:
    model, adapter = adapted()
    base = weights_of(model)
    adapter.merge()
    model.load_state_dict({name: tensor + 1 for name, tensor in base.items()}, strict=False)
    with pytest.raises(
        RuntimeError, match=r"unmerge: the weight of layer 0 .* and 7 more was changed since merge\(\)"
    ):
        adapter.unmerge()
    assert all(torch.equal(tensor, base[name] + 1) for name, tensor in weights_of(model).items())
    adapter.remove()
    assert all(torch.equal(tensor, base[name] + 1) for name, tensor in weights_of(model).items())


# Shared


def test_linears_that_share_one_weight_work_but_are_not_merged() -> None:
    model = build_gpt(num_layers=2)
    first, second = (layer.mlp.linear_fc1 for layer in model.decoder.layers)
    second.weight = first.weight
    _, adapter = adapted(model)
    output, before = logits(model), weights_of(model)
    for _ in "12":  # a refused merge is not half a merge
        with pytest.raises(ConfigError) as error:
            adapter.merge()
        (problem,) = error.value.problems
        names = [f"decoder.layers.{i}.mlp.linear_fc1" for i in (0, 1)]
        assert problem.startswith(f"merge: {names[0]} and {names[1]} share one weight, which cannot hold an update")
    adapter.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())
    assert torch.equal(logits(model), output)


def test_a_weight_that_a_module_without_an_adapter_shares_is_not_merged() -> None:
    model = build_gpt(num_layers=2)
    first, second = (layer.mlp.linear_fc1 for layer in model.decoder.layers)
    second.weight = first.weight
    _, adapter = adapted(model, layers=[0])
    with pytest.raises(ConfigError, match="share one weight"):
        adapter.merge()
    adapter.remove()
    _, adapter = adapted(model, targets=["attention"])
    adapter.merge()


def test_a_weight_that_is_a_view_of_another_is_merged_and_restored() -> None:
    model = build_gpt(num_layers=2)
    first, second = (layer.mlp.linear_fc1 for layer in model.decoder.layers)
    second.weight = nn.Parameter(first.weight.data.view_as(first.weight), requires_grad=False)
    _, adapter = adapted(model)
    output, before = logits(model), weights_of(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), output, rtol=1e-9, atol=1e-12)
    adapter.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())
    assert second.weight.data_ptr() == first.weight.data_ptr()


def test_an_output_layer_that_shares_the_embedding_is_no_obstacle() -> None:
    model = build_gpt(num_layers=1)
    model.output_layer.weight = model.embedding.word_embeddings.weight
    _, adapter = adapted(model)
    output = logits(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), output, rtol=1e-9, atol=1e-12)
    adapter.unmerge()


def test_a_merge_that_would_not_be_finite_changes_nothing() -> None:
    model, adapter = adapted()
    before = weights_of(model)
    adapter.chunks[0].linears[-1].module.tied_lora.factor("B").data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="a merged weight is not finite"):
        adapter.merge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def share_linear(model: Any) -> None:
    model.decoder.layers[1].mlp.linear_fc1 = model.decoder.layers[0].mlp.linear_fc1


def share_mlp(model: Any) -> None:
    model.decoder.layers[1].mlp = model.decoder.layers[0].mlp


def share_layer(model: Any) -> None:
    model.decoder.layers[1] = model.decoder.layers[0]


def share_within_a_layer(model: Any) -> None:
    attention = model.decoder.layers[0].self_attention
    attention.linear_proj = attention.linear_qkv


SHARING: dict[Callable[[Any], None], str] = {
    share_linear: "targets: layer 1 linear_fc1 is the same module object as layer 0 linear_fc1; one module cannot have",
    share_mlp: "targets: layer 1 linear_fc2 is the same module object as layer 0 linear_fc2; one module cannot have",
    share_layer: "targets: layer 0 is in the model twice, as one module object; one module cannot have two adapters",
    share_within_a_layer: "targets: layer 0 linear_qkv is the same module object as layer 0 linear_proj; one module",
}


@pytest.mark.parametrize("share", SHARING, ids=lambda share: share.__name__)
def test_a_linear_that_is_used_twice_is_refused_by_name(share: Callable[[Any], None]) -> None:
    model = build_gpt(num_layers=2)
    share(model)
    refused(model, [SHARING[share]])


def test_a_model_that_is_passed_as_two_chunks_is_refused() -> None:
    model = build_gpt(num_layers=1)
    before = description(model)
    with pytest.raises(ConfigError, match="layer 0 linear_qkv is the same module object as layer 0 linear_qkv"):
        inject([model, model], TiedLoraConfig(rank=3))
    assert description(model) == before


def test_a_linear_under_two_paths_of_one_layer_is_one_linear() -> None:
    model = build_gpt(num_layers=1)
    model.decoder.layers[0].alias = model.decoder.layers[0].mlp
    _, adapter = adapted(model)
    assert len(adapter.chunks[0].linears) == 4


# Float32 on a bfloat16 base


def test_a_float32_adapter_keeps_an_update_that_bfloat16_loses() -> None:
    for dtype, kept in ((None, False), ("float32", True)):
        model, adapter = adapted(build_gpt(num_layers=1, dtype=torch.bfloat16), dtype=dtype)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
        before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
        for parameter in adapter.parameters():
            parameter.grad = parameter.detach() * 2**-12
        for _ in range(4):
            optimizer.step()
        moved = {name for name, p in adapter.named_parameters() if not torch.equal(p, before[name])}
        assert moved == (set(before) if kept else set())
        output = logits(model)
        assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("llama", [False, True])
def test_a_float32_adapter_computes_in_float32_and_rounds_once(llama: bool) -> None:
    """The oracle is a float64 computation from the same bfloat16 input and output of the base."""
    _, adapter = adapted(build_gpt(num_layers=1, dtype=torch.bfloat16, llama=llama), dtype="float32", alpha=5.0)
    assert {p.dtype for p in stored(adapter).values()} == {torch.float32}
    for linear in adapter.chunks[0].linears:
        module = linear.module
        x = torch.randn(7, 2, module.weight.shape[1]).bfloat16().requires_grad_()
        y = module(x)[0]
        grad = torch.randn(y.shape).bfloat16()
        y.backward(grad)
        A, B, u, v = (module.tied_lora.factor(f).detach().double() for f in "ABuv")
        update = (v * adapter.config.scale).unsqueeze(1) * (B * u) @ A
        module.tied_lora.enabled = False
        base = module(x.detach())[0]
        module.tied_lora.enabled = True
        assert y.dtype == torch.bfloat16
        rounded = base + (x.detach().double() @ update.t()).bfloat16()
        wrong = (y != rounded).double().mean()
        assert wrong < 0.02  # where float32 and float64 round to different sides
        want = grad.double() @ (module.weight.double() + update)
        assert ((x.grad.double() - want).norm() / want.norm()) < 0.01  # the base's product and one sum in bfloat16
        gradient = module.tied_lora.factor("v").grad.double()
        h = x.detach().double() @ (u.unsqueeze(1) * A).t()
        exact = (grad.double() * (h @ B.t()) * adapter.config.scale).sum((0, 1))
        assert ((gradient - exact).norm() / exact.norm()) < 1e-5  # bfloat16 would be off by 4e-3


def test_a_float32_adapter_stays_so_when_the_model_is_cast_around_it() -> None:
    """Megatron's Float16Module casts what it wraps."""
    from megatron.core.transformer.module import Float16Module

    for dtype, kept in (("float32", torch.float32), (None, torch.bfloat16)):
        model = build_gpt(num_layers=1, dtype=torch.float32)
        _, adapter = adapted(model, dtype=dtype)
        state = adapter.full_state()
        model.config.bf16 = True
        Float16Module(model.config, model)
        assert model.output_layer.weight.dtype == torch.bfloat16
        assert {p.dtype for p in adapter.parameters()} == {kept}
        assert all(torch.equal(tensor, state[name].to(kept)) for name, tensor in adapter.full_state().items())
        assert logits(model).dtype == torch.bfloat16
        adapter.merge()
        model.to(torch.float64)
        adapter.unmerge()
        assert {p.dtype for p in adapter.parameters()} == {torch.float64 if dtype is None else kept}
        loss_of(model).backward()


def test_a_float32_adapter_merges_and_its_file_keeps_its_dtype(tmp_path: Path) -> None:
    model, adapter = adapted(build_gpt(num_layers=2, dtype=torch.bfloat16), dtype="float32")
    output, state = logits(model).float(), adapter.full_state()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    adapter.merge()
    assert ((logits(model).float() - output).norm() / output.norm()) < 0.05
    adapter.unmerge()
    save_adapter(adapter, tmp_path / "adapter.nemo")
    adapter.remove()
    loaded = load_adapter(model, tmp_path / "adapter.nemo")
    assert loaded.config.dtype == "float32"
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.full_state().items())
    assert torch.equal(logits(model).float(), output)


@pytest.mark.parametrize("value", ["bfloat16", "fp32", torch.float32, 32])
def test_another_dtype_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"dtype=.*: unknown; choose one of null, float32"):
        TiedLoraConfig(dtype=value)
    with pytest.raises(ConfigError, match="lora_dtype='float32': not a key of tied_lora; write dtype"):
        TiedLoraConfig.from_mapping({"lora_dtype": "float32"})


# Megatron's DDP


def test_a_configuration_without_the_flag_of_the_sums_is_refused() -> None:
    from copy import copy

    from megatron.core.distributed import DistributedDataParallelConfig

    model = build_gpt(num_layers=1)
    ddp, early = DistributedDataParallelConfig(), copy(model.config)
    message = re.escape("config: this object has no has_cond_embedder=True")
    for config in (model.config, early):
        with pytest.raises(ConfigError, match=message):
            check_ddp(config, ddp)
    adapter = inject(model, TiedLoraConfig(rank=3))
    check_ddp(model.config, ddp)
    check_ddp(copy(model.config), ddp)
    with pytest.raises(ConfigError, match=message):
        check_ddp(early, ddp)
    adapter.remove()
    with pytest.raises(ConfigError, match=message):
        check_ddp(model.config, ddp)
