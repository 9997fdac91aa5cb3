# SPDX-License-Identifier: Apache-2.0
"""One process: a base on the CPU whose codes go to a device. The same checks run on the CPU, where a GPU is not needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_tied_lora import TiedLoraConfig, inject, quantize_base
from nemo_tied_lora.adapter.quantized.kernels import dequantize, quantize
from tests.adapter.test_inject import randomise
from tests.adapter.test_quantized_weight import FORMS, held, tensors, weight
from tests.harness.dequantized import make_plain, quantized_weights
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt, full_tensor


@pytest.mark.parametrize("form", FORMS)
def test_a_device_makes_the_same_codes_again_and_the_values_of_the_cpu(form: str, device: str) -> None:
    source = weight(torch.bfloat16)
    first, second = (quantize(source.to(device), **FORMS[form]) for _ in range(2))
    assert {tensor.device.type for tensor in tensors(first).values()} == {device}
    assert all(torch.equal(tensor, tensors(second)[name]) for name, tensor in tensors(first).items())
    values, own = dequantize(first).cpu(), dequantize(quantize(source, **FORMS[form]))
    # A number on the border of two codes may get either of them, and a sum of absmax may differ in its last bit.
    different = ((values - own).abs() > 0.01 * own.abs()).float().mean().item()
    assert different < 0.001


def test_codes_that_move_to_a_device_decode_to_the_same_bits(device: str) -> None:
    for form, options in FORMS.items():
        if form != "nf4/64 double":  # whose absmax is a sum
            codes = held(torch.bfloat16, **options)
            assert torch.equal(codes.to(device).dequantize().cpu(), codes.dequantize()), form


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_on_a_device_have_the_bits_of_the_dequantised_weight(dtype: torch.dtype, device: str) -> None:
    for form, options in FORMS.items():
        codes, leaves = held(dtype, **options).to(device), []
        for w in (codes, codes.dequantize()):
            x = full_tensor("x", (3, 2, 256)).to(device, dtype).requires_grad_()
            torch.matmul(x, w.t()).square().sum().backward()
            leaves.append(x)
        assert torch.equal(leaves[0].grad, leaves[1].grad), form


def test_a_base_on_the_cpu_is_trained_on_the_device_with_the_bits_of_the_dequantised_one(device: str) -> None:
    runs = []
    for plain in (False, True):
        gpt = build_gpt(num_layers=2, hidden=256, ffn=512, dtype=torch.bfloat16, llama=True)
        quantize_base(gpt, device=device)
        assert {weight.device.type for _, _, weight in quantized_weights(gpt)} == {device}
        assert gpt.embedding.word_embeddings.weight.device.type == "cpu"
        if plain:
            make_plain(gpt)
        runs.append(_trained(gpt.to(device), device))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_whole_base_is_never_on_the_gpu(device: str) -> None:
    gpt = build_gpt(num_layers=8, hidden=1024, ffn=4096, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    report = quantize_base(gpt, device=device)
    held_now, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert report.bytes_after <= held_now < 1.1 * report.bytes_after
    assert peak < report.bytes_after + report.bytes_before / 8 * 4  # one layer's share, and what its kernels need


def _trained(gpt: Any, device: str) -> list[torch.Tensor]:
    adapter = inject(gpt, TiedLoraConfig.preset("tl6", rank=3))
    randomise(adapter)
    tokens = torch.randint(0, VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool, device=device).triu(1)[None, None]
    output = gpt(tokens, torch.arange(SEQUENCE, device=device).expand(2, SEQUENCE), mask)
    output.float().square().mean().backward()
    return [output.detach(), *(p.grad for p in adapter.parameters() if p.grad is not None)]
