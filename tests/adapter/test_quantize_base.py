# SPDX-License-Identifier: Apache-2.0
"""One process, a tiny real GPT: what `quantize_base` changes and keeps."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from nemo_tied_lora import ConfigError, TiedLoraConfig, base_precision, inject, quantize_base
from nemo_tied_lora.adapter.quantized import kernels
from nemo_tied_lora.adapter.quantized import quantize_base as quantizing
from nemo_tied_lora.adapter.quantized.quantized_weight import QuantizedWeight
from tests.adapter.test_inject import logits, randomise
from tests.harness.dequantized import make_plain, quantized_weights
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import build_gpt

MODEL: dict[str, Any] = {"num_layers": 2, "hidden": 64, "ffn": 128, "dtype": torch.bfloat16}
MIXTURE = {"num_moe_experts": 4, "moe_layer_freq": [0, 1], "moe_shared_expert_intermediate_size": 64, "llama": True}
CONFIG = TiedLoraConfig.preset("tl6", rank=3)


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def model(**options: Any) -> Any:
    return build_gpt(**{**MODEL, **options})


def test_the_four_linears_of_each_layer_are_quantised_and_nothing_else() -> None:
    gpt = model()
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    report = quantize_base(gpt)
    quantised = {name: weight for name, _, weight in quantized_weights(gpt)}
    linears = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    assert set(quantised) == {f"decoder.layers.{layer}.{name}.weight" for layer in (0, 1) for name in linears}
    assert set(report.linears) == {f"layers.{n}.{name.partition('.')[2]}" for n in (0, 1) for name in linears}
    for name, parameter in gpt.named_parameters():
        if name in quantised:
            error = (quantised[name].dequantize().float() - before[name].float()).norm() / before[name].float().norm()
            assert 0.05 < error < 0.15, name
        else:
            assert type(parameter) is nn.Parameter
            assert torch.equal(parameter, before[name]), name
    assert report.num_weights == sum(before[name].numel() for name in quantised) == 2 * 64 * (3 * 64 + 64 + 2 * 128)
    assert report.bytes_before == 2 * report.num_weights
    assert report.bytes_after == sum(weight.bytes_held for weight in quantised.values())
    assert report.bits_per_weight == 4.25
    assert str(report) == (
        "nf4/64: 8 linears of the decoder (2 linear_proj, 2 linear_qkv, 2 linear_fc1, 2 linear_fc2), 0.1 MB in bfloat16 -> "
        "0.0 MB, 4.25 bits a weight"
    )


def test_experts_and_shared_experts_are_quantised_and_the_router_is_not() -> None:
    gpt = model(**MIXTURE)
    report = quantize_base(gpt)
    assert {f"layers.1.experts.{e}.linear_fc{n}" for e in range(4) for n in (1, 2)} < set(report.linears)
    assert {"layers.1.shared_experts.linear_fc1", "layers.0.linear_fc2"} < set(report.linears)
    assert type(gpt.decoder.layers[1].mlp.router.weight) is nn.Parameter
    assert len(list(quantized_weights(gpt))) == len(report.linears) == 4 + 2 + 8 + 2


def test_a_parameter_keeps_what_megatron_has_set_on_it() -> None:
    gpt = model()
    before = {name: dict(vars(p)) for name, p in gpt.named_parameters()}
    quantize_base(gpt)
    for name, _, weight in quantized_weights(gpt):
        assert before[name].items() <= vars(weight).items()
        assert {"tensor_model_parallel", "partition_dim"} <= before[name].keys()


def test_each_old_weight_is_freed_before_the_next_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = model()
    old = [weakref.ref(layer.mlp.linear_fc1.weight) for layer in gpt.decoder.layers]
    alive = []

    def quantize(*args: Any, **options: Any) -> Any:
        alive.append([weight() is not None for weight in old])
        return kernels.quantize(*args, **options)

    gc.disable()
    try:
        monkeypatch.setattr(quantizing, "quantize", quantize)
        quantize_base(gpt)
    finally:
        gc.enable()
    assert (
        alive[:4] == [[True, True]] * 4
    )  # the first call tries the kernels out, the fourth quantises the first of them
    assert alive[4:8] == [[False, True]] * 4
    assert alive[8] == [False, False]
    assert [weight() for weight in old] == [None, None]


@pytest.mark.parametrize("options", [{}, {"double": True}, {"kind": "int8"}, {"block_size": 32}], ids=str)
def test_training_has_the_bits_of_the_dequantised_base(options: dict[str, Any]) -> None:
    runs = []
    for plain in (False, True):
        gpt = model()
        quantize_base(gpt, **options)
        if plain:
            make_plain(gpt)
        runs.append(trained(gpt))
    (outputs, gradients), (expected, wanted) = runs
    assert torch.equal(outputs, expected)
    assert gradients.keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())
    assert not torch.equal(outputs, trained(model())[0])  # the unquantised base gives others


def test_backward_keeps_no_tensor_of_a_weights_size() -> None:
    gpt = model(hidden=256, ffn=256)
    quantize_base(gpt)
    smallest = min(weight.nbytes for _, _, weight in quantized_weights(gpt))
    assert max(kept_bytes(gpt)) < smallest == 2 * 256 * 256
    make_plain(gpt)
    assert max(kept_bytes(gpt)) == 2 * 256 * 3 * 256  # control: the plain weight of linear_qkv


def test_the_precision_is_the_dtype_or_what_the_base_was_quantised_to() -> None:
    options: dict[str, dict[str, Any]] = {
        "nf4/64": {},
        "nf4/32": {"block_size": 32},
        "nf4/64 double": {"double": True},
        "nf4/64 float32": {"statistics": "float32"},
        "int8/row": {"kind": "int8"},
    }
    assert base_precision(model()) == "bfloat16"
    for precision, chosen in options.items():
        gpt = model()
        outer = nn.Module()
        outer.module = gpt
        assert quantize_base([outer], **chosen).precision == precision
        assert base_precision(outer) == base_precision([gpt]) == precision
        inject(gpt, CONFIG)
        assert base_precision(gpt) == precision


def test_removing_the_adapter_leaves_the_quantised_base() -> None:
    gpt = model()
    quantize_base(gpt)
    output = logits(gpt)
    adapter = inject(gpt, CONFIG)
    randomise(adapter)
    assert not torch.equal(logits(gpt), output)
    adapter.remove()
    assert torch.equal(logits(gpt), output)


def test_merge_is_refused_and_changes_nothing() -> None:
    gpt = model()
    quantize_base(gpt)
    adapter = inject(gpt, CONFIG)
    randomise(adapter)
    output = logits(gpt)
    with pytest.raises(
        ConfigError, match=r"^merge: the base is quantised \(nf4/64\).* use tied-lora merge on its file"
    ):
        adapter.merge()
    assert torch.equal(logits(gpt), output)
    adapter.reduce_gradients()  # which a merged adapter refuses


def trained(gpt: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits, and the adapter's gradients."""
    adapter = inject(gpt, CONFIG)
    randomise(adapter)
    output = logits(gpt)
    output.float().square().mean().backward()
    gradients = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(gradients) == len(list(adapter.parameters()))
    return output.detach(), gradients


def kept_bytes(gpt: Any) -> list[int]:
    """The bytes of each tensor that autograd keeps for the backward pass of an adapted model."""
    adapter = inject(gpt, CONFIG)
    embedding = set(gpt.embedding.parameters()) | set(gpt.output_layer.parameters())
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in embedding:
            kept.append(tensor.bytes_held if isinstance(tensor, QuantizedWeight) else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits(gpt)
    adapter.remove()
    return kept
