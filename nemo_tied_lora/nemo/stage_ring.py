# SPDX-License-Identifier: Apache-2.0
"""The exchange of tensors around the ring of pipeline stages: each stage sends to the next, the last to the first."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

__all__ = ["StageRing"]


class StageRing:
    """This rank's place in the ring. All stages call `exchange` together.

    An exchange sends and receives at once, so that no stage waits for one that waits for it, over gloo and over NCCL.
    """

    def __init__(self) -> None:
        self.size: int = parallel_state.get_pipeline_model_parallel_world_size()
        self.stage: int = parallel_state.get_pipeline_model_parallel_rank()
        self._group = parallel_state.get_pipeline_model_parallel_group()

    def exchange(self, sent: torch.Tensor | None, received: torch.Tensor | None) -> torch.Tensor | None:
        """Sends `sent` to the next stage and fills `received` from the previous one; None: nothing. Returns `received`."""
        operations = []
        if sent is not None:
            to = parallel_state.get_pipeline_model_parallel_next_rank()
            operations.append(torch.distributed.P2POp(torch.distributed.isend, sent.contiguous(), to, self._group))
        if received is not None:
            source = parallel_state.get_pipeline_model_parallel_prev_rank()
            operations.append(torch.distributed.P2POp(torch.distributed.irecv, received, source, self._group))
        for request in torch.distributed.batch_isend_irecv(operations) if operations else ():
            request.wait()
        return received

    def from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fills `tensor` on all stages with the last stage's."""
        if self.size > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(tensor, src=last, group=self._group)
        return tensor
