# SPDX-License-Identifier: Apache-2.0
"""Another parallel layout inside ranks that run already: starting them costs more than most tests."""

from __future__ import annotations

from megatron.core import parallel_state, tensor_parallel

__all__ = ["relayout"]


def relayout(*, tp: int = 1, pp: int = 1) -> None:
    """Drops Megatron's groups and makes those of another layout; models of the old one are useless then."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    tensor_parallel.model_parallel_cuda_manual_seed(300 + 17 * parallel_state.get_pipeline_model_parallel_rank())
