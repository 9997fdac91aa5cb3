# SPDX-License-Identifier: Apache-2.0
"""Compares a run with the single-process run, and replicas with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tests.parity.layouts import Layout
from tests.parity.training import Record

__all__ = ["Verdict", "compare", "unequal_replicas", "unequal_to_plain", "worst"]


@dataclass
class Verdict:
    """The comparison of one rank's record with the oracle's.

    problems: one line per difference above the tolerance. errors: the largest of each kind. unequal: see
    `unequal_to_plain`; None for a base that is not quantised. The others: from the record.
    """

    problems: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    bits: list[dict[tuple[int, str], str]] = field(default_factory=list)
    shapes: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    starts_as_base: bool | None = None
    unequal: list[str] | None = None


def compare(record: Record, expected: Record, tolerance: float) -> Verdict:
    """Compares a rank's record with the single-process run's."""
    verdict = Verdict(bits=record.bits, shapes=record.shapes, starts_as_base=record.starts_as_base)
    numbers = [
        ("loss", record.losses, expected.losses if record.losses else []),
        ("norm", record.norms, expected.norms),
    ]
    for kind, got, want in numbers:
        assert len(got) == len(want), f"{kind}: {len(got)} steps instead of {len(want)}"
        for step, (g, w) in enumerate(zip(got, want, strict=True)):
            _judge(verdict, kind, f"step {step}: {kind} {g} != {w}", abs(g / w - 1), tolerance)
    pairs = zip(record.masks, expected.masks, strict=True)
    verdict.problems += [f"step {step}: mask" for step, (got, want) in enumerate(pairs) if got != want]
    steps = enumerate(zip(record.gradients, expected.gradients, strict=True))
    tensors = [("gradient", f"step {step}: gradient", *pair) for step, pair in steps]
    for kind, where, got_, want_ in [*tensors, ("adapter", "adapter", record.state, expected.state)]:
        for name in sorted(got_.keys() ^ want_.keys()):
            verdict.problems.append(f"{where} {name}: on one side only")
        for name in got_.keys() & want_.keys():
            error = _relative(got_[name], want_[name])
            _judge(verdict, kind, f"{where} {name}: relative error {error:.1e}", error, tolerance)
    return verdict


def unequal_to_plain(quantised: Record, plain: Record, whole: Record) -> list[str]:
    """Lists what a run on a quantised base does not share, bit for bit, with the run on the dequantised one.

    Args:
        plain: of the same layout.
        whole: of the single process. Its codes must be those that the ranks hold together.
    """
    found = [f"codes of {name}" for name, digest in quantised.codes.items() if whole.codes[name] != digest]
    for kind in ("losses", "norms", "bits"):
        if getattr(quantised, kind) != getattr(plain, kind):
            found.append(kind)
    pairs = [*zip(quantised.gradients, plain.gradients, strict=True), (quantised.state, plain.state)]
    for got, want in pairs:
        found += [name for name in got.keys() | want.keys() if not torch.equal(got[name], want[name])]
    return found


def unequal_replicas(ranks: Sequence[Verdict], layout: Layout, whole: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Lists, for each step, the tensors whose replicas on ranks or chunks differ in a bit.

    Shapes and rank numbers alone decide what is a replica: a tensor with the shape of the whole one is a replica on
    every rank that has it; a smaller one is a replica on the ranks with the same tensor-parallel rank.
    """
    found = []
    for step in range(len(ranks[0].bits)):
        holders: dict[tuple[str, int | None], set[str]] = {}
        for rank, verdict in enumerate(ranks):
            for (chunk, name), digest in verdict.bits[step].items():
                is_whole = verdict.shapes[chunk, name] == whole[name]
                holders.setdefault((name, None if is_whole else rank % layout.tp), set()).add(digest)
        found += [f"step {step}: {name} (shard {s})" for (name, s), digests in holders.items() if len(digests) > 1]
    return found


def _judge(verdict: Verdict, kind: str, message: str, error: float, tolerance: float) -> None:
    verdict.errors[kind] = max(error, verdict.errors.get(kind, 0.0))
    if not error < tolerance:
        verdict.problems.append(message)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    difference, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    return difference / size if size else difference


def worst(verdicts: Sequence[Verdict]) -> Iterator[tuple[str, float]]:
    """Yields each kind and its largest error over the ranks."""
    for kind in sorted({kind for verdict in verdicts for kind in verdict.errors}):
        yield kind, max(verdict.errors.get(kind, 0.0) for verdict in verdicts)
