# SPDX-License-Identifier: Apache-2.0
"""The device of a test: the CPU everywhere, and a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel

from nemo_tied_lora.platform import prepare
from tests.harness.ranks import single_process

__all__ = ["DEVICES"]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The device, with Megatron's groups on it."""
    name: str = request.param
    if name == "cpu":
        single_process()
        return name
    if not prepare().gpu:
        pytest.skip("needs a CUDA device")
    torch.cuda.set_device(0)
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    return name
