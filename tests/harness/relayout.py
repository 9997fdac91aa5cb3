# SPDX-License-Identifier: Apache-2.0
"""Changes the parallel layout of running ranks, because starting ranks takes longer than most tests."""

from __future__ import annotations

import gc

import torch
from megatron.core import parallel_state, tensor_parallel

__all__ = ["forget_layout", "relayout"]


def forget_layout() -> None:
    """Destroys Megatron's groups and their process groups: each gloo group has a thread that wakes 100 times per second.

    All ranks call it. None destroys a group while another one still receives, which would read "Connection reset by peer".
    """
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    default = torch.distributed.group.WORLD
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not default:
            torch.distributed.destroy_process_group(group)
    del group
    gc.collect()  # the models of the old layout, whose cycles keep groups alive


def relayout(*, tp: int = 1, pp: int = 1, vp: int | None = None, cp: int = 1) -> None:
    """Replaces Megatron's groups by those of another layout. Models of the old layout cannot be used any more.

    The data parallel size is the number of ranks divided by the other sizes. Each rank has another seed: nothing may
    depend on ranks drawing the same numbers.
    """
    forget_layout()
    for name in vars(parallel_state):
        if name.endswith("_GLOBAL_RANKS"):  # left over: a rank could believe that it has embeddings
            setattr(parallel_state, name, None)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        context_parallel_size=cp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(300 + 17 * torch.distributed.get_rank())
