# SPDX-License-Identifier: Apache-2.0
"""Measures greedy generation beside transformers' `generate` and NeMo's, on the same model, batch and dtype.

Four contenders: transformers, this package on one rank, the same on two pipeline stages with half of the threads each, and
NeMo's own `generate` on one rank. Each round gives each of them a turn, one after the other in a new random order. Ratios
are taken within a round; the benchmark reports their medians. Prompts are random tokens of mixed lengths.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from command_line import count, write
from generation_speed_page import render_page, table
from generation_workers import Contender, Turn, nemo_model, transformers_model
from provenance import provenance
from tqdm import tqdm

from nemo_tied_lora.planning.versions import installed_version

__all__ = ["benchmark", "main", "random_prompts", "summarize"]

CONTENDERS = ("transformers", "one_rank", "two_stages", "nemo")
DTYPES = ("float32", "bfloat16")


def random_prompts(number: int, shortest: int, longest: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens; their lengths are spread evenly from the shortest to the longest, in random order."""
    draw = random.Random(seed)
    lengths = [shortest + (longest - shortest) * i // max(number - 1, 1) for i in range(number)]
    draw.shuffle(lengths)
    return [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]


def summarize(seconds: Mapping[str, Sequence[float]], tokens: int) -> dict[str, Any]:
    """One case's entry of the JSON, from the seconds of each round and the number of new tokens in a turn."""
    entry: dict[str, Any] = {"new_tokens": tokens, "seconds": dict(seconds), "tokens_per_second": {}, "ratio": {}}
    for name, values in seconds.items():
        entry["tokens_per_second"][name] = tokens / statistics.median(values)
        ratios = [mine / theirs for mine, theirs in zip(values, seconds["transformers"], strict=True)]
        entry["ratio"][name] = {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
    return entry


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """The whole JSON."""
    names = ("shortest", "longest", "new", "repeats", "seed", "batches", "dtypes")
    result: dict[str, Any] = {
        "benchmark": "generation_speed",
        **provenance(options.threads),
        "model": options.name or options.transformers.name,
        **{name: getattr(options, name) for name in names},
        "cases": [],
    }
    result["versions"]["transformers"] = installed_version("transformers")
    rounds = (1 + options.repeats) * len(options.batches) * len(options.dtypes)
    with tqdm(total=rounds, unit="round") as bar:
        for dtype in options.dtypes:
            bar.set_description(dtype)
            result["cases"] += _of_dtype(options, dtype, bar)
    return result


def _of_dtype(options: argparse.Namespace, dtype: str, bar: Any) -> list[dict[str, Any]]:
    threads = options.threads
    two_stages = max(1, threads // 2)
    alone = partial(nemo_model, options.base, dtype, 1)
    contenders = {
        "transformers": Contender(partial(transformers_model, options.transformers, dtype), ranks=1, threads=threads),
        "one_rank": Contender(alone, ranks=1, threads=threads),
        "two_stages": Contender(partial(nemo_model, options.base, dtype, 2), ranks=2, threads=two_stages),
    }
    try:
        for contender in contenders.values():
            contender.start()
        for contender in contenders.values():
            contender.wait_until_ready()
        contenders["nemo"] = contenders["one_rank"]  # the same process and the same model
        return [{"dtype": dtype, **_case(options, contenders, prompts, bar)} for prompts in options.batches]
    finally:
        for contender in contenders.values():
            contender.stop()


def _case(options: argparse.Namespace, contenders: Mapping[str, Contender], prompts: int, bar: Any) -> dict[str, Any]:
    texts = random_prompts(prompts, options.shortest, options.longest, options.vocabulary, options.seed)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    order, shuffle = list(CONTENDERS), random.Random(options.seed)
    found: dict[str, list[list[int]]] = {}
    for round_ in range(1 + options.repeats):
        shuffle.shuffle(order)
        for name in order:
            new = options.new if round_ else options.warmup
            elapsed, tokens = contenders[name].run(Turn(prompts=texts, new=new, method=name))
            if round_:
                seconds[name].append(elapsed)
                found[name] = tokens
        bar.update()
    wrong = [name for name, rows in found.items() if any(len(row) != options.new for row in rows)]
    assert not wrong, f"{wrong} did not generate {options.new} tokens a row"
    same = {
        name: sum(mine == theirs for mine, theirs in zip(rows, found["transformers"], strict=True))
        for name, rows in found.items()
    }
    return {"prompts": prompts, "rows_as_transformers": same, **summarize(seconds, prompts * options.new)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `--help` describes it."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.from_json is not None:
        result = json.loads(options.from_json.read_text())
        result["model"] = options.name or result["model"]
    else:
        for name in ("output", "transformers", "base"):
            if getattr(options, name) is None:
                parser.error(f"--{name} is missing; --help says what it names")
        for name in ("transformers", "base"):
            if not getattr(options, name).exists():
                parser.error(f"--{name} {getattr(options, name)}: no such file or folder")
        if options.shortest > options.longest:
            parser.error(f"--shortest {options.shortest}: more than --longest {options.longest}")
        result = benchmark(options)
        write(options.output, json.dumps(result, indent=1) + "\n")
    print(table(result))
    if options.page is not None:
        write(options.page, render_page(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="The defaults take about five minutes on two idle cores with SmolLM2-135M.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--transformers", type=Path, metavar="PATH", help="the model: a Hugging Face folder or a GGUF file"
    )
    parser.add_argument("--name", metavar="TEXT", help="the model's name; without it, that of the folder or file")
    parser.add_argument("--base", type=Path, metavar="FILE", help="its import: the .nemo of tied-lora import")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the Markdown page to write")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="do not measure; make the page from this JSON")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes")
    parser.add_argument("--batches", type=count, nargs="+", default=[16], metavar="N", help="prompts in a batch")
    parser.add_argument("--shortest", type=count, default=16, metavar="N", help="tokens of the shortest prompt")
    parser.add_argument("--longest", type=count, default=64, metavar="N", help="tokens of the longest prompt")
    parser.add_argument("--new", type=count, default=32, metavar="N", help="new tokens of each prompt")
    parser.add_argument(
        "--vocabulary", type=count, default=32_000, metavar="N", help="prompts have tokens below this one"
    )
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="rounds that are counted")
    parser.add_argument(
        "--warmup", type=count, default=4, metavar="N", help="new tokens in the round that is not counted"
    )
    parser.add_argument("--threads", type=count, default=2, metavar="N", help="CPU threads of each contender")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of the prompts and of the order")
    return parser


if __name__ == "__main__":
    main()
