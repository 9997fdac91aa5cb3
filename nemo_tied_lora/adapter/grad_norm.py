# SPDX-License-Identifier: Apache-2.0
"""The norm of an adapter's whole gradient, over all ranks, and clipping by it.

Each element counts once:

==========================================  ====================================================
gradient of                                 counted by
==========================================  ====================================================
a factor that tensor parallelism shards     every tensor-parallel rank, each its shard
a factor that is replicated                 tensor-parallel rank 0
a tied factor (a copy per stage and chunk)  the first chunk of the first stage
a layer's own factor                        the stage of the layer
==========================================  ====================================================

Ranks of one place in the model (data- and context-parallel ranks) hold the same gradients. Every rank sends the norm of
what it counts, in a table with one column per place, to one all-reduce over all ranks. It takes the maximum, so all ranks
get the same bits and sum them in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import nn

from nemo_tied_lora.platform.devices import collective_device

__all__ = ["clip", "global_norm"]

_SAME = 1e-6
"""Replicas' norms may differ by this much, relative: machines of different kinds may sum in another order."""


def global_norm(parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> torch.Tensor:
    """Returns the norm, () float64 on the CPU. See `Adapter.gradient_norm`."""
    if norm_type not in (2, math.inf):
        raise ValueError(f"norm_type={norm_type!r}: must be 2 or infinity")
    own = _norm([g for p in parameters if _is_counted(p) and (g := _gradient(p)) is not None], norm_type)
    table = _maximum_over_ranks(own)
    if table[0, -1]:
        return torch.tensor(math.nan, dtype=torch.float64)
    highest, lowest = table[0, :-1], -table[1, :-1]
    if ((lowest < highest * (1 - _SAME)) & ~lowest.isinf()).any():
        place = int((highest - lowest).nan_to_num().argmax())
        raise RuntimeError(
            f"gradient norm: data-parallel ranks hold different gradients (norms {float(lowest[place]):.6g} to "
            f"{float(highest[place]):.6g}); average them over the data- and context-parallel ranks first. Megatron's "
            "distributed optimizer leaves each rank a part of them: set OptimizerConfig.clip_grad, and optimizer.step() "
            "returns the norm"
        )
    return highest.max() if norm_type == math.inf else highest.square().sum().sqrt()


def clip(
    parameters: Sequence[nn.Parameter], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Scales all gradients in place, and returns the norm before. See `Adapter.clip_gradients`."""
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm!r}: must be greater than 0")
    norm = global_norm(parameters, norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"clip_gradients: the norm of the gradients is {float(norm)}, so they cannot be clipped")
    coefficient = float(max_norm) / (float(norm) + 1e-6)
    gradients = [gradient for p in parameters if (gradient := _gradient(p)) is not None]
    if gradients and not coefficient >= 1.0:
        torch._foreach_mul_(gradients, coefficient)
    return norm


def _gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    return getattr(parameter, "main_grad", None) if parameter.grad is None else parameter.grad.detach()


def _is_counted(parameter: nn.Parameter) -> bool:
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)


def _norm(gradients: list[torch.Tensor], norm_type: float) -> float:
    """The norm of the gradients together, in float64."""
    if not gradients:
        return 0.0
    norms = torch.stack(list(torch._foreach_norm(gradients, norm_type, dtype=torch.float64)))
    return float(torch.linalg.vector_norm(norms, norm_type))


def _maximum_over_ranks(own: float) -> torch.Tensor:
    """(2, places + 1) float64: the largest norm of each place and the largest negative one; in the last column, whether
    any norm is NaN, for which a maximum is not defined."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    places = tp_size * parallel_state.get_pipeline_model_parallel_world_size()
    place = parallel_state.get_pipeline_model_parallel_rank() * tp_size
    place += parallel_state.get_tensor_model_parallel_rank()
    table = torch.full((2, places + 1), -math.inf, dtype=torch.float64)
    finite = 0.0 if math.isnan(own) else own
    table[:, place] = torch.tensor([finite, -finite], dtype=torch.float64)
    table[:, -1] = float(math.isnan(own))
    table = table.to(collective_device())
    torch.distributed.all_reduce(table, op=torch.distributed.ReduceOp.MAX)
    return table.cpu()
