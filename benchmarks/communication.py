# SPDX-License-Identifier: Apache-2.0
"""Counts every collective to compare the network traffic that NeMo's own LoRA layer and Tied-LoRA add.

On each layout, four ranks build a megatron-core GPT three times: frozen, with NeMo's ParallelLinearAdapter on all four
linears, and with Tied-LoRA `tl6` on the same. Each model runs one step on Megatron's own schedule while every collective
is counted. An adapter adds its count minus the frozen model's count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapted_models import NemoLora, Sizes, add_nemo, add_ours, build_model
from collectives import Call, CollectiveCounter, added
from command_line import add_sizes, count, sizes_of, write
from communication_bounds import least_beside_the_base, least_of_any_method
from communication_page import render_page, tables, verdicts
from nemo_in_parallel import NemoLoraAfterGather, transformer_engine
from provenance import provenance

from nemo_tied_lora import TiedLoraConfig
from nemo_tied_lora.planning.adapter_cost import Precision, network_bytes
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.parallel_layout import Layout

# Functions import Megatron and NeMo themselves, after `prepare`.
if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel

__all__ = ["LAYOUTS", "benchmark", "count_step", "main", "summarize"]

WORLD_SIZE = 4
TIMEOUT = 600.0


def _layout(tp_size: int, pp_size: int, sequence_parallel: bool = False) -> Layout:
    return Layout(tp_size=tp_size, pp_size=pp_size, sequence_parallel=sequence_parallel, devices=tp_size * pp_size)


LAYOUTS = {
    "tp2": _layout(2, 1),
    "tp2, sequence parallel": _layout(2, 1, True),
    "tp4": _layout(4, 1),
    "tp4, sequence parallel": _layout(4, 1, True),
    "pp2": _layout(1, 2),
    "pp4": _layout(1, 4),
    "tp2 pp2": _layout(2, 2),
    "tp2 pp2, sequence parallel": _layout(2, 2, True),
}
_DEFAULTS = Sizes(layers=4, hidden=1024, ffn=4096, heads=16, sequence=128, vocab=1024)


def count_step(
    model: GPTModel, adapter: Any, *, tokens: int, microbatches: int, seed: int, vocab: int
) -> tuple[Counter[Call], float | None]:
    """Runs one step; returns (its collectives, the mean loss), with loss None except on the last stage.

    Phase "microbatch" is the schedule. Phase "step" is `adapter.reduce_gradients()` after it.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    groups = {
        "TP": parallel_state.get_tensor_model_parallel_group(),
        "PP": parallel_state.get_pipeline_model_parallel_group(),
        "DP": parallel_state.get_data_parallel_group(),
    }
    counter = CollectiveCounter(groups)
    generator = torch.Generator().manual_seed(seed)
    batches = iter([torch.randint(vocab, (1, tokens + 1), generator=generator) for _ in range(microbatches)])
    model.zero_grad(set_to_none=True)
    with counter.phase("microbatch"):
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=batches,
            model=model,
            num_microbatches=microbatches,
            seq_length=tokens,
            micro_batch_size=1,
            forward_only=False,
        )
    with counter.phase("step"):
        if adapter is not None:
            adapter.reduce_gradients()
    return counter.calls, sum(losses) / len(losses) if losses else None


def _forward_step(batches: Iterator[torch.Tensor], model: GPTModel) -> tuple[torch.Tensor, Any]:
    import torch

    tokens = next(batches)
    length = tokens.shape[1] - 1
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    output = model(tokens[:, :-1], torch.arange(length)[None], mask, labels=tokens[:, 1:])
    return output, lambda losses: (losses.mean(), losses.mean().item())


def measure_layout(layout: Layout, sizes: Sizes, rank: int, microbatches: int, seed: int) -> dict[str, Any]:
    """Variant to its loss and its counts for a whole step and for one microbatch of half the tokens. All ranks call it."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(layout.tp_size, layout.pp_size)
    build = partial(build_model, sizes, seed, sequence_parallel=layout.sequence_parallel)
    frozen = build()
    models = {"frozen": frozen, "ours": build(frozen)}
    adapter = add_ours(models["ours"], rank, seed)
    for name, version, mixin in _nemo_variants(layout):
        models[name] = build(frozen)
        with nullcontext() if version is None else transformer_engine(version):
            add_nemo(models[name], rank, models["ours"], mixin)
    counted = {}
    for name, model in models.items():
        step = partial(count_step, model, adapter if name == "ours" else None, seed=seed, vocab=sizes.vocab)
        whole, loss = step(tokens=sizes.sequence, microbatches=microbatches)
        half, _ = step(tokens=sizes.sequence // 2, microbatches=1)
        counted[name] = {"whole": whole, "half": half, "loss": loss}
    parallel_state.destroy_model_parallel()
    return counted


def _nemo_variants(layout: Layout) -> list[tuple[str, str | None, type]]:
    """(name, the faked version of Transformer Engine, the mixin) for each way of NeMo's layer."""
    if not layout.sequence_parallel:
        return [("nemo", None, NemoLora)]
    return [("nemo", "1.4.0", NemoLora), ("nemo_te", "1.5.0", NemoLoraAfterGather)]


def benchmark(sizes: Sizes, rank: int, layouts: Sequence[str], *, microbatches: int, seed: int) -> dict[str, Any]:
    """The whole JSON."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    settings = {"rank": rank, "microbatches": microbatches, "seed": seed, "world_size": WORLD_SIZE}
    model = {"sizes": dataclasses.asdict(sizes), "targets": list(sizes.linears()), "preset": "tl6", "dtype": "float32"}
    result: dict[str, Any] = {"benchmark": "communication", **provenance(1), **model, **settings, "layouts": {}}
    ranks = _on_ranks(sizes, rank, layouts, microbatches, seed)
    for name in layouts:
        result["layouts"][name] = summarize(
            [counted[name] for counted in ranks], LAYOUTS[name], sizes, rank, microbatches
        )
    return result


def summarize(
    ranks: Sequence[dict[str, Any]], layout: Layout, sizes: Sizes, rank: int, microbatches: int
) -> dict[str, Any]:
    """One layout's entry of the JSON: each variant on the rank that sends most, the plan's numbers, the minimum."""
    settings = {"tokens": sizes.sequence, "microbatches": microbatches}
    adapters = [name for name in ranks[0] if name != "frozen"]
    least = {"beside_the_base": least_beside_the_base, "any_method": least_of_any_method}
    return {
        "tp": layout.tp_size,
        "pp": layout.pp_size,
        "sequence_parallel": layout.sequence_parallel,
        "base": _most([_per_phase(counted["frozen"]["whole"], microbatches) for counted in ranks]),
        "added": {name: _added(name, ranks, microbatches) for name in adapters},
        "plan": _planned(layout, sizes, rank),
        "least": {
            name: {phase: _number(value) for phase, value in bound(sizes, rank, layout, **settings).items()}
            for name, bound in least.items()
        },
        "losses": {
            name: next(counted[name]["loss"] for counted in ranks if counted[name]["loss"] is not None)
            for name in ranks[0]
        },
    }


def _added(name: str, ranks: Sequence[dict[str, Any]], microbatches: int) -> dict[str, Any]:
    reports = []
    for counted in ranks:
        whole = _per_phase(added(counted[name]["whole"], counted["frozen"]["whole"]), microbatches)
        half = _per_phase(added(counted[name]["half"], counted["frozen"]["half"]), 1)
        whole["microbatch"]["sent_bytes_of_half_the_tokens"] = half["microbatch"]["sent_bytes"]
        reports.append(whole)
    return _most(reports)


def _most(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Phase to the numbers of the rank that sends most in it."""
    return {phase: max((report[phase] for report in reports), key=lambda r: r["sent_bytes"]) for phase in reports[0]}


def _per_phase(calls: Counter[Call], microbatches: int) -> dict[str, Any]:
    """Phase to its calls, bytes sent and messages, for one microbatch; all microbatches are alike."""
    result = {}
    for phase, share in (("microbatch", microbatches), ("step", 1)):
        mine = {call: Fraction(count, share) for call, count in calls.items() if call.phase == phase}
        groups = sorted({call.group for call in mine})
        result[phase] = {
            "calls": _number(sum(mine.values(), Fraction(0))),
            "sent_bytes": _number(_sent(mine)),
            "sent_bytes_of_group": {
                g: _number(_sent({c: n for c, n in mine.items() if c.group == g})) for g in groups
            },
            "messages": [
                {**dataclasses.asdict(call), "shape": list(call.shape), "calls": _number(count)}
                for call, count in sorted(mine.items(), key=lambda item: str(item[0]))
            ],
        }
    return result


def _sent(calls: dict[Call, Fraction]) -> Fraction:
    return sum((count * call.sent for call, count in calls.items()), Fraction(0))


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


def _planned(layout: Layout, sizes: Sizes, rank: int) -> dict[str, int]:
    """The numbers of `tied-lora plan` for the same model, layout and adapter."""
    arch = Architecture(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.heads,
        num_query_groups=sizes.heads,
        kv_channels=sizes.hidden // sizes.heads,
        seq_length=sizes.sequence,
    )
    planned = network_bytes(
        arch, layout, TiedLoraConfig.preset("tl6", rank=rank), Precision.from_names("32", amp_O2=False)
    )
    step = ("reduced_bytes_per_step", "sequence_parallel_bytes_per_step")
    return {
        "microbatch": planned["activation_bytes_per_microbatch"],
        "step": sum(planned[name] for name in step),
        **planned,
    }


def _on_ranks(
    sizes: Sizes, rank: int, layouts: Sequence[str], microbatches: int, seed: int
) -> list[dict[str, dict[str, Any]]]:
    """Every rank's counts, in rank order.

    The ranks are forked, so that NeMo is imported once: its import takes longer than the measurement.

    Raises:
        RuntimeError: a rank died or did not answer. The others are killed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        settings = (sizes, rank, layouts, microbatches, seed, f"file://{folder}/rendezvous")
        children, answers = [], []
        for number in range(WORLD_SIZE):
            answer, sender = context.Pipe(duplex=False)
            children.append(context.Process(target=_rank_main, args=(number, sender, *settings), daemon=True))
            children[-1].start()
            sender.close()  # so that the pipe ends when the child, which holds the last copy, dies
            answers.append(answer)
        try:
            return [_answer(number, answer) for number, answer in enumerate(answers)]
        finally:
            for child in children:
                child.join(10)
                if child.is_alive():
                    child.kill()


def _answer(number: int, connection: Any) -> Any:
    if not connection.poll(TIMEOUT):
        raise RuntimeError(f"rank {number} did not answer within {TIMEOUT:.0f} s")
    try:
        return connection.recv()
    except EOFError:
        raise RuntimeError(f"rank {number} died: its traceback is above") from None


def _rank_main(
    number: int,
    sender: Any,
    sizes: Sizes,
    rank: int,
    layouts: Sequence[str],
    microbatches: int,
    seed: int,
    rendezvous: str,
) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=number, world_size=WORLD_SIZE, timeout=timedelta(seconds=120)
    )
    sender.send({name: measure_layout(LAYOUTS[name], sizes, rank, microbatches, seed) for name in layouts})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; `--help` describes it. Returns 1 if a claim is missed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.from_json is None and options.output is None:
        parser.error("--output FILE is missing; name the JSON file to write")
    if options.from_json is None:
        sizes = sizes_of(options)
        for problem in _problems(sizes, options.rank):
            parser.error(problem)
        names = options.layouts or list(LAYOUTS)
        result = benchmark(sizes, options.rank, names, microbatches=options.microbatches, seed=options.seed)
        write(options.output, json.dumps(result, indent=1) + "\n")
    else:
        result = json.loads(options.from_json.read_text())
    print(tables(result))
    judged = list(verdicts(result))
    missed = [f"{text}: MISSED" for text, kept in judged if not kept]
    print("\n".join(["", *missed, f"{len(judged) - len(missed)} of {len(judged)} claims kept"]))
    if options.page is not None:
        write(options.page, render_page(result))
    return 1 if missed else 0


def _problems(sizes: Sizes, rank: int) -> Iterator[str]:
    for name in ("layers", "hidden", "ffn", "heads", "vocab", "sequence"):
        needed = 2 * WORLD_SIZE if name == "sequence" else WORLD_SIZE  # half a sequence is split over the ranks too
        if getattr(sizes, name) % needed:
            yield f"--{name} {getattr(sizes, name)}: not divisible by {needed}, which the layouts need"
    if sizes.hidden % sizes.heads:
        yield f"--hidden {sizes.hidden} is not divisible by --heads {sizes.heads}"
    narrowest = min(sizes.hidden, sizes.ffn)
    if rank > narrowest:
        yield f"--rank {rank}: more than {narrowest}, the narrowest side of a linear"
    if rank % math.lcm(*(layout.tp_size for layout in LAYOUTS.values())):
        yield f"--rank {rank}: not divisible by 4, which NeMo's layer needs at 4 tensor-parallel ranks"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Takes about two minutes on 2 cores. Exit code 1 if a claim is missed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the Markdown page to write")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="do not count; make the page from this JSON")
    parser.add_argument("--rank", type=count, default=16, metavar="R", help="the adapters' rank")
    parser.add_argument("--microbatches", type=count, default=2, metavar="N", help="microbatches of one sequence")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of the weights and the data")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), metavar="NAME", help="only these layouts")
    add_sizes(parser, _DEFAULTS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
