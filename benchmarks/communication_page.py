# SPDX-License-Identifier: Apache-2.0
"""Turns the JSON of `communication.py` into tables, verdicts and a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_tied_lora.tables import markdown_table

__all__ = ["render_page", "tables", "verdicts"]

MOST_OF_NEMO = 0.05
NEMO = {"nemo": "NeMo's layer", "nemo_te": "NeMo's layer with Transformer Engine 1.5 or later"}
_LEAST = ("minimum beside the base", "minimum of any method")


def tables(result: dict[str, Any]) -> str:
    """Two Markdown tables: the traffic that a microbatch adds, and that a step adds."""
    return f"{_microbatch_table(result)}\n\n{_step_table(result)}"


def verdicts(result: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """(the claim with the measured number, whether it holds) for every claim, layout by layout."""
    for name, entry in result["layouts"].items():
        for text, kept in (*_microbatch_verdicts(entry, result["rank"]), *_step_verdicts(entry)):
            yield f"{name}: {text}", kept


def _microbatch_verdicts(entry: dict[str, Any], rank: int) -> Iterator[tuple[str, bool]]:
    ours = entry["added"]["ours"]["microbatch"]
    sent = ours["sent_bytes"]
    for variant, described in NEMO.items():
        nemo = entry["added"].get(variant, {}).get("microbatch", {}).get("sent_bytes", 0)
        if nemo:
            share = sent / nemo
            yield (
                f"a microbatch adds {share:.1%} of what {described} adds, at most {MOST_OF_NEMO:.0%} wanted",
                share <= MOST_OF_NEMO,
            )
        if variant in entry["losses"]:
            difference = abs(entry["losses"][variant] / entry["losses"]["ours"] - 1)
            # The same update, with float32 sums in another order.
            yield f"the loss equals that with {described}, to {difference:.0e}", difference < 1e-4
    widths = sorted({message["shape"][-1] for message in ours["messages"]})
    yield f"what a microbatch adds is as wide as the rank, widths {widths}", widths in ([], [rank])
    yield from _equals("a microbatch adds", sent, entry["plan"]["microbatch"], "as `tied-lora plan` states")
    beside = entry["least"]["beside_the_base"]["microbatch"]
    yield from _equals("a microbatch adds", sent, beside, "the minimum beside the base's collectives")
    half = ours["sent_bytes_of_half_the_tokens"]
    yield f"half the tokens add {half:,} bytes, half as much", 2 * half == sent
    across = ours["sent_bytes_of_group"].get("PP", 0)
    yield f"a microbatch adds {across} bytes between stages, 0 wanted", across == 0


def _step_verdicts(entry: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    ours = entry["added"]["ours"]["step"]
    for group, needed in (("PP", entry["pp"] > 1), ("TP", entry["sequence_parallel"])):
        calls = [message["calls"] for message in ours["messages"] if message["group"] == group]
        kinds = {message["operation"] for message in ours["messages"] if message["group"] == group}
        wanted = "one all-reduce" if needed else "nothing"
        yield (
            f"a step adds {sum(calls):g} collectives over {group}, {wanted} wanted",
            (sum(calls), kinds) == ((1, {"allreduce_"}) if needed else (0, set())),
        )
    yield from _equals("a step adds", ours["sent_bytes"], entry["plan"]["step"], "as `tied-lora plan` states")
    beside = entry["least"]["beside_the_base"]["step"]
    yield from _equals("a step adds", ours["sent_bytes"], beside, "the minimum beside the base's collectives")


def _equals(what: str, sent: float, wanted: float, meaning: str) -> Iterator[tuple[str, bool]]:
    yield f"{what} {sent:,} bytes, {meaning} ({wanted:,})", sent == wanted


def _microbatch_table(result: dict[str, Any]) -> str:
    rows = [["layout", "base sends", "NeMo's layer adds", "ours adds", "ours / NeMo's", *_LEAST]]
    for name, entry in result["layouts"].items():
        ours = entry["added"]["ours"]["microbatch"]
        nemos = [entry["added"][variant]["microbatch"] for variant in NEMO if variant in entry["added"]]
        shares = [f"{ours['sent_bytes'] / nemo['sent_bytes']:.1%}" if nemo["sent_bytes"] else "-" for nemo in nemos]
        least = [entry["least"][bound]["microbatch"] for bound in ("beside_the_base", "any_method")]
        cells = [
            name,
            f"{entry['base']['microbatch']['sent_bytes']:,}",
            "; ".join(_with_calls(nemo) for nemo in nemos),
            _with_calls(ours),
            "; ".join(shares),
            *(f"{value:,}" for value in least),
        ]
        rows.append(cells)
    return markdown_table(rows)


def _step_table(result: dict[str, Any]) -> str:
    rows = [["layout", "NeMo's layer adds", "ours adds over TP", "ours adds over PP", *_LEAST]]
    for name, entry in result["layouts"].items():
        ours = entry["added"]["ours"]["step"]
        calls = {g: sum(m["calls"] for m in ours["messages"] if m["group"] == g) for g in ("TP", "PP")}
        sent = {group: ours["sent_bytes_of_group"].get(group, 0) for group in calls}
        least = [entry["least"][bound]["step"] for bound in ("beside_the_base", "any_method")]
        cells = [
            name,
            _with_calls(entry["added"]["nemo"]["step"]),
            *(f"{sent[group]:,} ({calls[group]})" for group in calls),
            *(f"{value:,}" for value in least),
        ]
        rows.append(cells)
    return markdown_table(rows)


def _with_calls(phase: dict[str, Any]) -> str:
    return f"{phase['sent_bytes']:,} ({phase['calls']:g})"


def render_page(result: dict[str, Any]) -> str:
    """The page, in Markdown."""
    changes = ", with uncommitted changes" if result["uncommitted_changes"] else ""
    return _PAGE.format(
        microbatch=_microbatch_table(result),
        step=_step_table(result),
        verdicts="\n".join(_grouped_verdicts(result)),
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items() if version),
        sizes=", ".join(f"{name} {value}" for name, value in result["sizes"].items()),
        targets=", ".join(result["targets"]),
        commit=f"{(result['commit'] or 'unknown')[:12]}{changes}",
        **{
            name: result[name] for name in ("rank", "microbatches", "seed", "date", "dtype", "world_size", "processor")
        },
    )


def _grouped_verdicts(result: dict[str, Any]) -> Iterator[str]:
    """One line per layout: the number of claims kept, and each missed claim in full."""
    judged = list(verdicts(result))
    for name in result["layouts"]:
        mine = [(text.removeprefix(f"{name}: "), kept) for text, kept in judged if text.startswith(f"{name}: ")]
        missed = [f"**missed**: {text}" for text, kept in mine if not kept]
        yield f"- {name}: {len(mine) - len(missed)} of {len(mine)} claims kept" + "".join(f"; {m}" for m in missed)


_PAGE = """\
# What an adapter adds to the network's traffic

The tables compare NeMo's own LoRA layer with Tied-LoRA (`tl6`), both of rank {rank} on {targets}. They give the bytes
that one rank sends beyond the frozen model's, and in brackets the number of calls. Every collective is counted, in
forward and in backward.

## A microbatch

{microbatch}

One sequence; its tokens are given below. If NeMo's layer has two numbers, the first holds before Transformer Engine
1.5, and for overlapped communication: the layer gathers the input of a column itself. The second holds from
Transformer Engine 1.5 on, which passes the input that the base has gathered; the full-width exchanges of its rows
remain. All numbers grow with tokens and layers alike, so the shares hold for a long sequence too. They fall as the
model gets wider, with rank / width.

## A step

{step}

Over TP, under sequence parallelism: the gradients that are partial over the sequence (A and u of columns; B, u and v
of rows). Over PP: the gradients of the tied A and B, because every stage has a part of them. NeMo's LoRA ties
nothing, so it sums nothing there. A step sends this once, however many tokens and microbatches it has. The bytes over
PP do not grow with the number of layers either.

## Claims

The program checks these claims on each layout, and ends with exit code 1 if one is missed:

- a microbatch adds at most 5% of what NeMo's layer adds;
- it adds only tensors as wide as the rank, and nothing between stages;
- a step adds one coalesced all-reduce over PP, one over TP under sequence parallelism, and no other;
- the bytes are exactly those that `tied-lora plan` states, and exactly the minimum beside the base's collectives;
- half the tokens cost half the bytes;
- the loss is that of the model with NeMo's layer.

The result:

{verdicts}

## The minimum

*Beside the base's collectives*, which then carry the base's tensors and nothing else. Every linear has one exchange.
For a row it is h = A x, because each rank has one term of that sum. For a column it is the gradient of h, which is
the same in backward. Every rank needs the sum, r numbers per token, before it can continue. No all-reduce over T
ranks sends less than 2 (T-1)/T of what it sums. Under sequence parallelism, an all-gather in one direction and a
reduce-scatter in the other send the same. So

    microbatch = 2 (T-1)/T * layers of the stage * linears * tokens * r * bytes of an element
    step       = 2 (P-1)/P * A and B on one rank + 2 (T-1)/T * what is partial over the sequence

*Of any exact method*, even one that changes the base's linears: nothing per microbatch. Such a method could add a
row's update to the partial sums that the base all-reduces anyway, and a column's share of the input's gradient
likewise. The gradients of the replicated factors (A and u of columns; B, u and v of rows) are then partial on each
tensor-parallel rank, even without sequence parallelism. They must be summed once per step. Or the r-wide tensors are
sent instead, if a step has so few tokens that they are smaller; the table has the smaller of the two. Tied-LoRA
leaves the base's linears alone and does not do this. It would save the r-wide exchanges, and cost the sum over TP
that sequence parallelism has already.

## How it was counted

- Model: {sizes}; {dtype}; {microbatches} microbatches of one sequence. Every layout runs on {world_size} ranks. Ranks
  that a layout does not need are data-parallel copies; their own sums belong to the training loop and are not done
  here.
- The count is taken at torch's `c10d` operators, below whichever function is called. A collective that the counter
  does not know stops it. The added traffic is the count minus the frozen model's, of the same shapes. A missing
  collective of the base stops the counter as well.
- Bytes sent, as rings send them: 2 (n-1)/n of an all-reduce's tensor, (n-1)/n of the whole of an all-gather or
  reduce-scatter, all of a point-to-point message. The table shows the rank that sends most.
- NeMo's layer is its `ParallelLinearAdapter` with the arguments of its LoRA configuration; its output is added to its
  linear's. Under sequence parallelism it asks for Transformer Engine's version, and is told 1.4.0 or 1.5.0. In the
  second case, the gathering of its input and the scattering of that input's gradient are done uncounted.
- {processor}; seed {seed}; {date}; commit {commit}.
- {versions}.

## Not measured

Time: how much of the traffic a GPU hides behind its arithmetic, and the latency of a call. NCCL's own choice between
rings and trees. bfloat16, which halves activations and leaves the gradients' bytes. Activation recompute, which
repeats the forward exchange. Data, context and expert parallelism. Loops with Megatron's DDP, where
`finalize_model_grads` does the sums of a step instead of `adapter.reduce_gradients()`. Transformer Engine itself.

## Repeat it

    python benchmarks/communication.py --output runs/communication.json --page docs/communication.md

`--help` lists the sizes. The JSON has every kind of message with its shape, group and calls.
"""
