# SPDX-License-Identifier: Apache-2.0
"""Training loops with the same Adam: our own, and megatron-core's DDP with its optimizers.

A step calls `start`, then forward and backward over the microbatches, `finish` (all sums of gradients), `gradients`, and
`clip_and_step`, which returns the norm before clipping. `close` ends the loop.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from torch import nn

from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.planning.settings.training_loop_checks import check_ddp
from tests.parity.runs import Run

__all__ = ["Loop", "MegatronLoop", "PlainLoop", "make_loop"]

# eps is as large as the gradients: a smaller one would magnify the rounding of small gradients.
LEARNING_RATE, EPS, BETAS = 1e-2, 1e-3, (0.9, 0.99)
MULTIPLIERS = {"A": 0.5, "u": 2.0, "v": 0.25}
"""Of the learning rate; that of B is 1."""
# Below every run's norm. So each step is clipped, and a wrong norm causes wrong steps.
MAX_NORM = 0.1


class Loop(Protocol):
    """The calls that `train` makes in a step."""

    models: list[nn.Module]

    def start(self) -> None: ...
    def finish(self) -> None: ...
    def gradients(self) -> dict[nn.Parameter, torch.Tensor]: ...
    def clip_and_step(self) -> float: ...
    def close(self) -> None: ...


def make_loop(run: Run, chunks: list[nn.Module], adapter: Adapter) -> Loop:
    """Makes the run's loop for an adapted model."""
    if run.loop == "plain":
        return PlainLoop(run, chunks, adapter)
    return MegatronLoop(run, chunks, adapter)


class PlainLoop:
    """Sums gradients in `grad` with `reduce_gradients`, and takes the mean over data-parallel ranks itself."""

    def __init__(self, run: Run, chunks: list[nn.Module], adapter: Adapter):
        self.models, self._adapter, self._fault = chunks, adapter, run.fault
        self._parameters = list(adapter.parameters())
        groups = adapter.parameter_groups(LEARNING_RATE, MULTIPLIERS)
        self._optimizer = torch.optim.Adam(groups, eps=EPS, betas=BETAS)
        adapter.follow_optimizer(self._optimizer, run.steps)

    def start(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def finish(self) -> None:
        for _ in range({"no sum": 0, "summed twice": 2}.get(self._fault or "", 1)):
            self._adapter.reduce_gradients()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for parameter in self._parameters:
            torch.distributed.all_reduce(parameter.grad, group=group)
            parameter.grad /= group.size()

    def gradients(self) -> dict[nn.Parameter, torch.Tensor]:
        return {parameter: parameter.grad for parameter in self._parameters}

    def clip_and_step(self) -> float:
        norm = self._adapter.clip_gradients(MAX_NORM).item()
        for _ in range(2 if self._fault == "stepped twice" else 1):
            self._optimizer.step()
        return norm

    def close(self) -> None:
        pass


class MegatronLoop:
    """megatron-core's DDP, `finalize_model_grads` and optimizer, set up as in megatron-core's training script.

    megatron-core's `step` clips and steps, except in float64, for which it has no kernels. There this class computes
    the norm of the gradients that megatron-core's optimizer counts, over the group that it uses.
    """

    def __init__(self, run: Run, chunks: list[nn.Module], adapter: Adapter):
        distributed, overlap = "distributed" in run.loop, "overlap" in run.loop
        self._fault, self._exact, bfloat16 = run.fault, run.dtype == "float64", run.dtype == "bfloat16"
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=bfloat16,
            overlap_grad_reduce=overlap,
            use_distributed_optimizer=distributed,
            overlap_param_gather=distributed and overlap,
        )
        config = chunks[0].config
        check_ddp(config, ddp)
        self.models = [DistributedDataParallel(config, ddp, c, disable_bucketing=i > 0) for i, c in enumerate(chunks)]
        if overlap:
            _overlap(config, self.models, aligned="aligned" in run.loop)
        self._adapter, self._parameters, self._distributed = adapter, list(adapter.parameters()), distributed
        settings = _optimizer_config(ddp, bfloat16=bfloat16)
        self._optimizer = adapter.megatron_optimizer(settings, self.models, MULTIPLIERS)
        adapter.follow_optimizer(self._optimizer, run.steps)

    def start(self) -> None:
        for model in self.models:
            model.zero_grad_buffer()
        self._optimizer.zero_grad()

    def finish(self) -> None:
        finalize_model_grads(self.models)

    def gradients(self) -> dict[nn.Parameter, torch.Tensor]:
        if self._distributed:
            for model in self.models:
                _gather_gradients(model)
        return {parameter: parameter.main_grad for parameter in self._parameters}

    def clip_and_step(self) -> float:
        own = self._adapter.gradient_norm().item()  # from the same buffers
        norm = self._step_exactly() if self._exact else self._optimizer.step()[1]
        close = abs(own / norm - 1) < (1e-12 if self._exact else 1e-4)  # megatron-core's kernel sums in float32
        assert close or self._fault is not None, f"adapter.gradient_norm() is {own}, not {norm}"
        return norm

    def _step_exactly(self) -> float:
        assert not self._optimizer.prepare_grads()
        norm = 0.0
        for optimizer in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            norm = float64_norm(_counted(optimizer), optimizer.get_grad_stats_parallel_group())
            assert abs(optimizer.get_grad_norm() / norm - 1) < 1e-6  # megatron-core's kernel sums in float32
        clip([parameter.grad for parameter in self._parameters], norm)
        self._optimizer.step_with_ready_grads()
        return norm

    def close(self) -> None:
        """Removes DDP's hooks. They make cycles through autograd's nodes, which keep the model and each group's threads."""
        for model in self.models:
            model.grad_accs.clear()
            if model.remove_forward_pre_hook_handles:
                model.disable_forward_pre_hook(param_sync=False)


def _counted(optimizer: Any) -> list[torch.Tensor]:
    """The gradients that an optimizer of megatron-core counts in its norm. 0.19 has another name for the method."""
    names = ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm")
    return next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))()


def float64_norm(gradients: list[torch.Tensor], group: Any) -> float:
    """The norm of the gradients that all ranks of the group pass."""
    squares = [torch.zeros((), dtype=torch.float64), *(g.double().square().sum() for g in gradients)]
    total = torch.stack(squares).sum()
    torch.distributed.all_reduce(total, group=group)
    return total.sqrt().item()


def clip(gradients: list[torch.Tensor], norm: float) -> None:
    """Clips the gradients in place, as megatron-core does."""
    coefficient = MAX_NORM / (norm + 1e-6)
    if gradients and coefficient < 1.0:
        torch._foreach_mul_(gradients, coefficient)


def _optimizer_config(ddp: DistributedDataParallelConfig, *, bfloat16: bool) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        weight_decay=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        clip_grad=MAX_NORM,
        bf16=bfloat16,
        params_dtype=torch.bfloat16 if bfloat16 else torch.float32,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
    )


def _overlap(config: Any, models: list[Any], *, aligned: bool) -> None:
    """Sets up overlap. aligned: the schedule starts the sums of all stages together, not when gradients are complete."""
    several = len(models) > 1
    config.no_sync_func = [model.no_sync for model in models] if several else models[0].no_sync
    if aligned:
        config.grad_sync_func = [m.start_grad_sync for m in models] if several else models[0].start_grad_sync


def _gather_gradients(model: Any) -> None:
    """Gathers the sums of gradients, of which the distributed optimizer leaves each data-parallel rank only a part."""
    for buffer in model.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)
