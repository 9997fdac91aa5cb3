# SPDX-License-Identifier: Apache-2.0
"""Turns the JSON of `step_overhead.py` into a table and a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_tied_lora.tables import markdown_table

__all__ = ["render_page", "table", "verdicts"]

MOST_OF_NEMO = 0.80
MOST_OF_FLOOR = 1.3
FLOOR_BOUND_FROM_RANK = 32


def table(result: dict[str, Any]) -> str:
    """A Markdown table, one row per rank."""
    head = ["rank", "frozen, s", "NeMo's layer", "ours", "floor", "added, ours / NeMo's", "added, ours / floor"]
    rows = [[*head, "bare products"]]
    for entry in result["ranks"].values():
        ratios = [*(_with_range(entry, name) for name in ("nemo_ratio", "ours_ratio")), f"{entry['floor_ratio']:.3f}"]
        added = [f"{entry[name]:.2f}" for name in ("added_over_nemo", "added_over_floor")]
        seconds, products = f"{entry['frozen_seconds']:.3f}", f"{1 + entry['products_added']:.3f}"
        rows.append([str(entry["rank"]), seconds, *ratios, *added, products])
    return markdown_table(rows)


def verdicts(result: dict[str, Any]) -> Iterator[str]:
    """One line per goal and rank: kept or missed."""
    for entry in result["ranks"].values():
        rank, of_nemo, of_floor = entry["rank"], entry["added_over_nemo"], entry["added_over_floor"]
        yield (
            f"rank {rank}: adds {of_nemo:.2f} of what NeMo's layer adds; the goal is at most {MOST_OF_NEMO:.2f}: "
            + ("kept" if of_nemo <= MOST_OF_NEMO else f"**missed**{_beside_bare(entry)}")
        )
        if rank >= FLOOR_BOUND_FROM_RANK:
            yield f"rank {rank}: adds {of_floor:.2f} of what the floor adds; the goal is at most {MOST_OF_FLOOR}: " + (
                "kept" if of_floor <= MOST_OF_FLOOR else "**missed**"
            )


def render_page(result: dict[str, Any]) -> str:
    """The page, in Markdown."""
    sizes, versions = result["sizes"], result["versions"]
    changes = ", with uncommitted changes" if result["uncommitted_changes"] else ""
    return _PAGE.format(
        table=table(result),
        verdicts="\n".join(f"- {line}" for line in verdicts(result)),
        versions=", ".join(f"{name} {version}" for name, version in versions.items() if version),
        sizes=", ".join(f"{name} {value}" for name, value in sizes.items()),
        targets=", ".join(result["targets"]),
        clock={"process_time": "CPU time of the process", "perf_counter": "wall clock"}[result["clock"]],
        commit=f"{(result['commit'] or 'unknown')[:12]}{changes}",
        losses=_largest_loss_difference(result),
        **{name: result[name] for name in _QUOTED},
    )


def _with_range(entry: dict[str, Any], name: str) -> str:
    spread = entry["spread"][name]
    return f"{entry[name]:.3f} ({spread['min']:.2f} to {spread['max']:.2f})"


def _beside_bare(entry: dict[str, Any]) -> str:
    """Facts to judge a missed goal by: the share of the arithmetic."""
    return (
        f". NeMo's layer itself adds {entry['nemo_added_over_floor']:.2f} of the floor, and the bare products alone "
        f"take {entry['products_over_nemo']:.2f} of what it adds"
    )


def _largest_loss_difference(result: dict[str, Any]) -> str:
    losses = [entry["losses"] for entry in result["ranks"].values()]
    return f"{max(abs(each['nemo'] - each['ours']) for each in losses):.1e}"


_QUOTED = (
    "repeats",
    "warmup",
    "threads",
    "seed",
    "processor",
    "cores",
    "load_average",
    "date",
    "freed_memory",
    "dtype",
)

_PAGE = """\
# What an adapter adds to a training step

Forward and backward of a frozen megatron-core GPT: alone, with NeMo's own LoRA layer, and with Tied-LoRA (`tl6`). A
ratio is the time of the step over the frozen model's. In brackets: the smallest and the largest of {repeats} rounds.

{table}

"Added" is the ratio minus 1. The floor is arithmetic alone: 1 + FLOPs of the update / FLOPs of the frozen model.
"Bare products" is 1 + the time of the update's matrix products, without a model around them, over the frozen model's
time.

{verdicts}

## How it was measured

- Model: {sizes}; one sequence, {dtype}. One process, no parallelism.
- Adapters on {targets}.
- Each round times one step of each of the three models and the bare products, in a new random order. Each ratio is
  taken within a round. The table has the medians of {repeats} rounds, after {warmup} uncounted ones. Clock: {clock},
  {threads} thread(s). A busy machine widens the ranges: with a load average well above 1, the lines of rank 8 and 32
  are rough.
- The three models share the memory of the base's weights. In all three the gradient goes back to the embedding's
  output.
- NeMo's layer is its `ParallelLinearAdapter` with the arguments of its LoRA configuration, without dropout. Its
  output is added to its linear's, as NeMo's mixins do; the mixins themselves do not run on this megatron-core.
- Both adapters hold the same update: their losses differ by at most {losses}.
- Memory that the process frees: {freed_memory}. By default, as in a user's process, glibc returns large blocks to the
  system and faults them in again. This takes up to a quarter of a step's time, most for the model that allocates
  most. `--keep-freed-memory` avoids it: both adapters then run close to the floor at rank 128, and the gap between
  them narrows.
- {processor}, {cores} cores, load average {load_average:.1f} at the start; seed {seed}; {date}; commit {commit}.
- {versions}.

## The floor

With T tokens, an adapter of rank r on a linear (in, out) needs 6 T r (in + out) FLOPs: A x, B h, the gradients of h
and B, of x and A. The frozen model needs 4 T in out for each linear and for the output layer (forward, and the
gradient of the input; none for weights). It needs 12 T T hidden per layer for attention: scores and context, and two
gradients of each, including the masked half.

The measured time includes softmax, norms, activations, the embedding and the loss; the FLOPs do not. The same holds
for an adapter's small operations: folding u, v and alpha / r into A and B, and summing over layers what they share.

## Not measured

GPUs, bfloat16, tensor or pipeline parallelism (where this adapter sends r-wide tensors and NeMo's layer full-width
ones), the optimizer's step, peak memory, dropout, longer sequences or larger micro-batches, Transformer Engine's
linears.

## Repeat it

    python benchmarks/step_overhead.py --output runs/step_overhead.json --page docs/step_overhead.md

`--help` lists the sizes and ranks. The JSON has every round's seconds.
"""
