# SPDX-License-Identifier: Apache-2.0
"""Context parallelism on the CPU: which rank has which positions, and an attention over all positions.

megatron-core's attention for the CPU, `DotProductAttention`, refuses context parallelism; only Transformer Engine's has it.
`GatheredAttention` applies the local attention to gathered keys and values. So everything else (position embeddings,
linears, gradient groups, loss) is the code of megatron-core and of the adapter, on a part of the sequence.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention

__all__ = ["GatheredAttention", "own_positions"]


def own_positions(sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns all positions in the order of the ranks, and this rank's: of 2 CP pieces, rank r has the r-th and the r-th last."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return torch.arange(sequence), torch.arange(sequence)
    pieces = torch.arange(sequence).chunk(2 * size)
    ranks = [torch.cat([pieces[r], pieces[2 * size - 1 - r]]) for r in range(size)]
    return torch.cat(ranks), ranks[rank]


class GatheredAttention(DotProductAttention):
    """Attention of this rank's queries (s/CP, b, heads, d) to the keys and values (s, b, groups, d) of all ranks.

    Forward gathers keys and values over the context-parallel group; backward sums and scatters their gradients.
    The mask is (1, 1, s/CP, s), with the keys in the order of the ranks.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(query, _Gather.apply(key), _Gather.apply(value), *args, **kwargs)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(part.contiguous()) for _ in range(parallel_state.get_context_parallel_world_size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=parallel_state.get_context_parallel_group())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous()
        torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
        size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        return total.chunk(size)[rank]
