# SPDX-License-Identifier: Apache-2.0
"""Pure maths in float64: the fit of a tied adapter to a LoRA."""

from __future__ import annotations

import pytest
import torch

from nemo_tied_lora.conversion import closest_tied_factors
from nemo_tied_lora.conversion.closest_tied_factors import Fit, fit_target, relative_errors, row_space_bound
from nemo_tied_lora.conversion.lora_deltas import LowRank
from nemo_tied_lora.errors import ConfigError
from tests.harness.tiny_gpt import full_tensor

OUT, IN, LAYERS, RANK = 30, 22, 5, 3


def tied_deltas(name: str, *, rank: int = RANK, u_one: bool = False, v_one: bool = False) -> list[LowRank]:
    """The layers of a tied adapter as plain LoRA."""
    A, B = full_tensor(f"{name} A", (rank, IN)), full_tensor(f"{name} B", (OUT, rank))
    u = torch.ones(LAYERS, rank, dtype=A.dtype) if u_one else full_tensor(f"{name} u", (LAYERS, rank))
    v = torch.ones(LAYERS, OUT, dtype=A.dtype) if v_one else full_tensor(f"{name} v", (LAYERS, OUT))
    return [LowRank(v[i].unsqueeze(1) * B, u[i].unsqueeze(1) * A) for i in range(LAYERS)]


def lora_deltas(name: str, rank: int = RANK) -> list[LowRank]:
    """A LoRA that no tied adapter equals."""
    return [
        LowRank(full_tensor(f"{name} {i} P", (OUT, rank)), full_tensor(f"{name} {i} Q", (rank, IN)))
        for i in range(LAYERS)
    ]


def noisy(deltas: list[LowRank], share: float) -> list[LowRank]:
    """Adds rank-2 noise, of this share of the norm, to each layer."""
    result = []
    for i, delta in enumerate(deltas):
        P, Q = full_tensor(f"noise {i} P", (OUT, 2)), full_tensor(f"noise {i} Q", (2, IN))
        P = P * share * (delta.P @ delta.Q).norm() / (P @ Q).norm()
        result.append(LowRank(torch.cat([delta.P, P], 1), torch.cat([delta.Q, Q])))
    return result


def dense(deltas: list[LowRank]) -> torch.Tensor:
    return torch.stack([d.P @ d.Q for d in deltas])


def model_of(fit: Fit) -> torch.Tensor:
    """The fitted updates (L, out, in), by the literal formula."""
    layers = []
    for i in range(LAYERS):
        A, B = (f[i] if isinstance(f, list) else f for f in (fit.A, fit.B))
        u = torch.ones(len(A)).double() if fit.u is None else fit.u[i]
        v = torch.ones(len(B)).double() if fit.v is None else fit.v[i]
        layers.append(torch.diag(v) @ B @ torch.diag(u) @ A)
    return torch.stack(layers)


def total(fit: Fit, deltas: list[LowRank]) -> float:
    return float((model_of(fit) - dense(deltas)).norm() / dense(deltas).norm())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", ["all four", "u = 1", "v = 1", "fewer ranks than asked for"])
def test_a_lora_made_of_a_tied_adapter_is_recovered(case: str, seed: int) -> None:
    rank = 2 if case.startswith("fewer") else RANK
    deltas = tied_deltas(f"{case} {seed}", rank=rank, u_one=case == "u = 1", v_one=case == "v = 1")
    fit = fit_target(deltas, RANK, "tl6")
    assert total(fit, deltas) < 1e-6
    assert max(fit.errors) < 1e-5


def test_a_tl5_adapter_is_recovered_by_tl5_and_a_lora_by_lora() -> None:
    deltas = tied_deltas("tl5", u_one=True, v_one=True)
    assert total(fit_target(deltas, RANK, "tl5"), deltas) < 1e-12
    deltas = lora_deltas("lora")
    assert total(fit_target(deltas, RANK, "lora"), deltas) < 1e-12


def test_lora_of_a_smaller_rank_is_each_layers_eckart_young_optimum() -> None:
    deltas = lora_deltas("truncated", rank=5)
    tails = torch.stack([torch.linalg.svdvals(d)[2:].square().sum() for d in dense(deltas)])
    assert total(fit_target(deltas, 2, "lora"), deltas) == pytest.approx(
        float(tails.sum().sqrt() / dense(deltas).norm())
    )


def test_tl5_is_the_optimum_over_one_shared_delta() -> None:
    deltas = lora_deltas("mean")
    mean = dense(deltas).mean(0)
    tail = torch.linalg.svdvals(mean)[RANK:].square().sum() * LAYERS
    best = ((dense(deltas) - mean).square().sum() + tail).sqrt() / dense(deltas).norm()
    assert total(fit_target(deltas, RANK, "tl5"), deltas) == pytest.approx(float(best))


def test_one_layer_reaches_the_eckart_young_bound() -> None:
    delta = lora_deltas("one", rank=6)[:1]
    tail = torch.linalg.svdvals(dense(delta)[0])[RANK:].norm() / dense(delta).norm()
    fit = fit_target(delta, RANK, "tl6", tolerance=1e-12)
    got = (fit.v[0].unsqueeze(1) * fit.B * fit.u[0] @ fit.A - dense(delta)[0]).norm() / dense(delta).norm()
    # With one layer, a free B makes v useless, so the bound is the optimum.
    assert float(got) == pytest.approx(float(tail), rel=1e-6)
    assert row_space_bound(delta, RANK) == pytest.approx(float(tail))


@pytest.mark.parametrize("name", ["first", "second"])
def test_no_fit_is_below_the_bound_and_a_nearly_tied_lora_is_fitted_to_its_noise(name: str) -> None:
    loose = lora_deltas(name)
    assert total(fit_target(loose, RANK, "tl6"), loose) >= row_space_bound(loose, RANK) > 0.1
    near = noisy(tied_deltas(name), 0.01)
    # The tied adapter without noise is 1% away, so the optimum is at most 1% away.
    assert row_space_bound(near, RANK) <= total(fit_target(near, RANK, "tl6"), near) <= 0.01


@pytest.mark.parametrize("preset", ["tl6", "vera"])
def test_the_error_never_grows_and_is_never_worse_than_the_start(preset: str) -> None:
    deltas = lora_deltas("monotone")
    start = full_tensor("start A", (RANK, IN)), full_tensor("start B", (OUT, RANK))
    fit = fit_target(deltas, RANK, preset, start=start, max_iterations=60, tolerance=0.0)
    assert len(fit.history) > 10
    assert all(later <= earlier for earlier, later in zip(fit.history, fit.history[1:], strict=False))
    assert fit.history[-1] < fit.history[0]
    assert total(fit, deltas) == pytest.approx(fit.history[-1], rel=1e-6)


def test_vera_keeps_its_random_a_and_b() -> None:
    deltas = lora_deltas("vera")
    start = full_tensor("start A", (RANK, IN)), full_tensor("start B", (OUT, RANK))
    fit = fit_target(deltas, RANK, "vera", start=start)
    assert torch.equal(torch.as_tensor(fit.A), start[0])
    assert torch.equal(torch.as_tensor(fit.B), start[1])
    # Each layer's v is the exact least-squares solution for its u, so no change of v alone lowers the error.
    gradient = ((model_of(fit) - dense(deltas)) * (start[1] @ (fit.u.unsqueeze(2) * start[0]))).sum(2)
    assert gradient.abs().max() < 1e-3


def test_errors_are_those_of_the_dense_matrices_to_the_last_digits() -> None:
    deltas = tied_deltas("exact")
    A, B = deltas[0].Q, deltas[0].P
    u = torch.stack([(d.Q / deltas[0].Q)[:, 0] for d in deltas])
    v = torch.stack([(d.P / deltas[0].P)[:, 0] for d in deltas])
    each, whole = relative_errors(deltas, A, B, u, v)
    assert max(each) < 1e-13
    assert whole < 1e-13
    each, _ = relative_errors(deltas, A, B, u + 0.1, v)
    expected = [
        float((torch.diag(v[i]) @ B @ torch.diag(u[i] + 0.1) @ A - d).norm() / d.norm())
        for i, d in enumerate(dense(deltas))
    ]
    assert each == pytest.approx(expected)


def test_the_same_seed_gives_the_same_bits() -> None:
    fits = [fit_target(lora_deltas("seed"), RANK, "tl6", seed=3) for _ in range(2)]
    assert torch.equal(torch.as_tensor(fits[0].A), torch.as_tensor(fits[1].A))


def test_a_layer_of_zeros_is_fitted_by_zeros() -> None:
    deltas = tied_deltas("zeros")
    deltas[2] = LowRank(torch.zeros_like(deltas[2].P), deltas[2].Q)
    fit = fit_target(deltas, RANK, "tl6")
    assert total(fit, deltas) < 1e-6
    assert all(torch.isfinite(torch.as_tensor(f)).all() for f in (fit.A, fit.B, fit.u, fit.v))


def test_nan_shapes_and_ranks_are_refused() -> None:
    deltas = lora_deltas("wrong")
    deltas[1] = LowRank(deltas[1].P * float("nan"), deltas[1].Q)
    deltas[3] = LowRank(deltas[3].P[:-1], deltas[3].Q)
    with pytest.raises(ConfigError) as caught:
        fit_target(deltas, IN + 1, "tl6")
    text = str(caught.value)
    assert "number 1 holds NaN" in text
    assert "number 3 is (29, 3)" in text
    assert f"rank={IN + 1}: must be in 1 .. {IN}" in text


@pytest.mark.parametrize("fault", ["_update_A", "_update_B", "_update_u", "_update_v"])
def test_recovery_fails_without_one_of_its_steps(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closest_tied_factors._Alternation, fault, lambda self: None)
    monkeypatch.setattr(closest_tied_factors, "_turning_starts", lambda *_: [])
    deltas = noisy(tied_deltas("fault"), 0.3)
    whole = fit_target(deltas, RANK, "tl6", max_iterations=40, tolerance=0.0).history[-1]
    monkeypatch.undo()
    assert fit_target(deltas, RANK, "tl6", max_iterations=40, tolerance=0.0).history[-1] < whole * 0.999
