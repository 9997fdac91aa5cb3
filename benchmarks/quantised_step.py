# SPDX-License-Identifier: Apache-2.0
"""Measures a step on a base in bfloat16, nf4 and int8 on the CPU, frozen and with a tied adapter.

The models have the layers of SmolLM2-135M and a small vocabulary: the output layer, which is not quantised, would only make
the ratios smaller. Weights are random, and all models share those of one base. Each round times forward and
backward of each model, in a new order; ratios are taken within a round, and their medians reported. Returns 1 if a frozen
step on nf4 takes more than 1.6 times as long as one in bfloat16.

    python benchmarks/quantised_step.py --output runs/quantised_step.json --page docs/costs.md
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from adapted_models import Sizes, build_llama, share_weights
from command_line import between_marks, count, write
from provenance import provenance
from step_overhead import make_step, measure

__all__ = ["BOUND", "MARKS", "benchmark", "main", "table", "within_bound"]

BOUND = 1.6
"""The most that a frozen step on nf4 may take, in steps on the base in bfloat16."""
MARKS = "<!-- step: by benchmarks/quantised_step.py -->", "<!-- end of step -->"
HELD = ("bf16", "nf4", "int8")
_VOCABULARY = 128


def main(argv: list[str]) -> int:
    """Measures, prints the table, and writes the JSON and the page's part if they are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=count, default=30, metavar="N", help="layers (default: 30)")
    parser.add_argument("--tokens", type=count, default=512, metavar="N", help="tokens of a step (default: 512)")
    parser.add_argument("--rank", type=count, default=8, metavar="R", help="the adapter's rank (default: 8)")
    parser.add_argument("--repeats", type=count, default=9, metavar="N", help="rounds that count (default: 9)")
    parser.add_argument("--warmup", type=count, default=1, metavar="N", help="rounds before them (default: 1)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a JSON file to write")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the page whose table is replaced")
    options = parser.parse_args(argv)
    result = benchmark(options.layers, options.tokens, options.rank, options.repeats, options.warmup)
    print(table(result))
    if options.output:
        write(options.output, json.dumps(result, indent=1) + "\n")
    if options.page:
        write(options.page, between_marks(options.page.read_text(), *MARKS, table(result)))
    return 0 if within_bound(result) else 1


def benchmark(layers: int, tokens: int, rank: int, repeats: int, warmup: int) -> dict[str, Any]:
    """The whole JSON. Seconds are CPU seconds of one thread: those of an idle core."""
    cfg = _start(layers, tokens)
    base = build_llama(cfg)
    models = {
        f"{held}{adapter}": _model(cfg, base, held, adapter, rank) for held in HELD for adapter in ("", " + tl6")
    }
    step = make_step(Sizes(sequence=tokens, vocab=_VOCABULARY), seed=1)
    losses = {name: step(model) for name, model in models.items()}
    steps: dict[str, Callable[[], object]] = {name: partial(step, model) for name, model in models.items()}

    def drop_gradients() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    seconds = measure(steps, drop_gradients, time.process_time, repeats=repeats, warmup=warmup, seed=1)
    sizes = {key: cfg[key] for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")}
    return {
        "benchmark": "quantised_step",
        **provenance(threads=1),
        "sizes": {**sizes, "num_query_groups": cfg["num_query_groups"], "tokens": tokens, "vocabulary": _VOCABULARY},
        "rank": rank,
        "repeats": repeats,
        "bound": BOUND,
        "losses": losses,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {name: _ratios(seconds, name) for name in models},
        "rounds": seconds,
    }


def within_bound(result: Mapping[str, Any]) -> bool:
    """Whether a frozen step on nf4 takes at most `BOUND` steps on the base in bfloat16."""
    return float(result["ratios"]["nf4"]["to bf16"]["median"]) <= BOUND


def table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table, and how it was measured."""
    rows = [
        "| base held in | frozen, s | to bf16 | with TL6, s | to bf16 with TL6 | TL6 to frozen |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    seconds, ratios = result["seconds"], result["ratios"]
    for held in HELD:
        adapted = f"{held} + tl6"
        to_bf16 = [_shown(ratios[name]["to bf16"]) if held != "bf16" else "1" for name in (held, adapted)]
        cells = (f"{seconds[held]:.3f}", to_bf16[0], f"{seconds[adapted]:.3f}", to_bf16[1])
        rows.append(f"| {held} | {' | '.join(cells)} | {_shown(ratios[adapted]['to frozen'])} |")
    sizes, nf4 = result["sizes"], ratios["nf4"]["to bf16"]["median"]
    met = "met" if within_bound(result) else "**not met**"
    text = (
        f"A frozen step on nf4 may take {BOUND:g} times as long as in bf16; it takes {nf4:.2f} times as long: {met}. "
        f"{sizes['num_layers']} layers of {sizes['hidden_size']} x {sizes['ffn_hidden_size']}, {sizes['tokens']} tokens, TL6 of "
        f"rank {result['rank']}; medians of {result['repeats']} rounds, with the least and the largest ratio; one thread of "
        f"{result['processor']}; {result['date'][:10]}, commit {str(result['commit'])[:9]}, torch "
        f"{result['versions']['torch']}."
    )
    return "\n".join(rows) + f"\n\n{text}"


def _ratios(seconds: Mapping[str, list[float]], name: str) -> dict[str, dict[str, float]]:
    """To the step in bf16 with the same adapter, and to the frozen step on the same base, in each round."""
    held, plus, adapter = name.partition(" + ")
    others = {"to bf16": f"bf16{plus}{adapter}", "to frozen": held}
    found = {
        what: [a / b for a, b in zip(seconds[name], seconds[other], strict=True)] for what, other in others.items()
    }
    return {
        what: {"min": min(values), "median": statistics.median(values), "max": max(values)}
        for what, values in found.items()
    }


def _shown(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"


def _start(layers: int, tokens: int) -> dict[str, Any]:
    """Sets up one process with one thread; returns the model's keys."""
    from nemo_tied_lora.planning.composing.compose import compose_config, plain
    from nemo_tied_lora.platform import prepare

    os.environ["OMP_NUM_THREADS"] = "1"
    prepare()
    import torch
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    sizes = {"num_layers": layers, "encoder_seq_length": tokens, "override_vocab_size": _VOCABULARY}
    words = [f"model.{key}={value}" for key, value in sizes.items()]
    return dict(plain(compose_config("plan", ["model=smollm2", *words]))["model"])


def _model(cfg: Mapping[str, Any], base: Any, held: str, adapter: str, rank: int) -> Any:
    """A model on the base's weights, or on its codes."""
    from nemo_tied_lora import TiedLoraConfig, inject, quantize_base

    model = build_llama(cfg)
    share_weights(model, base)
    if held != "bf16":
        quantize_base(model, held)
    if adapter:
        injected = inject(model, TiedLoraConfig.preset("tl6", rank=rank))
        injected.load_full_state({key: value + 0.01 for key, value in injected.full_state().items()})
    return model


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
