# SPDX-License-Identifier: Apache-2.0
"""Pure maths, one process: output and every gradient of one adapted linear equal the formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import nn
from torch.nn import functional

from nemo_tied_lora.adapter.tied_factors import Factors
from nemo_tied_lora.adapter.tied_linear import LinearAdapter, attach_to_linear, detach_from_linear, linear_kind
from nemo_tied_lora.config import FACTORS, TiedLoraConfig
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import full_tensor

KINDS = ("column", "row")
IN, OUT, RANK = 7, 10, 3
SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(FACTORS, size)]
TIES: list[tuple[str, ...]] = [(), ("A",), ("B",), ("A", "B")]
# float64 sums in another order differ by a few units in the last place.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def make_linear(
    kind: str, *, dtype: torch.dtype = torch.float64, bias: bool = True, skip_bias_add: bool = False
) -> Any:
    """A frozen Megatron linear (OUT, IN) with fixed values."""
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=True, params_dtype=dtype
    )
    common: dict[str, Any] = {
        "config": config,
        "init_method": nn.init.normal_,
        "bias": bias,
        "skip_bias_add": skip_bias_add,
    }
    if kind == "column":
        linear = ColumnParallelLinear(IN, OUT, gather_output=False, **common)
    else:
        linear = RowParallelLinear(IN, OUT, input_is_parallel=True, **common)
    for name, parameter in linear.named_parameters():
        parameter.data.copy_(full_tensor(name, tuple(parameter.shape)))
    return linear.requires_grad_(False)


class PlainLinear(nn.Module):
    """Takes and returns what megatron-core's TEColumnParallelLinear and TERowParallelLinear do."""

    def __init__(self, parallel_mode: str):
        super().__init__()
        self.parallel_mode = parallel_mode
        self.weight = nn.Parameter(full_tensor("weight", (OUT, IN)))

    def forward(self, x: torch.Tensor) -> Any:
        return functional.linear(x, self.weight), None


def attach(linear: nn.Module, kind: str, **fields: Any) -> LinearAdapter:
    """Attaches an adapter whose stored factors are all random: a factor at 0 would hide errors in the others."""
    config = TiedLoraConfig(rank=RANK, **fields)
    shapes = {"A": (RANK, IN), "B": (OUT, RANK), "u": (RANK,), "v": (OUT,)}
    dtype = linear.weight.dtype  # type: ignore[union-attr]
    tensors = {f: full_tensor(f, shapes[f], 1.0).to(dtype) for f in config.stored}  # type: ignore[arg-type]
    tied = Factors({f: t for f, t in tensors.items() if f in config.tied}, config.trained)
    own = Factors({f: t for f, t in tensors.items() if f not in config.tied}, config.trained)
    adapter = LinearAdapter(config, kind, tied, own, 1, False)
    attach_to_linear(linear, adapter)
    return adapter


def stored(adapter: LinearAdapter) -> dict[str, nn.Parameter]:
    """The adapter's factors by name."""
    return {**dict(adapter.tied.named_parameters()), **dict(adapter.own.named_parameters())}


def literal(x: torch.Tensor, weight: torch.Tensor, factors: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """W x + scale diag(v) B diag(u) A x for x (..., in), with explicit diagonal matrices."""
    u = torch.diag(factors.get("u", torch.ones(RANK, dtype=x.dtype)))
    v = torch.diag(factors.get("v", torch.ones(OUT, dtype=x.dtype)))
    update = v @ factors["B"] @ u @ factors["A"]
    return torch.einsum("oi,...i->...o", weight, x) + scale * torch.einsum("oi,...i->...o", update, x)


def sample(*lead: int, dtype: torch.dtype = torch.float64, name: str = "x") -> torch.Tensor:
    return full_tensor(name, (*(lead or (5, 3)), IN), 1.0).to(dtype)


def gradients(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of a loss in which every output element has another weight."""
    weights = full_tensor("loss", tuple(output.shape), 1.0).to(output.dtype)
    return dict(zip(inputs, torch.autograd.grad((output * weights).sum(), list(inputs.values())), strict=True))


def wanting_grad(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", SUBSETS, ids="".join)
@pytest.mark.parametrize("needs_grad", [True, False], ids=["x trained", "x fixed"])
def test_output_and_every_gradient_equal_the_formula(kind: str, trained: tuple[str, ...], needs_grad: bool) -> None:
    for tied in TIES:
        linear = make_linear(kind)
        adapter = attach(linear, kind, trained=trained, tied=tied, alpha=4.5)
        x = sample().requires_grad_(needs_grad)
        twins = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in stored(adapter).items()}
        twin_x = x.detach().clone().requires_grad_(needs_grad)

        output, bias = linear(x)
        expected = literal(twin_x, linear.weight, twins, 4.5 / RANK) + linear.bias

        assert bias is None
        torch.testing.assert_close(output, expected, **EXACT)
        wanted = wanting_grad({**twins, "x": twin_x})
        assert set(wanted) == {*trained, *(["x"] if needs_grad else [])}
        got = gradients(output, {name: {**stored(adapter), "x": x}[name] for name in wanted})
        for name, gradient in gradients(expected, wanted).items():
            torch.testing.assert_close(
                got[name], gradient, **EXACT, msg=lambda m, n=name, t=tied: f"{n}, tied {t}: {m}"
            )


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_scale_is_alpha_over_rank_and_one_by_default(alpha: float | None) -> None:
    linear = make_linear("column", bias=False)
    adapter = attach(linear, "column", alpha=alpha)
    expected = literal(sample(), linear.weight, stored(adapter), 1.0 if alpha is None else 4.0)  # type: ignore[arg-type]
    torch.testing.assert_close(linear(sample())[0], expected, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_x_on_the_adapters_path_only(kind: str) -> None:
    """With W = 0 and diag(v) B diag(u) A x = sum(x), each output counts the elements that dropout kept."""
    linear = make_linear(kind, bias=False)
    linear.weight.data.zero_()
    adapter = attach(linear, kind, trained=("B", "A"), dropout=0.25)
    for parameter in stored(adapter).values():
        parameter.data.fill_(1.0 / RANK)
    x = torch.ones(4000, IN, dtype=torch.float64)
    torch.manual_seed(5)
    output = linear(x)[0] * RANK
    kept = output[:, 0] * 0.75
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-9)  # kept elements are scaled by 1 / 0.75
    assert kept.unique().numel() > 3
    # 28,000 draws with standard deviation 0.43: the mean is within 0.015 of 0.75 (six standard errors).
    assert abs(kept.mean().item() / IN - 0.75) < 0.015
    assert torch.equal(output, output[:, :1].expand_as(output))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_leaves_the_base_path_whole(kind: str) -> None:
    linear = make_linear(kind)
    base = linear(sample())[0]
    adapter = attach(linear, kind, dropout=0.9)
    stored(adapter)["v"].data.zero_()
    assert torch.equal(linear(sample())[0], base)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_eval_mode(kind: str) -> None:
    dropping, plain = make_linear(kind), make_linear(kind)
    attach(dropping, kind, dropout=0.5)
    attach(plain, kind)
    assert not torch.equal(dropping(sample())[0], plain(sample())[0])
    assert torch.equal(dropping.eval()(sample())[0], plain.eval()(sample())[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_dropout_use_the_mask_of_the_forward(kind: str) -> None:
    linear = make_linear(kind, bias=False)
    adapter = attach(linear, kind, dropout=0.5)
    x, twin_x = sample().requires_grad_(), sample().requires_grad_()
    twins = {name: p.detach().clone().requires_grad_() for name, p in stored(adapter).items()}
    torch.manual_seed(3)
    got = gradients(linear(x)[0], {**stored(adapter), "x": x})
    torch.manual_seed(3)
    mask = functional.dropout(torch.ones_like(x), 0.5)
    zero = torch.zeros_like(linear.weight)
    expected = twin_x @ linear.weight.t() + literal(twin_x * mask, zero, twins, 1.0)
    for name, gradient in gradients(expected, {**twins, "x": twin_x}).items():
        torch.testing.assert_close(got[name], gradient, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_the_caller_adds_is_passed_on(kind: str) -> None:
    linear = make_linear(kind, skip_bias_add=True)
    adapter = attach(linear, kind)
    output, bias = linear(sample())
    assert bias is linear.bias
    torch.testing.assert_close(output, literal(sample(), linear.weight, stored(adapter), 1.0), **EXACT)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_disabled_adapter_gives_the_base_and_detaching_restores_the_class(kind: str) -> None:
    linear = make_linear(kind)
    cls, base = type(linear), linear(sample())[0]
    adapter = attach(linear, kind)
    assert isinstance(linear, cls)
    assert linear_kind(linear) == kind
    assert not torch.equal(linear(sample())[0], base)
    adapter.enabled = False
    assert torch.equal(linear(sample())[0], base)
    detach_from_linear(linear)
    assert type(linear) is cls
    assert "tied_lora" not in vars(linear)
    assert torch.equal(linear(sample())[0], base)


def test_the_adapter_registers_nothing_on_the_base_linear() -> None:
    linear = make_linear("column")
    before = list(linear.state_dict()), [n for n, _ in linear.named_modules()]
    attach(linear, "column")
    assert (list(linear.state_dict()), [n for n, _ in linear.named_modules()]) == before


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
@pytest.mark.parametrize("trained", [FACTORS, ("B",), ("v", "u")], ids="".join)
def test_autocast_computes_in_bfloat16(kind: str, trained: tuple[str, ...]) -> None:
    plain = kind == "plain"
    linear, base = (PlainLinear("row") if plain else make_linear(kind, dtype=torch.float32, bias=False) for _ in "12")
    adapter = attach(linear.float().requires_grad_(False), "row" if plain else kind, trained=trained)
    # The backward of Megatron's own linears fails under autocast on a CPU: it gets bfloat16 and float32.
    x = sample(dtype=torch.float32).requires_grad_(plain)
    twins = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in stored(adapter).items()}
    twin_x = x.detach().double().requires_grad_(plain)
    with torch.autocast("cpu", torch.bfloat16):
        output, base_output = linear(x)[0], base.float()(x.detach())[0]
    expected = literal(twin_x, linear.weight.double(), twins, 1.0)
    assert output.dtype == base_output.dtype == torch.bfloat16
    close(output, expected)
    got = gradients(output, wanting_grad({**stored(adapter), "x": x}))
    for name, gradient in gradients(expected, wanting_grad({**twins, "x": twin_x})).items():
        assert got[name].dtype == torch.float32
        close(got[name], gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_adds_to_an_output_that_a_float32_bias_has_widened(kind: str) -> None:
    linear = make_linear(kind, dtype=torch.float32)
    adapter = attach(linear, kind)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(sample(dtype=torch.float32))[0]
    assert output.dtype == torch.float32
    twins = {name: p.detach().double() for name, p in stored(adapter).items()}
    close(output, literal(sample(), linear.weight.double(), twins, 1.0) + linear.bias.double())


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_model_stays_in_bfloat16(kind: str) -> None:
    linear = make_linear(kind, dtype=torch.bfloat16)
    adapter = attach(linear, kind)
    x = sample(dtype=torch.bfloat16).requires_grad_()
    output = linear(x)[0]
    twins = {name: p.detach().double() for name, p in stored(adapter).items()}
    assert output.dtype == torch.bfloat16
    close(output, literal(x.detach().double(), linear.weight.double(), twins, 1.0) + linear.bias.double())  # type: ignore[arg-type]
    assert {g.dtype for g in gradients(output, {**stored(adapter), "x": x}).values()} == {torch.bfloat16}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares relative to the whole tensor: bfloat16 keeps 8 bits, and several roundings add up."""
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < 0.02, f"relative error {error:.3f}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_a_non_contiguous_input_gives_the_same(kind: str, layout: str) -> None:
    linear = make_linear(kind)
    adapter = attach(linear, kind)
    x = {
        "transposed": lambda: sample(3, 5).transpose(0, 1),
        "strided": lambda: sample(10, 3)[::2],
        "expanded": lambda: sample(1, 3).expand(5, 3, IN),
    }[layout]()
    assert not x.is_contiguous()
    results = []
    for given in (x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()):
        output = linear(given)[0]
        results.append((output, gradients(output, {**stored(adapter), "x": given})))
    (output, got), (expected_output, expected) = results
    torch.testing.assert_close(output, expected_output, **EXACT)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_non_contiguous_output_gradient_gives_the_same(kind: str) -> None:
    linear = make_linear(kind)
    adapter = attach(linear, kind)
    inputs = {**stored(adapter), "x": sample().requires_grad_()}
    upstream = full_tensor("upstream", (OUT, 3, 5)).permute(2, 1, 0)
    got, expected = (
        torch.autograd.grad(linear(inputs["x"])[0], list(inputs.values()), given)
        for given in (upstream, upstream.contiguous())
    )
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(kind: str, mode: Callable[[], Any]) -> None:
    linear = make_linear(kind)
    attach(linear, kind)
    x = sample().requires_grad_()
    expected = linear(x)[0]
    with mode():
        output = linear(x)[0]
    assert not output.requires_grad
    torch.testing.assert_close(output, expected.detach(), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_microbatches_accumulate_the_gradient_of_the_whole_batch(kind: str) -> None:
    linear = make_linear(kind)
    adapter = attach(linear, kind)
    batches = [sample(), sample(name="second")]
    # Both forwards come before both backwards, as in a pipeline's warm-up.
    losses = [linear(x.requires_grad_())[0].square().sum() for x in batches]
    for loss in losses:
        loss.backward()
    accumulated = {name: p.grad.clone() for name, p in stored(adapter).items()}  # type: ignore[union-attr]
    whole = linear(torch.cat([x.detach() for x in batches]))[0].square().sum()
    expected = torch.autograd.grad(whole, list(stored(adapter).values()))
    for name, gradient in zip(stored(adapter), expected, strict=True):
        torch.testing.assert_close(accumulated[name], gradient, **EXACT)
