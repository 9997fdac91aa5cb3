# SPDX-License-Identifier: Apache-2.0
"""The likeliest token and the cross entropy of logits that are split over tensor-parallel ranks, which gather no logits.

T = tensor parallel size. Rank i holds the columns of the tokens i V/T up to (i + 1) V/T, where V counts the rows of the
padded embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state

__all__ = ["cross_entropy", "likeliest"]


def likeliest(logits: torch.Tensor, vocabulary: int | None, forbidden: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
    """The token (n) with the largest logit in each row of logits (n, V/T); of equal ones the smallest token.

    Each rank takes its own maximum; an all-gather of (n, 2) decides between ranks. Changes `logits`.

    Args:
        vocabulary: tokens from here on are padding and never win. None: no padding.
        forbidden: (row, token) pairs that must not win.
    """
    size, rank = _tensor_parallel()
    columns = logits.shape[1]
    offset = rank * columns
    if vocabulary is not None and vocabulary < offset + columns:
        logits[:, max(vocabulary - offset, 0) :] = -torch.inf
    for row, banned in forbidden:
        if 0 <= banned - offset < columns:
            logits[row, banned - offset] = -torch.inf
    best, column = logits.max(dim=1)
    token = column + offset
    if size == 1:
        return token
    gathered = _from_all(torch.stack((best.double(), token.double()), dim=1), size)
    winner = gathered[..., 0].argmax(dim=0)
    return gathered[..., 1].gather(0, winner[None])[0].long()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats (n) of the targets (n) under logits (n, V/T), in float32 or wider; the same on all ranks.

    -log softmax(logits)[target]. The rows of the padding count in the softmax's sum, as in training. An all-gather of
    (n, 2): each rank's part of log(sum(exp(logits))), and the target's logit on the rank that has it.
    """
    size, rank = _tensor_parallel()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    columns = wide.shape[1]
    local = targets - rank * columns
    here = (local >= 0) & (local < columns)
    target = wide.gather(1, local.clamp(0, columns - 1)[:, None])[:, 0].where(here, torch.zeros_like(wide[:, 0]))
    mine = torch.stack((wide.logsumexp(dim=1), target), dim=1)
    if size == 1:
        return mine[:, 0] - mine[:, 1]
    gathered = _from_all(mine, size)
    return gathered[..., 0].logsumexp(dim=0) - gathered[..., 1].sum(dim=0)


def _from_all(mine: torch.Tensor, size: int) -> torch.Tensor:
    """This tensor of all tensor-parallel ranks, (T, ...)."""
    gathered = mine.new_empty(size, *mine.shape)
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(list(gathered.unbind()), mine, group=group)
    return gathered


def _tensor_parallel() -> tuple[int, int]:
    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
