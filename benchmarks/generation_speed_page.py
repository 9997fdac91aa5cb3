# SPDX-License-Identifier: Apache-2.0
"""Turns the JSON of `generation_speed.py` into a table and a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_tied_lora.tables import markdown_table

__all__ = ["render_page", "table", "verdicts"]

MOST_OF_TRANSFORMERS = 1.5
OURS = {"one_rank": "one rank", "two_stages": "two pipeline stages"}


def table(result: dict[str, Any]) -> str:
    """A Markdown table, one row per dtype and batch."""
    speeds = ["transformers", "one rank", "PP 2", "NeMo's generate"]
    times = ["time, one rank", "time, PP 2", "time, NeMo's generate"]
    rows = [["dtype", "prompts", *speeds, *times]]
    for case in result["cases"]:
        speed = [f"{case['tokens_per_second'][name]:.0f}" for name in ("transformers", *OURS, "nemo")]
        ratios = [_with_range(case["ratio"][name]) for name in (*OURS, "nemo")]
        rows.append([case["dtype"], str(case["prompts"]), *speed, *ratios])
    return markdown_table(rows)


def verdicts(result: dict[str, Any]) -> Iterator[str]:
    """One line per case and layout: the goal is kept or missed."""
    for case in result["cases"]:
        for name, shown in OURS.items():
            ratio = case["ratio"][name]["median"]
            yield (
                f"{case['dtype']}, {case['prompts']} prompts, {shown}: {ratio:.2f} of transformers' time; the goal is at "
                f"most {MOST_OF_TRANSFORMERS}: " + ("kept" if ratio <= MOST_OF_TRANSFORMERS else "**missed**")
            )


def render_page(result: dict[str, Any]) -> str:
    """The page, in Markdown."""
    changes = ", with uncommitted changes" if result["uncommitted_changes"] else ""
    return _PAGE.format(
        table=table(result),
        verdicts="\n".join(f"- {line}" for line in verdicts(result)),
        same="\n".join(f"- {line}" for line in _same(result)),
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items() if version),
        commit=f"{(result['commit'] or 'unknown')[:12]}{changes}",
        half=max(1, result["threads"] // 2),
        **{name: result[name] for name in _QUOTED},
    )


def _with_range(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _same(result: dict[str, Any]) -> Iterator[str]:
    for case in result["cases"]:
        same = case["rows_as_transformers"]
        counts = ", ".join(f"{shown} {same[name]}" for name, shown in (*OURS.items(), ("nemo", "NeMo's generate")))
        yield f"{case['dtype']}, {case['prompts']} prompts: {counts}"


_QUOTED = (
    "model",
    "shortest",
    "longest",
    "new",
    "repeats",
    "threads",
    "seed",
    "processor",
    "cores",
    "load_average",
    "date",
)

_PAGE = """\
# How fast greedy generation is

`tied-lora generate` and `tied-lora evaluate` decode greedily with an engine of their own. Here it generates beside
transformers' `generate` and NeMo's, on the same model, the same batch and the same dtype. First new tokens per second,
then the time of a turn over that of transformers; in brackets: the smallest and the largest of {repeats} rounds.

{table}

{verdicts}

## How it was measured

- Model: {model}, and its import as a NeMo base. No adapter.
- Prompts: random tokens, {shortest} to {longest} in each. {new} new tokens each; no token ends a row early. A turn
  generates one batch. Its time is the wall clock's, and includes reading the prompts.
- transformers, one rank and NeMo's `generate` have {threads} threads, the two pipeline stages {half} each. All processes
  stay open on one machine; one works at a time.
- Each round gives each contender a turn, in a new random order. Ratios are taken within a round. The table has the
  medians of {repeats} rounds, after a short one that is not counted.
- bfloat16: transformers holds and computes everything in bfloat16. Here linears multiply in bfloat16; norms and the sums
  between layers stay in float32, as in training.
- {processor}, {cores} cores, load average {load_average:.1f} at the start; seed {seed}; {date}; commit {commit}. Other
  work on the machine slows all contenders and widens the ranges; with a load average well above 1, only the medians of
  the ratios say something.
- {versions}.

Rows with the same tokens as transformers' in the last round, of all prompts. In float32 a row differs only where two
tokens are equally likely within rounding. In bfloat16 the rounding is coarse, and a row that has differed once goes its
own way. NeMo's `generate` gets all its tokens by forbidding the end-of-text token, which the others may choose:

{same}

## Not measured

GPUs, tensor parallelism, larger models, long prompts, rows that end early (here they leave the batch), adapters (their
thin products add to both sides), sampling, memory.

## Repeat it

    python benchmarks/generation_speed.py --transformers FOLDER --base base.nemo \\
        --output runs/generation_speed.json --page docs/generation_speed.md

FOLDER is a Hugging Face folder or a GGUF file, and base.nemo what `tied-lora import from=hf-base` makes of it;
`tied-lora quickstart` gets and makes both for SmolLM2. `--help` lists the sizes. The JSON has every round's seconds.
"""
