# SPDX-License-Identifier: Apache-2.0
"""Tries one all-reduce in every parallel group before a model is loaded: checks the result, measures the bandwidth.

Each rank contributes x[i] = (i mod 13) + (rank mod 997) + 1. So the sum over a group of n ranks is known exactly:
n (i mod 13) + the sum of (rank mod 997) + 1 over its ranks. float32 represents these whole numbers exactly.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.platform.devices import collective_device
from nemo_tied_lora.resilience.rendezvous import Rendezvous, name_ranks, node_name

__all__ = ["GROUPS", "check", "check_groups", "contribution", "group_ranks", "report"]

GROUPS = {"tp": "tensor parallel", "pp": "pipeline parallel", "dp": "data parallel", "cp": "context parallel"}
_ELEMENTS = {"cuda": 16 * 2**20, "cpu": 2**18}
_PERIOD, _MODULUS = 13, 997
_POLL_S = 0.005


def check(rendezvous: Rendezvous, values: Mapping[str, Any]) -> list[str]:
    """Tries an all-reduce in every group of the layout. Every rank calls it, with the default process group set up.

    Args:
        values: the composed configuration.

    Returns:
        One line per kind of group.

    Raises:
        ConfigError: on every rank, with what any rank found.
    """
    rendezvous = dataclasses.replace(
        rendezvous, timeout_s=float(values["watchdog"]["timeout_s"] or rendezvous.timeout_s)
    )
    layout, swapped = Layout.from_config(values), bool(values["model"].get("use_tp_pp_dp_mapping"))
    groups = {kind: group_ranks(layout, kind, pipeline_before_data=swapped) for kind in GROUPS}
    rendezvous.put("groups", {"node": node_name(), "results": check_groups(rendezvous, groups, collective_device())})

    def judge() -> list[str]:
        answers = rendezvous.gather("groups")
        nodes = {rank: answer["node"] for rank, answer in answers.items()}
        lines, problems = report({rank: answer["results"] for rank, answer in answers.items()}, nodes)
        silent = sorted(set(range(rendezvous.world_size)) - answers.keys())
        problems += [f"all-reduce: ranks {silent} did not come back from it"] if silent else []
        Problems(problems).raise_if_any()
        return lines

    return list(rendezvous.from_rank_0("groups/all", judge))


def group_ranks(layout: Layout, kind: str, *, pipeline_before_data: bool = False) -> list[list[int]]:
    """Returns the groups of one kind, as Megatron assigns ranks to them.

    Args:
        pipeline_before_data: NeMo's `use_tp_pp_dp_mapping`.
    """
    from megatron.core.parallel_state import RankGenerator

    sizes = {"tp": layout.tp_size, "pp": layout.pp_size, "cp": layout.cp_size, "dp": layout.resolved_dp_size}
    order = "tp-cp-ep-pp-dp" if pipeline_before_data else "tp-cp-ep-dp-pp"
    return RankGenerator(ep=1, order=order, **sizes).get_ranks(kind)


def check_groups(
    rendezvous: Rendezvous, groups: Mapping[str, Sequence[Sequence[int]]], device: torch.device
) -> list[Any]:
    """Runs an all-reduce over each group that this rank is in. All ranks call it, after the default process group exists.

    A group that does not finish within the rendezvous's time is a problem. The groups after it are not tried.

    Returns:
        One {"kind", "ranks", "bytes", "seconds", "problem"} per group.
    """
    results: list[Any] = []
    for kind, members in groups.items():
        for ranks in members:
            if rendezvous.rank in ranks and len(ranks) > 1:
                results.append({"kind": kind, "ranks": list(ranks), **_all_reduce(rendezvous, kind, ranks, device)})
                if results[-1]["seconds"] is None:
                    return results
    return results


def report(
    results_of: Mapping[int, Sequence[Mapping[str, Any]]], nodes: Mapping[int, str]
) -> tuple[list[str], list[str]]:
    """Returns (lines, problems). There is one line per kind of group: the number of groups and the lowest bandwidth.

    Args:
        results_of: each rank's result of `check_groups`.
        nodes: each rank's node.
    """
    lines, problems = [], []
    for kind, name in GROUPS.items():
        results = [result for found in results_of.values() for result in found if result["kind"] == kind]
        by_problem: dict[str, list[int]] = {}
        for rank, found in results_of.items():
            for result in found:
                if result["kind"] == kind and result["problem"]:
                    by_problem.setdefault(f"{result['problem']} of ranks {result['ranks']}", []).append(rank)
        problems += [
            f"all-reduce, {name}: {text} (on {name_ranks(ranks, nodes)})" for text, ranks in by_problem.items()
        ]
        timed = [(_bandwidth(result), result["ranks"]) for result in results if result["seconds"]]
        if timed:
            slowest, ranks = min(timed)
            number = len({tuple(result["ranks"]) for result in results})
            size = f"{number} group{'s' * (number > 1)} of {len(ranks)}"
            lines.append(f"all-reduce, {name}: {size}, {slowest / 1e9:.2f} GB/s at least (ranks {ranks})")
    return lines, problems


def contribution(rank: int, elements: int, device: torch.device) -> torch.Tensor:
    """Returns what a rank contributes to the sum."""
    pattern = torch.arange(elements, device=device, dtype=torch.float32) % _PERIOD
    return pattern + (rank % _MODULUS + 1)


def _all_reduce(rendezvous: Rendezvous, kind: str, ranks: Sequence[int], device: torch.device) -> dict[str, Any]:
    elements = _ELEMENTS[device.type]
    limit = timedelta(seconds=2 * rendezvous.timeout_s)  # our own limit comes first, and has a better message
    size = 4 * elements
    try:
        # Only the members of a group create it: with thousands of ranks there are thousands of groups.
        group = dist.new_group(list(ranks), timeout=limit, use_local_synchronization=True)
        _timed(
            contribution(rendezvous.rank, elements, device), group, rendezvous.timeout_s
        )  # the first all-reduce also connects
        values = contribution(rendezvous.rank, elements, device)
        seconds = _timed(values, group, rendezvous.timeout_s)
        problem = None if seconds else f"not finished within {rendezvous.timeout_s:.0f} s"
        if seconds:
            problem = _wrong(values, ranks)
            dist.destroy_process_group(group)
    except RuntimeError as error:
        seconds, problem = None, f"failed: {str(error).splitlines()[0]}"
    return {"bytes": size, "seconds": seconds, "problem": problem}


def _timed(values: torch.Tensor, group: Any, timeout_s: float) -> float | None:
    """Returns the seconds of one all-reduce in place. None if it does not finish; `wait` would then block for ever."""
    started = time.perf_counter()
    work = dist.all_reduce(values, group=group, async_op=True)
    while not work.is_completed():
        if time.perf_counter() - started > timeout_s:
            return None
        time.sleep(_POLL_S if time.perf_counter() - started > 0.5 else 0)
    work.wait()  # raises its error
    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - started


def _wrong(values: torch.Tensor, ranks: Sequence[int]) -> str | None:
    pattern = torch.arange(values.numel(), device=values.device, dtype=torch.float32) % _PERIOD
    wanted = pattern * len(ranks) + sum(rank % _MODULUS + 1 for rank in ranks)
    wrong = (values != wanted).nonzero()
    if wrong.numel() == 0:
        return None
    first = int(wrong[0])
    return f"wrong sum: element {first} is {values[first]:.0f}, not {wanted[first]:.0f}; {wrong.numel()} are wrong"


def _bandwidth(result: Mapping[str, Any]) -> float:
    """Returns the bytes per second that each rank sends in a ring: 2 (n-1)/n of the tensor."""
    size = len(result["ranks"])
    return 2 * (size - 1) / size * result["bytes"] / result["seconds"]
