# SPDX-License-Identifier: Apache-2.0
"""Measures a step of a frozen megatron-core GPT on a GPU: in bfloat16, in 4 bits, and both with adapters.

All models share the memory of one bfloat16 base; the quantised ones hold codes instead. Each round times one forward and
backward of each, in a new order. Ratios to the frozen model are taken within a round; the medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapted_models import Sizes, build_model
from command_line import add_sizes, count, sizes_of, write
from provenance import provenance
from step_overhead import measure

__all__ = ["benchmark", "main", "table"]

LARGE = Sizes(layers=8, hidden=2048, ffn=8192, heads=16, sequence=2048, vocab=32000)
VARIANTS = ("frozen", "lora", "tl6", "nf4", "nf4 + tl6")


def benchmark(sizes: Sizes, rank: int, *, device: str, repeats: int, warmup: int, seed: int) -> dict[str, Any]:
    """The whole JSON. Seconds are those of one sequence, forward and backward."""
    import torch

    _start(device)
    base = build_model(sizes, seed).to(torch.bfloat16).to(device)
    models, held = {}, {}
    for name in VARIANTS:
        models[name], held[name] = _variant(name, sizes, base, rank, seed)
    step = _step(sizes, device, seed)
    losses = {name: step(model) for name, model in models.items()}
    steps: dict[str, Callable[[], object]] = {name: partial(step, model) for name, model in models.items()}

    def drop_gradients() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = measure(steps, drop_gradients, time.perf_counter, repeats=repeats, warmup=warmup, seed=seed)
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["frozen"], strict=True)] for name in VARIANTS}
    return {
        "benchmark": "gpu_step",
        **provenance(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "sizes": vars(sizes),
        "rank": rank,
        "dtype": "bfloat16",
        "repeats": repeats,
        "losses": losses,
        "base_bytes": held,
        "peak_bytes": _peaks(models, step, drop_gradients) if device == "cuda" else {},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {name: {"min": min(v), "median": statistics.median(v), "max": max(v)} for name, v in ratios.items()},
    }


def _variant(name: str, sizes: Sizes, base: Any, rank: int, seed: int) -> tuple[Any, int]:
    """A model, and the bytes that it holds for the decoder's linears."""
    from nemo_tied_lora import TiedLoraConfig, inject, quantize_base

    model = build_model(sizes, seed, base).to(next(base.parameters()).device)
    held = sum(p.numel() * p.element_size() for n, p in model.decoder.named_parameters() if "linear" in n)
    if name.startswith("nf4"):
        held = quantize_base(model, "nf4").bytes_after
    preset = name.rpartition("+ ")[2]
    if preset in ("lora", "tl6"):
        adapter = inject(model, TiedLoraConfig.preset(preset, rank=rank, seed=seed))
        adapter.load_full_state({key: value + 0.01 for key, value in adapter.full_state().items()})
    return model, held


def _step(sizes: Sizes, device: str, seed: int) -> Callable[[Any], float]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(sizes.vocab, (1, sizes.sequence + 1), generator=generator).to(device)
    positions = torch.arange(sizes.sequence, device=device)[None]
    mask = torch.ones(sizes.sequence, sizes.sequence, dtype=torch.bool, device=device).triu(1)[None, None]

    def step(model: Any) -> float:
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).float().mean()
        loss.backward()
        return loss.item()  # waits for the GPU

    return step


def _peaks(models: dict[str, Any], step: Callable[[Any], float], drop_gradients: Callable[[], None]) -> dict[str, int]:
    """What a step allocates at most beyond what is there before it."""
    import torch

    found = {}
    for name, model in models.items():
        drop_gradients()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model)
        found[name] = torch.cuda.max_memory_allocated() - before
    return found


def _start(device: str) -> None:
    import torch
    from megatron.core import parallel_state

    from nemo_tied_lora.platform import prepare

    prepare()
    if device == "cuda":
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = ["| model | ms a step | of the frozen step | linears, MB | step's peak, MB |", "|---|---:|---:|---:|---:|"]
    for name in VARIANTS:
        peak = result["peak_bytes"].get(name)
        cells = (
            f"{1e3 * result['seconds'][name]:.1f}",
            f"{result['ratios'][name]['median']:.3f}",
            f"{result['base_bytes'][name] / 1e6:.1f}",
            f"{peak / 1e6:.0f}" if peak is not None else "-",
        )
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """The command line; `--help` describes it."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to measure")
    parser.add_argument("--rank", type=count, default=8, metavar="R", help="the adapters' rank")
    parser.add_argument("--repeats", type=count, default=20, metavar="N", help="rounds that are counted")
    parser.add_argument("--warmup", type=count, default=3, metavar="N", help="rounds before them that are not counted")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of weights, data and order")
    add_sizes(parser, LARGE)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("device", "repeats", "warmup", "seed")}
    result = benchmark(sizes_of(options), options.rank, **settings)
    write(options.output, json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
