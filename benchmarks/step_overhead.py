# SPDX-License-Identifier: Apache-2.0
"""Measures the time that NeMo's own LoRA layer and Tied-LoRA add to forward + backward of a frozen megatron-core GPT.

Three models share the memory of one base: the frozen base, the base with NeMo's ParallelLinearAdapter on all four linears,
and the base with Tied-LoRA `tl6` on the same linears. Each round times one step of each, one after the other. Ratios are
taken within a round; the benchmark reports their medians.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapted_models import Sizes, adapter_flops, build_variants, frozen_flops, thin_products
from command_line import add_sizes, count, sizes_of, write
from provenance import provenance
from step_overhead_page import render_page, table
from tqdm import tqdm

# Functions import torch, Megatron and NeMo themselves: after the number of threads is set, and after `prepare`.
if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["benchmark", "main", "measure", "summarize"]


def make_step(sizes: Sizes, seed: int) -> Callable[[GPTModel], float]:
    """Returns a function that runs forward and backward on a fixed sequence and returns the loss."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(sizes.vocab, (1, sizes.sequence + 1), generator=generator)
    positions = torch.arange(sizes.sequence)[None]
    mask = torch.ones(sizes.sequence, sizes.sequence, dtype=torch.bool).triu(1)[None, None]

    def step(model: GPTModel) -> float:
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        loss.backward()
        return loss.item()

    return step


def measure(
    steps: Mapping[str, Callable[[], object]],
    reset: Callable[[], object],
    clock: Callable[[], float],
    *,
    repeats: int,
    warmup: int,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Step name to its seconds in each round. Each round draws a new order of the steps.

    `reset` runs before each step and is not timed. Python's garbage is collected before each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(seed)
    for round_ in range(warmup + repeats):
        gc.collect()
        gc.disable()
        shuffle.shuffle(order)
        for name in order:
            reset()
            start = clock()
            steps[name]()
            if round_ >= warmup:
                seconds[name].append(clock() - start)
        gc.enable()
        progress()
    return seconds


def summarize(seconds: dict[str, list[float]], sizes: Sizes, rank: int) -> dict[str, Any]:
    """One rank's entry of the JSON, from the seconds of each round."""
    names = {"nemo": "nemo_ratio", "ours": "ours_ratio", "products": "products_added"}
    ratios = {names[name]: [a / f for a, f in zip(seconds[name], seconds["frozen"], strict=True)] for name in names}
    nemo, ours, products = (statistics.median(values) for values in ratios.values())
    floor = 1 + adapter_flops(sizes, rank) / frozen_flops(sizes)
    series = {f"{name}_seconds": values for name, values in seconds.items()} | ratios
    return {
        "rank": rank,
        "frozen_seconds": statistics.median(seconds["frozen"]),
        "nemo_ratio": nemo,
        "ours_ratio": ours,
        "added_over_nemo": (ours - 1) / (nemo - 1),
        "floor_ratio": floor,
        "added_over_floor": (ours - 1) / (floor - 1),
        "nemo_added_over_floor": (nemo - 1) / (floor - 1),
        "products_added": products,
        "products_over_nemo": products / (nemo - 1),
        "frozen_flops": frozen_flops(sizes),
        "adapter_flops": adapter_flops(sizes, rank),
        "spread": {
            name: {"min": min(values), "median": statistics.median(values), "max": max(values)}
            for name, values in series.items()
        },
        "seconds": seconds,
    }


def benchmark(
    sizes: Sizes, ranks: Sequence[int], *, repeats: int, warmup: int, seed: int, threads: int, keep: bool
) -> dict[str, Any]:
    """The whole JSON."""
    memory = _keep_freed_memory() if keep else "allocator's default"
    _one_process(threads)
    # One thread's CPU time is its time on an idle machine. With several threads, waiting is part of the cost.
    clock = "process_time" if threads == 1 else "perf_counter"
    settings = {"seed": seed, "repeats": repeats, "warmup": warmup, "clock": clock, "freed_memory": memory}
    model = {"sizes": dataclasses.asdict(sizes), "targets": list(sizes.linears()), "preset": "tl6", "dtype": "float32"}
    result: dict[str, Any] = {"benchmark": "step_overhead", **provenance(threads), **model, **settings, "ranks": {}}
    with tqdm(total=len(ranks) * (warmup + repeats), unit="round") as bar:
        for rank in ranks:
            bar.set_description(f"rank {rank}")
            result["ranks"][str(rank)] = _one_rank(
                sizes, rank, getattr(time, clock), repeats=repeats, warmup=warmup, seed=seed, progress=bar.update
            )
    return result


def _one_rank(sizes: Sizes, rank: int, clock: Callable[[], float], *, seed: int, **rounds: Any) -> dict[str, Any]:
    models, step = build_variants(sizes, rank, seed), make_step(sizes, seed)
    losses = {name: step(model) for name, model in models.items()}
    steps: dict[str, Callable[[], object]] = {name: partial(step, model) for name, model in models.items()}
    steps["products"] = thin_products(sizes, rank, seed)

    def drop_gradients() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    seconds = measure(steps, drop_gradients, clock, seed=seed, **rounds)
    return {**summarize(seconds, sizes, rank), "losses": losses}


def _keep_freed_memory() -> str:
    """Makes the process keep freed memory, as torch does with a GPU's. Returns "kept", or "allocator's default".

    By default glibc returns large blocks to the system and faults them in again: on the default sizes 0 to 110,000 page
    faults per step, 0 to 0.2 s of 0.7 s. A user's process waits for them, so they are in the default measurement.
    """
    mmap_threshold, trim_threshold, most = -3, -1, 2**30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "allocator's default"
    kept = mallopt(mmap_threshold, most) and mallopt(trim_threshold, most)
    return "kept" if kept else "allocator's default"


def _one_process(threads: int) -> None:
    """Sets up Megatron with this process as the only rank."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    import torch
    from megatron.core import parallel_state

    torch.set_num_threads(threads)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `--help` describes it."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.from_json is None and options.output is None:
        parser.error("--output FILE is missing; name the JSON file to write")
    if options.hidden % options.heads:
        parser.error(f"--hidden {options.hidden} is not divisible by --heads {options.heads}")
    narrowest = min(options.hidden, options.ffn)
    if max(options.ranks) > narrowest:
        parser.error(f"--ranks {max(options.ranks)}: more than {narrowest}, the narrowest side of a linear")
    if options.from_json is None:
        sizes = sizes_of(options)
        settings = {name: getattr(options, name) for name in ("repeats", "warmup", "seed", "threads")}
        result = benchmark(sizes, options.ranks, keep=options.keep_freed_memory, **settings)
        write(options.output, json.dumps(result, indent=1) + "\n")
    else:
        result = json.loads(options.from_json.read_text())
    print(table(result))
    if options.page is not None:
        write(options.page, render_page(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Ratios are to the frozen model. The default measurement takes about three minutes on an idle core.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the Markdown page to write")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="do not measure; make the page from this JSON")
    parser.add_argument(
        "--ranks", type=count, nargs="+", default=[8, 32, 128], metavar="R", help="the adapters' ranks"
    )
    parser.add_argument("--repeats", type=count, default=20, metavar="N", help="rounds that are counted")
    parser.add_argument("--warmup", type=count, default=2, metavar="N", help="rounds before them that are not counted")
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="CPU threads")
    parser.add_argument(
        "--seed", type=int, default=1234, metavar="N", help="seed of the weights, the data and the order"
    )
    parser.add_argument(
        "--keep-freed-memory",
        action="store_true",
        help="measure without page faults: the arithmetic alone, not the time that users wait",
    )
    add_sizes(parser, Sizes())
    return parser


if __name__ == "__main__":
    main()
