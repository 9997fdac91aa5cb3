# SPDX-License-Identifier: Apache-2.0
"""Pure maths, one process: the update on linears with the interface of Transformer Engine's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from nemo_tied_lora.adapter.tied_linear import detach_from_linear, linear_kind
from nemo_tied_lora.config import FACTORS
from tests.adapter.test_tied_linear import (
    EXACT,
    IN,
    KINDS,
    OUT,
    PlainLinear,
    attach,
    gradients,
    literal,
    sample,
    stored,
    wanting_grad,
)
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import full_tensor


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


class FusedNormLinear(nn.Module):
    """Takes and returns what megatron-core's TELayerNormColumnParallelLinear does (extensions/transformer_engine.py).

    Transformer Engine returns y or (y, bias), and appends the norm's output if `return_layernorm_output` is set.
    Megatron's wrapper makes a pair of it if the bias is not returned.
    """

    parallel_mode = "column"

    def __init__(self, te_return_bias: bool):
        super().__init__()
        self.te_return_bias = te_return_bias
        self.return_layernorm_output = False
        self.layer_norm_weight = nn.Parameter(1.0 + full_tensor("norm", (IN,)))
        self.weight = nn.Parameter(full_tensor("weight", (OUT, IN)))
        self.bias = nn.Parameter(full_tensor("bias", (OUT,)))

    def forward(self, x: torch.Tensor) -> Any:
        normed = self.norm(x)
        output = functional.linear(normed, self.weight, None if self.te_return_bias else self.bias)
        parts = [
            output,
            *([self.bias] if self.te_return_bias else []),
            *([normed] if self.return_layernorm_output else []),
        ]
        result = parts[0] if len(parts) == 1 else tuple(parts)
        return result if self.te_return_bias else (result, None)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (IN,), self.layer_norm_weight)


@pytest.mark.parametrize("te_return_bias", [True, False])
@pytest.mark.parametrize("trained", [FACTORS, ("v", "u")], ids="".join)
def test_a_fused_norm_feeds_the_update_and_is_hidden_from_the_caller(te_return_bias: bool, trained: tuple) -> None:
    linear = FusedNormLinear(te_return_bias).requires_grad_(False)
    assert linear_kind(linear) == "column"
    adapter = attach(linear, "column", trained=trained, alpha=6.0)
    x, twin_x = sample().requires_grad_(), sample().requires_grad_()
    twins = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in stored(adapter).items()}
    output, bias = linear(x)
    expected = literal(linear.norm(twin_x), linear.weight, twins, 2.0)  # type: ignore[arg-type]
    assert bias is (linear.bias if te_return_bias else None)
    torch.testing.assert_close(output, expected + (0 if te_return_bias else linear.bias), **EXACT)
    got = gradients(output, wanting_grad({**stored(adapter), "x": x}))
    for name, gradient in gradients(expected, wanting_grad({**twins, "x": twin_x})).items():
        torch.testing.assert_close(got[name], gradient, **EXACT)
    detach_from_linear(linear)
    base, _ = linear(x)
    assert isinstance(base, torch.Tensor)
    assert type(linear) is FusedNormLinear


def test_a_fused_norm_linear_that_is_off_returns_what_its_caller_expects() -> None:
    """Merging disables the adapter; the norm's output must not reach the caller then."""
    linear = FusedNormLinear(False).requires_grad_(False)
    base, _ = linear(sample())
    adapter = attach(linear, "column")
    linear(sample())
    adapter.enabled = False
    output, _ = linear(sample())
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output, base)


@pytest.mark.parametrize("mode", KINDS)
def test_a_transformer_engine_linear_without_a_norm_is_adapted_by_its_own_mode(mode: str) -> None:
    linear = PlainLinear(mode).requires_grad_(False)
    assert linear_kind(linear) == mode
    adapter = attach(linear, mode)
    torch.testing.assert_close(
        linear(sample())[0], literal(sample(), linear.weight, dict(stored(adapter)), 1.0), **EXACT
    )


@pytest.mark.parametrize(
    "module", [nn.Linear(IN, OUT), nn.LayerNorm(IN), nn.Identity()], ids=lambda m: type(m).__name__
)
def test_other_modules_have_no_kind(module: nn.Module) -> None:
    assert linear_kind(module) is None
