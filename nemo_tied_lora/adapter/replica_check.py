# SPDX-License-Identifier: Apache-2.0
"""Checks by checksums that all ranks that hold the same tensor hold the same bits.

These ranks must agree on the adapter's stored tensors, including frozen ones:

===============================================  ================  ===============  =========================
tensor                                           pipeline, chunks  tensor parallel  data and context parallel
===============================================  ================  ===============  =========================
tied, replicated: A of a column, B of a row      same bits         same bits        same bits
tied, sharded: B of a column, A of a row         same bits         a shard each     same bits
per layer, replicated: u; v of a row             one holder        same bits        same bits
per layer, sharded: v of a column                one holder        a shard each     same bits
===============================================  ================  ===============  =========================

Only checksums cross the network: 16 bytes per tensor and shard, in one all-reduce over all ranks. It gives every rank the
same verdict. Which rank holds which value is gathered only after a difference was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.splitmix64 import GOLDEN_GAMMA, mix_
from nemo_tied_lora.errors import TrainingStopped

__all__ = ["Difference", "TieError", "check_ties", "checksums"]

_MOST_NAMED = 16
_NOTHING = torch.iinfo(torch.int64).min
_Key = tuple[str, int | None]


@dataclass(frozen=True)
class Difference:
    """A tensor on whose bits its ranks disagree."""

    name: str
    """As in the adapter's full state."""
    shard: int | None
    """The tensor-parallel rank whose shard it is; None if every rank holds the whole tensor."""
    ranks: dict[int, tuple[int, ...]]
    """Checksum to the ranks that have it, most ranks first."""

    def __str__(self) -> str:
        name = self.name if self.shard is None else f"{self.name} (shard {self.shard})"
        values = (f"{value & (2**64 - 1):016x} on {_ranks(ranks)}" for value, ranks in self.ranks.items())
        return f"{name}: checksum {'; '.join(values)}"


class TieError(TrainingStopped):
    """Ranks that hold the same tensor hold different bits. Raised on every rank, with the same message."""

    def __init__(self, differences: Sequence[Difference], total: int, when: str) -> None:
        self.differences = tuple(differences)
        lines = [f"tie guard: {when}{total} tensor(s) differ between ranks that must hold the same bits"]
        lines += [f"  {difference}" for difference in differences]
        if total > len(differences):
            lines.append(f"  and {total - len(differences)} more")
        lines.append("Nothing was saved. Resume from the last checkpoint: it passed this check before it was written")
        super().__init__("\n".join(lines))


def check_ties(adapter: Adapter, when: str = "") -> None:
    """Compares the bits of every stored tensor over the ranks and chunks that hold it. All ranks must call it.

    Call it between an optimizer step and the next forward pass.

    Args:
        when: the start of the error message, as "after step 400: ".

    Raises:
        TieError: on every rank, if any rank differs.
    """
    names, own = _names(adapter), _own_checksums(adapter)
    # Over all holders, max(x) and max(~x) = ~min(x) are complements of each other only if all have the same x.
    shape = (2, len(names), parallel_state.get_tensor_model_parallel_world_size())
    extremes = torch.full(shape, _NOTHING, dtype=torch.int64)
    for (name, shard), values in own.items():
        extremes[:, names[name], shard or 0] = torch.tensor([max(values), max(~value for value in values)])
    extremes = extremes.to(adapter.device)
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
    held = extremes[1] != _NOTHING
    differing = [(row, slot) for row, slot in (held & (extremes[0] != ~extremes[1])).nonzero().tolist()]
    if differing:
        raise TieError(_holders(adapter, differing[:_MOST_NAMED], own), len(differing), when)


def checksums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Checksums of the bits of n tensors of one shape and dtype: (n,) int64, on the tensors' device.

    Reads the bytes as 64-bit words. Each word, with its place, goes through splitmix64's bijective mixing function, and
    the results are added modulo 2^64. One changed word always changes the sum. Several changed words, or words that
    changed places, leave it unchanged with a probability of 2^-64.
    """
    size = tensors[0].numel() * tensors[0].element_size()
    words = torch.zeros(len(tensors), -(-size // 8), dtype=torch.int64, device=tensors[0].device)
    rows = words.view(torch.uint8)
    for row, tensor in zip(rows, tensors, strict=True):
        row[:size].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
    places = torch.arange(1, words.shape[1] + 1, device=words.device)
    words.add_(places.mul_(GOLDEN_GAMMA))
    return mix_(words).sum(dim=1)


def _names(adapter: Adapter) -> dict[str, int]:
    """Name of every stored tensor of the whole model to its row number, the same on every rank."""
    return {name: row for row, name in enumerate(expected_shapes(adapter.config, adapter.shapes))}


def _own_checksums(adapter: Adapter) -> dict[_Key, list[int]]:
    """(name, shard) of each tensor of this rank to its checksums, one per chunk that holds it."""
    is_split = parallel_state.get_tensor_model_parallel_world_size() > 1
    tp_rank = parallel_state.get_tensor_model_parallel_rank() if is_split else None
    same_shape: dict[tuple[torch.Size, torch.dtype], list[tuple[_Key, torch.Tensor]]] = {}
    for name, parameter in _named_factors(adapter):
        key = (name, tp_rank if getattr(parameter, "tensor_model_parallel", False) else None)
        same_shape.setdefault((parameter.shape, parameter.dtype), []).append((key, parameter))
    found: dict[_Key, list[int]] = {}
    if same_shape:
        # tolist() once: one transfer from the device.
        values = torch.cat([checksums([tensor for _, tensor in group]) for group in same_shape.values()]).tolist()
        for key, value in zip([key for group in same_shape.values() for key, _ in group], values, strict=True):
            found.setdefault(key, []).append(value)
    return found


def _named_factors(adapter: Adapter) -> Iterator[tuple[str, torch.Tensor]]:
    for chunk in adapter.chunks:
        chunk.factors()
        yield from chunk.factors.named_parameters()


def _holders(adapter: Adapter, places: Sequence[tuple[int, int]], own: Mapping[_Key, list[int]]) -> list[Difference]:
    """Gathers which ranks hold which value. All ranks must call it."""
    names = _names(adapter)
    held = {(names[name], shard or 0): (shard, values) for (name, shard), values in own.items()}
    everyone: list[dict[tuple[int, int], tuple[int | None, list[int]]]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, {place: held[place] for place in places if place in held})
    differences = []
    for place in places:
        ranks: dict[int, list[int]] = {}
        shards = set()
        for rank, values_of_rank in enumerate(everyone):
            if place in values_of_rank:
                shards.add(values_of_rank[place][0])
                for value in dict.fromkeys(values_of_rank[place][1]):
                    ranks.setdefault(value, []).append(rank)
        ordered = sorted(ranks.items(), key=lambda item: (-len(item[1]), item[1]))
        name = next(name for name, row in names.items() if row == place[0])
        differences.append(Difference(name, shards.pop(), {value: tuple(held) for value, held in ordered}))
    return differences


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
