# SPDX-License-Identifier: Apache-2.0
"""One check per flag that Megatron reads from an adapter's parameters, and how to switch each flag off.

Runs on the ranks of tests/adapter/test_flag_controls.py. A check returns the names of wrong tensors: none if all flags are
as `inject` sets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core import utils as megatron_utils
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel import layers as megatron_layers
from torch import nn

from nemo_tied_lora import TiedLoraConfig, inject
from nemo_tied_lora.adapter.factor_names import FactorName, expected_shapes
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.platform.no_gpu_torch import stand_in
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt, full_tensor

__all__ = [
    "CHECKS",
    "Off",
    "Trained",
    "fused_gradients",
    "nothing",
    "replica_id",
    "train",
    "without",
    "without_config",
]

ROWS, MICROBATCHES = 4, 2
Off = Callable[[Adapter], Any]
"""Switches something off in an adapter that was just injected."""
Trained = dict[str, Any]
"""norm: of the gradients; changes: tensor name to what the step added to the whole tensor."""


def nothing(adapter: Adapter) -> None:
    """Leaves all flags as `inject` sets them."""


def without(flag: str) -> Off:
    """Removes the flag from all parameters."""

    def off(adapter: Adapter) -> None:
        for parameter in (p for chunk in adapter.chunks for p in chunk.factors.parameters()):
            parameter.__dict__.pop(flag, None)

    return off


def without_config(flag: str) -> Off:
    """Removes the flag from the model's config."""

    def off(adapter: Adapter) -> None:
        for chunk in adapter.chunks:
            setattr(chunk.body.config, flag, False)

    return off


def train(off: Off, **model: Any) -> Trained:
    """One step of Megatron's own loop: its DDP, `finalize_model_grads`, distributed optimizer.

    Each data-parallel rank gets a part of the rows. Adam's epsilon is 1 and the gradients are much smaller, so a step is
    as large as the gradient.
    """
    body = build_gpt(dtype=torch.float32, **model)
    adapter = adapted(body)
    off(adapter)
    start = adapter.full_state()
    distributed = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(body.config, distributed, body)
    settings = {"optimizer": "adam", "lr": 1.0, "adam_eps": 1.0, "weight_decay": 0.0, "clip_grad": 1e9}
    optimizer = get_megatron_optimizer(OptimizerConfig(**settings, use_distributed_optimizer=True), [wrapped])
    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(),
        model=wrapped,
        num_microbatches=MICROBATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=ROWS // parallel_state.get_data_parallel_world_size(),
        forward_only=False,
    )
    finalize_model_grads([wrapped])
    norm = float(optimizer.step()[1])
    return {"norm": norm, "changes": {name: tensor - start[name] for name, tensor in adapter.full_state().items()}}


def adapted(body: nn.Module) -> Adapter:
    """An adapter with random values in every factor."""
    adapter = inject(body, TiedLoraConfig.preset("tl6", rank=3))
    adapter.load_full_state({name: whole(name, shape) for name, shape in shapes(adapter).items()})
    return adapter


def shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return expected_shapes(adapter.config, adapter.shapes)


def whole(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return full_tensor(f"start {name}", shape)


def batches() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for _ in range(MICROBATCHES):
        yield torch.randint(0, VOCAB, (ROWS, SEQUENCE + 1), generator=generator).chunk(size)[rank]


def forward_step(data: Any, model: nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens = next(data)
    positions = torch.arange(SEQUENCE).expand(len(tokens), SEQUENCE)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return model(tokens[:, :-1], positions, mask), partial(loss, tokens[:, 1:])


def loss(labels: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, dict]:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        logits = gather_from_tensor_model_parallel_region(logits)
    return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1)), {}


def saved_more_or_less_than_once(off: Off) -> list[str]:
    """dist_checkpointing's own check of which rank writes what, before anything is written. Only rank 0 reports."""
    adapter = adapted(build_gpt(dtype=torch.float32, llama=True, groups=2))
    with off(adapter) or nullcontext():
        state = adapter.chunks[0].factors.sharded_state_dict("decoder.tied_lora.")
    apply_factories(state)
    try:
        validate_sharding_integrity(determine_global_metadata(state)[1])
    except CheckpointingException as error:
        return [str(error).split(" for ")[0].split("Errors: ")[-1]]  # 0.19 lists the errors of all tensors
    return []


def replica_id(place: int) -> Off:
    """Makes every rank and chunk claim to be the first in one place of `replica_id`: (chunk, tensor, data parallel)."""

    @contextmanager
    def off(adapter: Adapter) -> Iterator[None]:
        names = ("make_sharded_tensor_for_checkpoint", "make_tp_sharded_tensor_for_checkpoint")
        originals = {name: getattr(megatron_utils, name) for name in names}

        def claimed(make: Callable[..., Any], *args: Any, replica_id: tuple[int, ...], **kwargs: Any) -> Any:
            ids = tuple(0 if index == place else value for index, value in enumerate(replica_id))
            return make(*args, replica_id=ids, **kwargs)

        for name, original in originals.items():
            setattr(megatron_utils, name, partial(claimed, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(megatron_utils, name, original)

    return off


def parts_by_megatrons_rule(off: Off) -> list[str]:
    """Megatron's own code cuts each sharded factor out of the whole tensor; it knows only the parameter's flags."""
    adapter = adapted(build_gpt(dtype=torch.float32, llama=True, groups=2))
    off(adapter)
    wrong = []
    for name, parameter in adapter.named_parameters():
        parsed = FactorName.parse(name)
        shape = adapter.shapes[parsed.group].factor_shape(parsed.factor, 3)
        if getattr(parameter, "tensor_model_parallel", False) and not matches(name, parameter, shape):
            wrong.append(name)
    return wrong


def matches(name: str, parameter: nn.Parameter, shape: tuple[int, ...]) -> bool:
    rows, columns = (*shape, 1)[:2]
    dim, stride = getattr(parameter, "partition_dim", 0), getattr(parameter, "partition_stride", 1)
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    part = torch.zeros(parameter.shape[0], *parameter.shape[1:] or (1,))
    try:
        megatron_layers._initialize_affine_weight_cpu(
            part,
            rows,
            columns,
            (rows, columns)[dim] // tp_size,
            partition_dim=dim,
            init_method=lambda tensor: tensor.copy_(whole(name, shape).view(rows, columns)),
            stride=stride,
            skip_set_tensor_parallel_attributes=True,
        )
    except RuntimeError:  # the part has another shape
        return False
    return torch.equal(part.view(parameter.shape), parameter.data)


def fused_gradients(off: Off) -> list[str]:
    """Uses a tied factor twice, once through Megatron's fused weight-gradient path, with Megatron's DDP around the model.

    The kernel needs a GPU; its stand-in adds to `main_grad` like the kernel. Memory that was never written holds NaN.
    """
    body = build_gpt(dtype=torch.float32, num_layers=1)
    adapter = adapted(body)
    off(adapter)
    DistributedDataParallel(body.config, DistributedDataParallelConfig(), body)
    A: Any = adapter.chunks[0].factors.get_parameter("linear_qkv.A")
    x = full_tensor("x", (5, A.shape[1])).float()
    original = megatron_layers.torch
    unwritten = stand_in(original, empty=lambda *args, **kwargs: original.full(*args, float("nan"), **_cpu(kwargs)))
    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=lambda x, grad, main_grad: main_grad.add_(grad.t() @ x))
    before = getattr(megatron_layers, "fused_weight_gradient_mlp_cuda", None)
    megatron_layers.torch, megatron_layers.fused_weight_gradient_mlp_cuda = unwritten, kernels
    try:
        fused = megatron_layers.linear_with_grad_accumulation_and_async_allreduce(
            x, A, None, gradient_accumulation_fusion=True, allreduce_dgrad=False, sequence_parallel=False
        )
        (fused.sum() + nn.functional.linear(x, A).sum()).backward()
    finally:
        megatron_layers.torch, megatron_layers.fused_weight_gradient_mlp_cuda = original, before
    expected = 2 * x.sum(dim=0).expand_as(A)
    return [] if torch.allclose(A.main_grad, expected, rtol=1e-5) else ["linear_qkv.A"]


def _cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": "cpu"}


# Four layers, one on the first of two stages: the stages hold buckets of different sizes.
CHECKS: dict[str, tuple[dict[str, int], Callable[[Off], Any]]] = {
    "training, two unequal stages": ({"pp": 2}, partial(train, num_layers_in_first_pipeline_stage=1)),
    "training, sequence parallel": ({"tp": 2}, partial(train, sequence_parallel=True)),
    "checkpoint, two stages": ({"pp": 2}, saved_more_or_less_than_once),
    "checkpoint, tensor parallel": ({"tp": 2}, saved_more_or_less_than_once),
    "Megatron's partition": ({"tp": 2}, parts_by_megatrons_rule),
}
"""Name to the layout and the check; data parallelism takes what is left of the ranks."""
