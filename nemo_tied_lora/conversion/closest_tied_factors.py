# SPDX-License-Identifier: Apache-2.0
"""Finds the tied factors of one target that are closest to a LoRA's deltas over all layers, in the Frobenius norm.

    minimise  sum over layers l of || P_l Q_l  -  diag(v_l) B diag(u_l) A ||^2

The LoRA's delta is P_l Q_l with P_l (out, k) and Q_l (k, in). The code builds no (out, in) matrix. The rows of an optimal
A are in the span of the rows of all Q_l, so tl6 and vera compute in a basis of that span, at most sum(k) wide. In float64:

=======  ==========================================  =========================================================
preset   solution                                    start
=======  ==========================================  =========================================================
lora     each layer's truncated SVD: the optimum     -
tl5      truncated SVD of the mean: the optimum      -
tl6      alternating least squares over all four     the better of: SVD of the stacked deltas; the u and A that
                                                     explain how rows turn from layer to layer
vera     alternating least squares over u and v      the random A and B of the seed
=======  ==========================================  =========================================================

Each step of the alternation solves its least-squares problem exactly, so the error never grows. The result is the best
state. If the LoRA was exported from a tied adapter of the same rank, the start is already that adapter: the rows turn by
matrices that share their eigenvectors (`_turning_starts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nemo_tied_lora.conversion.lora_deltas import LowRank
from nemo_tied_lora.errors import ConfigError, Problems

__all__ = ["Fit", "fit_target", "relative_errors", "row_space_bound"]


_ROWS_AT_A_TIME = 1 << 22
"""Elements of the r x r systems that are solved in one batch."""
_LARGEST_TURNING_RANK = 48
"""The largest rank for `_turning_starts`, which needs the eigenvectors of a matrix r^2 wide."""
_EXACT = 1e-7
"""A relative error no larger than the rounding of factors to float32."""


@dataclass
class Fit:
    """The fitted factors of one target, float64. A (r, in) and B (out, r) are tied, or lists with one per layer. u (L, r)
    and v (L, out) are None if they are 1. `errors` has each layer's relative error, `history` the relative error of all
    layers at the start and after each iteration."""

    A: torch.Tensor | list[torch.Tensor]
    B: torch.Tensor | list[torch.Tensor]
    u: torch.Tensor | None
    v: torch.Tensor | None
    errors: list[float]
    history: list[float]


def fit_target(
    deltas: Sequence[LowRank],
    rank: int,
    preset: str,
    *,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
    seed: int = 1234,
    max_iterations: int = 500,
    tolerance: float = 1e-7,
    progress: Callable[[float], object] | None = None,
) -> Fit:
    """Finds the closest tied factors of one target.

    Args:
        deltas: one per layer.
        preset: lora, tl5, tl6 or vera.
        start: vera's A (r, in) and B (out, r).
        max_iterations: the largest number of iterations of the alternation.
        tolerance: the alternation ends if an iteration lowers the squared error by less than this share of it.
        progress: called with the relative error after each iteration.

    Raises:
        ConfigError: the deltas hold NaN or infinity, their shapes differ, or the rank exceeds a side of the linear.
    """
    _check(deltas, rank)
    deltas = [LowRank(d.P.double(), d.Q.double()) for d in deltas]
    if preset == "lora":
        pairs = [_truncated(delta, rank) for delta in deltas]
        return _fit(deltas, [A for _, A in pairs], [B for B, _ in pairs], None, None)
    if preset == "tl5":
        mean = LowRank(torch.cat([d.P for d in deltas], 1) / len(deltas), torch.cat([d.Q for d in deltas]))
        B, A = _truncated(mean, rank)
        return _fit(deltas, A, B, None, None)
    basis = _row_basis(deltas)
    if preset == "vera":
        assert start is not None, "vera's A and B are given"
        A = start[0].double()
        inside = [LowRank(d.P, d.Q @ basis) for d in deltas]
        # No delta uses the part of A outside the basis, but that part counts in the norm of the update.
        search = _Alternation(inside, A @ basis, start[1].double(), gram=A @ A.T, trained="uv")
        history = search.run(max_iterations, tolerance, progress)
        return _fit(deltas, A, search.B, search.u, search.v, history)
    inside = [LowRank(d.P, d.Q @ basis) for d in deltas]
    starts = [_svd_start(inside, rank), *_turning_starts(inside, rank, seed)]
    searches = [_Alternation(inside, A, B, u=u, v=v) for A, B, u, v in starts]
    best = min(searches, key=lambda search: search.error())
    history = best.run(max_iterations, tolerance, progress)
    best.balance()
    return _fit(deltas, best.A @ basis.T, best.B, best.u, best.v, history)


def relative_errors(
    deltas: Sequence[LowRank],
    A: torch.Tensor | list[torch.Tensor],
    B: torch.Tensor | list[torch.Tensor],
    u: torch.Tensor | None,
    v: torch.Tensor | None,
) -> tuple[list[float], float]:
    """Each layer's ||difference|| / ||delta||, and the same for all layers together.

    A thin QR of the two pairs side by side gives the norm of the difference. A difference of squared norms would lose
    half the digits.
    """
    squares, totals = [], []
    for layer, delta in enumerate(deltas):
        A_l = A[layer] if isinstance(A, list) else A
        B_l = B[layer] if isinstance(B, list) else B
        left = B_l if v is None else B_l * v[layer].unsqueeze(1)
        right = A_l if u is None else A_l * u[layer].unsqueeze(1)
        squares.append(_norm(LowRank(torch.cat([delta.P, -left], 1), torch.cat([delta.Q, right]))) ** 2)
        totals.append(_norm(delta) ** 2)
    each = [
        (s / t) ** 0.5 if t > 0 else (0.0 if s == 0 else float("inf")) for s, t in zip(squares, totals, strict=True)
    ]
    whole = sum(totals)
    return each, (sum(squares) / whole) ** 0.5 if whole > 0 else 0.0


def row_space_bound(deltas: Sequence[LowRank], rank: int) -> float:
    """A lower bound for the relative error of any A of this rank that all layers share (Eckart-Young, stacked deltas)."""
    stacked = torch.cat([torch.linalg.qr(d.P.double())[1] @ d.Q.double() for d in deltas])
    squares = torch.linalg.svdvals(stacked).square()
    return float((squares[rank:].sum() / squares.sum().clamp_min(1e-300)).sqrt())


class _Alternation:
    """Alternating least squares. Each update finds the exact minimum over its factor.

    N_l = diag(u_l) A and M_l = diag(v_l) B. All products are r wide or k wide.
    """

    def __init__(
        self,
        deltas: Sequence[LowRank],
        A: torch.Tensor,
        B: torch.Tensor,
        *,
        u: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        gram: torch.Tensor | None = None,
        trained: str = "BvuA",
    ):
        self.deltas, self.A, self.B, self._trained, self._gram = deltas, A, B, trained, gram
        self.u = torch.ones(len(deltas), len(A), dtype=A.dtype) if u is None else u
        self.v = torch.ones(len(deltas), len(B), dtype=A.dtype) if v is None else v
        self._total = sum(_norm(delta) ** 2 for delta in deltas)
        if trained == "uv":
            self._update_v()

    def error(self) -> float:
        """The relative error of all layers together."""
        if self._gram is None:
            return relative_errors(self.deltas, self.A, self.B, self.u, self.v)[1]
        square = self._total
        for layer, delta in enumerate(self.deltas):
            M = self.B * self.v[layer].unsqueeze(1)
            inner = ((M.T @ delta.P) * (self.u[layer].unsqueeze(1) * (self.A @ delta.Q.T))).sum()
            norm = ((M.T @ M) * (self.u[layer].unsqueeze(1) * self._gram * self.u[layer])).sum()
            square = square + float(norm - 2 * inner)
        return (max(square, 0.0) / self._total) ** 0.5 if self._total > 0 else 0.0

    def run(self, max_iterations: int, tolerance: float, progress: Callable[[float], object] | None) -> list[float]:
        """Iterates until the error stops falling, and keeps the best state. Returns the error after each iteration."""
        history = [self.error()]
        for _ in range(max_iterations):
            before = self.A, self.B, self.u.clone(), self.v.clone()
            for factor in self._trained:
                getattr(self, f"_update_{factor}")()
            error = self.error()
            if not error <= history[-1]:  # only rounding can raise the error
                self.A, self.B, self.u, self.v = before
                break
            history.append(error)
            if progress is not None:
                progress(error)
            if history[-2] ** 2 - error**2 <= tolerance * history[-2] ** 2 or error < _EXACT:
                break
        return history

    def balance(self) -> None:
        """Rescales without changing the update: each column of u and v gets mean square 1, A and B get equal norms."""
        for name, tied, dim in (("u", "A", 1), ("v", "B", 1)):
            scale = getattr(self, name).square().mean(dim=0).sqrt()
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            setattr(self, name, getattr(self, name) / scale)
            setattr(self, tied, getattr(self, tied) * scale.unsqueeze(dim))
        norms = (self.A.norm(dim=1) / self.B.norm(dim=0)).sqrt()
        norms = torch.where(torch.isfinite(norms) & (norms > 0), norms, torch.ones_like(norms))
        self.A, self.B = self.A / norms.unsqueeze(1), self.B * norms

    def _update_A(self) -> None:
        gram, right = torch.zeros_like(self.A @ self.A.T), torch.zeros_like(self.A)
        for layer, delta in enumerate(self.deltas):
            M = self.B * self.v[layer].unsqueeze(1) * self.u[layer]
            gram += M.T @ M
            right += (M.T @ delta.P) @ delta.Q
        self.A = torch.linalg.pinv(gram, hermitian=True, rtol=1e-13) @ right

    def _update_u(self) -> None:
        inner = self.A @ self.A.T if self._gram is None else self._gram
        for layer, delta in enumerate(self.deltas):
            M = self.B * self.v[layer].unsqueeze(1)
            right = ((M.T @ delta.P) * (self.A @ delta.Q.T)).sum(1)
            self.u[layer] = torch.linalg.pinv((M.T @ M) * inner, hermitian=True, rtol=1e-13) @ right

    def _update_v(self) -> None:
        inner = self.A @ self.A.T if self._gram is None else self._gram
        for layer, delta in enumerate(self.deltas):
            Bu = self.B * self.u[layer]
            above = ((delta.P @ (delta.Q @ self.A.T)) * Bu).sum(1)
            below = ((Bu @ inner) * Bu).sum(1)
            self.v[layer] = torch.where(below > 0, above / below.clamp_min(1e-300), torch.zeros_like(above))

    def _update_B(self) -> None:
        inner, rank = self.A @ self.A.T, len(self.A)
        grams = torch.stack([u.unsqueeze(1) * inner * u for u in self.u]).flatten(1)
        right = torch.zeros_like(self.B)
        for layer, delta in enumerate(self.deltas):
            N = self.u[layer].unsqueeze(1) * self.A
            right += self.v[layer].unsqueeze(1) * (delta.P @ (delta.Q @ N.T))
        rows = max(1, _ROWS_AT_A_TIME // rank**2)
        solved = []
        for weights, wanted in zip(self.v.square().T.split(rows), right.split(rows), strict=True):
            systems = (weights @ grams).view(-1, rank, rank)
            solved.append((torch.linalg.pinv(systems, hermitian=True, rtol=1e-13) @ wanted.unsqueeze(2)).squeeze(2))
        self.B = torch.cat(solved)


_Start = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _svd_start(deltas: Sequence[LowRank], rank: int) -> _Start:
    """A start: A has the r directions of the input that the deltas use most, u is 1, and B and v fit them."""
    A = _leading_rows(deltas, rank)
    B = sum((d.P @ (d.Q @ A.T) for d in deltas), torch.zeros(())) / len(deltas)
    ones = torch.ones(len(deltas), rank, dtype=A.dtype), torch.ones(len(deltas), len(B), dtype=A.dtype)
    search = _Alternation(deltas, A, B, u=ones[0], v=ones[1], trained="vuB")
    search._update_v()
    return A, B, search.u, search.v


def _turning_starts(deltas: Sequence[LowRank], rank: int, seed: int) -> list[_Start]:
    """A start from how rows turn between layers; empty if there is none.

    In the r leading directions C of the input, row i of layer l's delta is v_li b_i diag(u_l) X, with A = X C. From a
    reference layer 0 to layer l, every row turns by the same matrix T_l = X^-1 diag(u_l / u_0) X, up to a factor per row.
    Each T_l is the null vector of a linear system. The eigenvectors that all T_l share are X.
    """
    C, wanted = _leading_rows(deltas, rank), rank
    rank = int((C.norm(dim=1) > 0.5).sum())
    C = C[:rank]
    if not 1 < rank <= _LARGEST_TURNING_RANK or len(deltas) < 2 or len(deltas[0].P) < rank + 2:
        return []
    rows = [d.P @ (d.Q @ C.T) for d in deltas]
    reference = max(range(len(rows)), key=lambda layer: float(rows[layer].norm()))
    turns = [_turn(rows[reference], other) for layer, other in enumerate(rows) if layer != reference]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(turns), generator=generator, dtype=C.dtype)
    mixed = sum((w * t for w, t in zip(weights, turns, strict=True)), torch.zeros_like(turns[0]))
    try:
        values, vectors = torch.linalg.eig(mixed.T)  # rows of X are eigenvectors from the left
        X = vectors.T.real
        condition = float(torch.linalg.cond(X))
    except torch.linalg.LinAlgError:
        return []
    if not condition < 1e10 or values.imag.abs().max() > 0.5 * values.abs().max():
        return []
    inverse = torch.linalg.inv(X)
    ratios = torch.stack([(X @ t @ inverse).diagonal() for t in turns])
    u = torch.cat([ratios[:reference], torch.ones_like(ratios[:1]), ratios[reference:]])
    search = _Alternation(deltas, X @ C, rows[reference] @ inverse, u=u, trained="vBA")
    search._update_v()
    search._update_B()
    more = (0, wanted - rank)
    pad = torch.nn.functional.pad
    return [(pad(search.A, (0, 0, *more)), pad(search.B, more), pad(search.u, more, value=1.0), search.v)]


def _turn(rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The T of norm sqrt(r) that makes rows_i T parallel to other_i for all i, as far as least squares can.

    Each pair gives the equation (I - n n^T) T^T t = 0 with unit vectors n and t, weighted by the rows' lengths.
    """
    rank = rows.shape[1]
    length = other.norm(dim=1, keepdim=True)
    n = torch.where(length > 0, other / length.clamp_min(1e-300), torch.zeros_like(other))
    size = rows.norm(dim=1, keepdim=True)
    t = torch.where(size > 0, rows / size.clamp_min(1e-300), torch.zeros_like(rows))
    w = (length * size).sqrt()
    # The quadratic form over T (r, r), row-major: sum of w^2 (t t^T) x (I - n n^T).
    tt = torch.einsum("i,ia,ib->ab", w.squeeze(1) ** 2, t, t)
    form = torch.einsum("ab,cd->acbd", tt, torch.eye(rank, dtype=rows.dtype))
    wt = (w.unsqueeze(2) * t.unsqueeze(2) * n.unsqueeze(1)).flatten(1)
    form = form.reshape(rank * rank, rank * rank) - wt.T @ wt
    T = torch.linalg.eigh(form)[1][:, 0].view(rank, rank) * rank**0.5
    # The eigenvector's sign is arbitrary; this one keeps most directions of the rows.
    return T if ((rows @ T) * other).sum() >= 0 else -T


def _leading_rows(deltas: Sequence[LowRank], rank: int) -> torch.Tensor:
    """(r, width): the leading right singular vectors of the stacked deltas as rows; zero rows if there are fewer."""
    stacked = torch.cat([torch.linalg.qr(d.P)[1] @ d.Q for d in deltas])
    _, values, rows = torch.linalg.svd(stacked, full_matrices=False)
    leading = rows[: min(rank, int((values > 1e-12 * values[0]).sum()))]
    return torch.nn.functional.pad(leading, (0, 0, 0, rank - len(leading)))


def _row_basis(deltas: Sequence[LowRank]) -> torch.Tensor:
    """(in, m): an orthonormal basis of the span of all Q's rows."""
    return torch.linalg.qr(torch.cat([d.Q for d in deltas]).T)[0]


def _truncated(delta: LowRank, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A): the best approximation of rank r, padded with zeros if the delta has a lower rank."""
    left, R_left = torch.linalg.qr(delta.P)
    right, R_right = torch.linalg.qr(delta.Q.T)
    U, S, V = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    root = S[:rank].sqrt()
    B, A = (left @ U[:, :rank]) * root, root.unsqueeze(1) * (V[:rank] @ right.T)
    missing = rank - len(root)
    pad = torch.nn.functional.pad
    return pad(B, (0, missing)), pad(A, (0, 0, 0, missing))


def _norm(delta: LowRank) -> float:
    return float((torch.linalg.qr(delta.P)[1] @ torch.linalg.qr(delta.Q.T)[1].T).norm())


def _fit(
    deltas: Sequence[LowRank],
    A: torch.Tensor | list[torch.Tensor],
    B: torch.Tensor | list[torch.Tensor],
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    history: list[float] | None = None,
) -> Fit:
    errors, total = relative_errors(deltas, A, B, u, v)
    return Fit(A, B, u, v, errors, [total] if history is None else history)


def _check(deltas: Sequence[LowRank], rank: int) -> None:
    problems = Problems()
    if not deltas:
        raise ConfigError(["path: the LoRA adapts no layer"])
    shape = (len(deltas[0].P), deltas[0].Q.shape[1])
    for number, delta in enumerate(deltas):
        if delta.P.shape[1] != len(delta.Q) or (len(delta.P), delta.Q.shape[1]) != shape:
            got = f"{tuple(delta.P.shape)} x {tuple(delta.Q.shape)}"
            problems.append(f"path: the LoRA's delta number {number} is {got}, the first {shape} (out, in)")
        elif not (torch.isfinite(delta.P).all() and torch.isfinite(delta.Q).all()):
            problems.append(f"path: the LoRA's delta number {number} holds NaN or infinity")
    if not 1 <= rank <= min(shape):
        problems.append(f"rank={rank}: must be in 1 .. {min(shape)}, the smaller side of the linear")
    problems.raise_if_any()
