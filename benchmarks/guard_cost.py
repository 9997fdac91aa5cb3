# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of a run's guards relative to a training step, in one process.

Each round times a step (forward and backward of an adapted megatron-core GPT), the tie guard and the gradient guard, one
after the other in a new random order. Ratios are taken within a round; the benchmark reports their medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapted_models import Sizes, build_model
from command_line import add_sizes, count, sizes_of, write
from provenance import provenance
from step_overhead import _one_process, make_step, measure
from tqdm import tqdm

from nemo_tied_lora.tables import markdown_table

__all__ = ["main", "render_page", "summarize"]

PARTS = ("tie_guard", "gradients")


def summarize(seconds: dict[str, list[float]], parameters: int, rank: int, every: int) -> dict[str, Any]:
    """One rank's entry of the JSON, from the seconds of each round."""
    entry: dict[str, Any] = {
        "rank": rank,
        "parameters": parameters,
        "step_seconds": statistics.median(seconds["step"]),
    }
    for part in PARTS:
        ratios = [a / step for a, step in zip(seconds[part], seconds["step"], strict=True)]
        entry[part] = {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    entry["tie_guard"]["amortised"] = entry["tie_guard"]["ratio"] / every
    return {**entry, "seconds": seconds}


def table(result: dict[str, Any]) -> str:
    """A Markdown table, one row per rank."""
    rows = [["rank", "stored numbers", "step, s", "tie guard / step", "spread over 200 steps", "gradients / step"]]
    for entry in result["ranks"].values():
        guard, gradients = (f"{entry[p]['ratio']:.2%} ({entry[p]['min']:.2%} to {entry[p]['max']:.2%})" for p in PARTS)
        facts = [str(entry["rank"]), f"{entry['parameters']:,}", f"{entry['step_seconds']:.3f}"]
        rows.append([*facts, guard, f"{entry['tie_guard']['amortised']:.4%}", gradients])
    return markdown_table(rows)


def render_page(result: dict[str, Any]) -> str:
    """The page, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    sizes = ", ".join(f"{name} {value}" for name, value in result["sizes"].items())
    changes = ", with uncommitted changes" if result["uncommitted_changes"] else ""
    commit = f"{(result['commit'] or 'unknown')[:12]}{changes}"
    quoted = {name: result[name] for name in ("repeats", "processor", "cores", "load_average", "seed", "date")}
    return _PAGE.format(table=table(result), versions=versions, sizes=sizes, commit=commit, **quoted)


def benchmark(
    sizes: Sizes, ranks: Sequence[int], *, repeats: int, warmup: int, seed: int, every: int
) -> dict[str, Any]:
    """The whole JSON."""
    _one_process(1)
    settings = {"seed": seed, "repeats": repeats, "warmup": warmup, "clock": "process_time", "every": every}
    result: dict[str, Any] = {"benchmark": "guard_cost", **provenance(1), **settings, "ranks": {}}
    result["sizes"] = dataclasses.asdict(sizes)
    with tqdm(total=len(ranks) * (warmup + repeats), unit="round") as bar:
        for rank in ranks:
            steps, reset, parameters = _parts(sizes, rank, seed)
            seconds = measure(
                steps, reset, time.process_time, repeats=repeats, warmup=warmup, seed=seed, progress=bar.update
            )
            result["ranks"][str(rank)] = summarize(seconds, parameters, rank, every)
    return result


def _parts(sizes: Sizes, rank: int, seed: int) -> tuple[dict[str, Callable[[], object]], Callable[[], object], int]:
    """(functions to time, function to run before each of them, number of parameters of the adapter)."""
    import torch

    from nemo_tied_lora import TiedLoraConfig, inject
    from nemo_tied_lora.adapter.nonfinite_grads import find_nonfinite
    from nemo_tied_lora.adapter.replica_check import check_ties

    model = build_model(sizes, seed)
    adapter = inject(model, TiedLoraConfig.preset("tl6", rank=rank))
    step = make_step(sizes, seed)

    def reset_gradients() -> None:
        """Gives each parameter a gradient, because the gradient guard needs one and runs in any order."""
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)

    timed: dict[str, Callable[[], object]] = {
        "step": lambda: step(model),
        "tie_guard": lambda: check_ties(adapter),
        "gradients": lambda: find_nonfinite(adapter.named_parameters()),
    }
    return timed, reset_gradients, sum(parameter.numel() for parameter in adapter.parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `--help` describes it."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the Markdown page to write")
    parser.add_argument(
        "--ranks", type=count, nargs="+", default=[8, 32, 128], metavar="R", help="the adapters' ranks"
    )
    parser.add_argument("--repeats", type=count, default=20, metavar="N", help="rounds that are counted")
    parser.add_argument("--warmup", type=count, default=2, metavar="N", help="rounds before them that are not counted")
    parser.add_argument(
        "--seed", type=int, default=1234, metavar="N", help="seed of the weights, the data and the order"
    )
    add_sizes(parser, Sizes())
    options = parser.parse_args(arguments)
    rounds = {"repeats": options.repeats, "warmup": options.warmup}
    result = benchmark(sizes_of(options), options.ranks, seed=options.seed, every=_default_interval(), **rounds)
    for path, text in ((options.output, json.dumps(result, indent=1) + "\n"), (options.page, render_page(result))):
        if path is not None:
            write(path, text)
    print(table(result))


def _default_interval() -> int:
    from nemo_tied_lora.planning.settings.run_settings import GuardSettings

    return GuardSettings().tie_guard_every_n_steps


_PAGE = """\
# The guards of a run

| key of `guards` | default | meaning |
|---|---|---|
| `tie_guard_every_n_steps` | 200 | every so many steps, and before each save, ranks compare the bits of what they share; 0: never |
| `nonfinite_gradients` | `stop` | on NaN or infinity, `stop` ends the run; `skip` skips the step and counts it |

If a guard stops a run, the run ends on every rank, with one message and exit code 3 (1 if torchrun started it). An
older checkpoint or adapter is unchanged.

## The tie guard

Replicas must hold the same bits: tied tensors over pipeline stages and chunks, whole tensors over tensor-parallel
ranks, and all tensors over data- and context-parallel ranks. This includes frozen tensors.

Each rank computes a checksum of the bits of each tensor. The checksum depends on positions, so swapped elements are
noticed. One all-reduce of 16 bytes per tensor and shard gives every rank the same verdict. If replicas differ, the
message names the tensor, its shard, the ranks and their checksums. In your own loop:

```python
from nemo_tied_lora.adapter.replica_check import check_ties

check_ties(adapter)  # all ranks, between a step and the next forward pass; raises TieError on every rank
```

`save_adapter` calls it by itself.

## Gradients that are not finite

After all sums of gradients and before clipping, all ranks look at every trained gradient. If one is not finite on one
rank, all ranks know: the run stops, or no rank steps. After a skipped step, parameters, moments, step counts and the
learning rate are unchanged. `metrics.json` counts it in `skipped_steps` and names the tensor in `steps`. NaN spreads
backwards, so the guard names the tensor that the backward pass reaches first: it is closest to the cause. Ten skipped
steps in a row stop the run.

`stop` is the default. Without a loss scaler, a gradient that is not finite comes from the data, the learning rate or
the machine. A run that hides it may run for days in vain. The guard leaves float16's loss scaler alone: the scaler
overflows on purpose to find its scale, and skips those steps itself, on all ranks.

## Negative controls

A test switches off each guard, and the guard's own test must then fail. The same is done with each flag that Megatron
reads from the adapter's parameters, in a step of Megatron's own loop on four ranks:

| switched off | what breaks | test |
|---|---|---|
| `pipeline_parallel`, `has_cond_embedder` | the steps of tied tensors, the norm | `tests/adapter/test_flag_controls.py` |
| `shared_embedding` | tied tensors, if stages differ in size and the optimizer is distributed | |
| `shared`, `tensor_model_parallel` | the norm | |
| `sequence_parallel` | tensors that tensor-parallel ranks hold whole, the norm | |
| `partition_dim`, `partition_stride` | the shards that Megatron cuts: A of rows; B and v of a gated MLP | |
| each place of `replica_id` | "Invalid access pattern" | |
| `zero_out_wgrad` | a tied factor in a fused kernel (a stand-in for the kernel, in Megatron's own code) | |
| tie guard, gradient guard, each check of layout, data and settings | nothing is refused | `tests/nemo/test_guard_controls.py` |
| the same in NeMo's loop | the run neither stops nor skips; a good file is lost | `tests/nemo/test_guarded_training.py` |
| watchdog, agreement of ranks, pre-flight | ranks hang, or end unexplained | `tests/resilience/test_ranks_in_trouble.py` |

## What they cost

{table}

In brackets: the smallest and the largest of {repeats} rounds. A step is forward and backward of one sequence, without
the optimizer. The gradient guard runs at each step, the tie guard at each 200th.

- Model: {sizes}; float32; `tl6` on all four linears. One process: CPU time, one thread. A round times the three in a
  new random order. Each ratio is taken within a round; the table has medians.
- {processor}, {cores} cores, load average {load_average:.1f} at the start; seed {seed}; {date}; commit {commit}.
- {versions}.

Not measured: GPUs; the network (one all-reduce of a byte per step, and one of 16 bytes per tensor and shard at each
200th); the wait for the slowest rank, which clipping causes anyway.

    python benchmarks/guard_cost.py --output runs/guard_cost.json --page docs/guards.md
"""


if __name__ == "__main__":
    main()
