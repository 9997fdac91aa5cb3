# SPDX-License-Identifier: Apache-2.0
"""Pure maths, one process: which tensors the adapted linear keeps for backward, and which it computes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_tied_lora.config import FACTORS
from tests.adapter.test_tied_linear import (
    EXACT,
    IN,
    KINDS,
    RANK,
    PlainLinear,
    attach,
    literal,
    make_linear,
    sample,
    stored,
)
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import full_tensor


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [("B",), ("v", "u"), ("v", "B", "u")], ids="".join)
def test_frozen_A_keeps_no_activation_as_wide_as_x(kind: str, trained: tuple[str, ...]) -> None:
    assert IN not in widths_kept_for_backward(kind, trained)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_A_keeps_x_itself_and_not_a_copy(kind: str) -> None:
    linear = make_linear(kind)
    attach(linear, kind, trained=FACTORS)
    x = sample().requires_grad_()
    kept = [t for t in kept_for_backward(lambda: linear(x)) if t.numel() == x.numel() and t.shape[-1] == IN]
    assert {t.untyped_storage().data_ptr() for t in kept} == {x.untyped_storage().data_ptr()}


def widths_kept_for_backward(kind: str, trained: tuple[str, ...]) -> set[int]:
    """The last sizes of the activations that autograd keeps: of tensors with the 5 * 3 positions of the sample."""
    linear = make_linear(kind)
    attach(linear, kind, trained=trained)
    kept = kept_for_backward(lambda: linear(sample().requires_grad_()))
    widths = {t.shape[-1] for t in kept if t.dim() > 1 and t.numel() == 15 * t.shape[-1]}
    assert RANK in widths  # h, so the measurement does see activations
    return widths


def kept_for_backward(forward: Callable[[], Any]) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        forward()
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other_first", [True, False])
def test_another_consumer_of_x_neither_sees_nor_spoils_the_update(kind: str, other_first: bool) -> None:
    """The update adds in place to the base's memory; x and the gradients that others hold must not change."""
    linear = make_linear(kind)
    adapter = attach(linear, kind)
    leaf, twin = sample().requires_grad_(), sample().requires_grad_()
    twins = {name: p.detach().clone().requires_grad_() for name, p in stored(adapter).items()}
    x, twin_x = leaf * 2.0, twin * 2.0
    before = x.detach().clone()
    x.retain_grad()
    twin_x.retain_grad()
    if other_first:
        side = x.sin()
        output = linear(x)[0]
    else:
        output = linear(x)[0]
        side = x.sin()
    expected = literal(twin_x, linear.weight, twins, 1.0) + linear.bias
    assert torch.equal(x, before)
    (output.square().sum() + 3.0 * side.sum()).backward()
    (expected.square().sum() + 3.0 * twin_x.sin().sum()).backward()
    torch.testing.assert_close(x.grad, twin_x.grad, **EXACT)
    torch.testing.assert_close(leaf.grad, twin.grad, **EXACT)
    for name, parameter in stored(adapter).items():
        torch.testing.assert_close(parameter.grad, twins[name].grad, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_through_two_linears_gives_both_gradients(kind: str) -> None:
    first, second = make_linear(kind), make_linear(kind)
    adapters = [attach(first, kind), attach(second, kind, trained=("B", "A"))]
    x, twin_x = sample().requires_grad_(), sample().requires_grad_()
    (got,) = torch.autograd.grad((first(x)[0] * second(x)[0]).sum(), [x])
    outputs = [literal(twin_x, first.weight, dict(stored(adapter)), 1.0) + first.bias for adapter in adapters]
    (expected,) = torch.autograd.grad((outputs[0] * outputs[1]).sum(), [twin_x])
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_two_outputs_do_not_share_memory(kind: str) -> None:
    linear = make_linear(kind)
    attach(linear, kind)
    first = linear(sample())[0]
    kept = first.detach().clone()
    linear(sample(name="another"))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_the_upstream_gradient_is_unchanged(kind: str) -> None:
    linear = make_linear(kind)
    attach(linear, kind)
    output = linear(sample().requires_grad_())[0]
    upstream = full_tensor("upstream", tuple(output.shape))
    before = upstream.clone()
    output.backward(upstream)
    assert torch.equal(upstream, before)


class KeepsItsOutput(PlainLinear):
    """Saves its output for backward, because exp's backward needs it."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x)[0].exp(), None


def test_backward_raises_if_the_base_saved_the_output_that_is_changed_in_place() -> None:
    linear = KeepsItsOutput("column").requires_grad_(False)
    attach(linear, "column")
    output = linear(sample().requires_grad_())[0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
