# SPDX-License-Identifier: Apache-2.0
"""One training run on whatever layout the rank finds itself in; the single-process run of it is the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from nemo_tied_lora import TiedLoraConfig, inject
from nemo_tied_lora.adapter import Adapter
from nemo_tied_lora.adapter_state import expected_shapes
from tests.tiny_gpt import SEQUENCE, VOCAB, build_gpt, full_tensor

__all__ = ["Run", "TrainingRecord", "train", "train_all"]

MICROBATCHES, MICRO_BATCH_SIZE = 2, 3


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained. `fault` plants an error: no_sum, sum_twice or stepped_twice."""

    config: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    fault: str | None = None


@dataclass
class TrainingRecord:
    """What a run did: losses (last stage), gradients and norms per step, the adapter after the last step."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    local_bits: dict[str, bytes] = field(default_factory=dict)


def train(run: Run) -> TrainingRecord:
    """Trains `run.steps` steps of Adam from factors that are random everywhere (a zero would hide errors)."""
    model = build_gpt(**run.model)
    adapter = inject(model, TiedLoraConfig.from_mapping(run.config))
    shapes = expected_shapes(adapter.config, adapter.specs)
    adapter.load_full_state({name: full_tensor(f"start {name}", shape) for name, shape in shapes.items()})
    parameters = list(adapter.parameters())
    optimizer: Any = torch.optim.Adam(parameters, lr=1e-2)
    if run.fault == "stepped_twice":
        optimizer = _SteppedTwice(optimizer)
    record = TrainingRecord()
    for step in range(run.steps):
        optimizer.zero_grad(set_to_none=True)
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=_batches(step),
            model=model,
            num_microbatches=MICROBATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH_SIZE,
            forward_only=False,
        )
        if run.fault != "no_sum":
            adapter.reduce_gradients()
        if run.fault == "sum_twice":
            adapter.reduce_gradients()
        record.losses.append(sum(loss["loss"] for loss in losses))
        record.gradients.append(_whole_gradients(adapter))
        record.norms.append(_norm(parameters))
        optimizer.step()
    record.state = adapter.full_state()
    record.local_bits = {
        n: p.detach().numpy().tobytes() for c in adapter.chunks for n, p in c.factors.named_parameters()
    }
    return record


def train_all(runs: dict[str, Run]) -> dict[str, TrainingRecord]:
    """Several runs one after the other."""
    return {name: train(run) for name, run in runs.items()}


class _SteppedTwice:
    """What happens when a tied parameter stands in the optimizer twice."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer, self.zero_grad = optimizer, optimizer.zero_grad

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.step()


def _batches(step: int) -> Any:
    generator = torch.Generator().manual_seed(7 + step)
    for _ in range(MICROBATCHES):
        yield torch.randint(0, VOCAB, (MICRO_BATCH_SIZE, SEQUENCE + 1), generator=generator)


def _forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH_SIZE, SEQUENCE)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return model(tokens[:, :-1], positions, mask), partial(_loss, tokens[:, 1:])


def _loss(labels: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross entropy in the logits' own precision: megatron-core's is float32."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        logits = gather_from_tensor_model_parallel_region(logits)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))
    return loss, {"loss": loss.item() / MICROBATCHES}


def _whole_gradients(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Every gradient, gathered as the parameters are."""
    parameters = list(adapter.parameters())
    values = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.grad.clone()
    gradients = {n: g for n, g in adapter.full_state().items() if n.rpartition(".")[2] in adapter.config.trained}
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    return gradients


def _norm(parameters: list[torch.nn.Parameter]) -> float:
    """The norm as Megatron counts it: shared parameters once, tensor-parallel replicas once."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    counted = [
        p.grad.double().square().sum()
        for p in parameters
        if not getattr(p, "shared", False) and (p.tensor_model_parallel or tp_rank == 0)
    ]
    total = torch.stack([torch.zeros((), dtype=torch.float64), *counted]).sum()
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return total.sqrt().item()
