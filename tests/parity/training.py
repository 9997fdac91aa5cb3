# SPDX-License-Identifier: Apache-2.0
"""Trains one run on the current layout, and records it. The record of the single-process run is the oracle."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import nn

from nemo_tied_lora import TiedLoraConfig, inject, quantize_base
from nemo_tied_lora.adapter.factor_names import FactorName, expected_shapes
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.replica_check import check_ties
from nemo_tied_lora.adapter.sharding import unshard
from tests.harness.dequantized import make_plain, quantized_weights
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt, full_tensor
from tests.parity.context_parallel import GatheredAttention, own_positions
from tests.parity.loops import make_loop
from tests.parity.runs import Run

__all__ = ["Record", "build_chunks", "randomise", "train"]

MICRO_BATCH_SIZE = 2


@dataclass
class Record:
    """The record of a run on this rank. Lists have one item per step.

    losses: of the global batch; empty on stages without a loss.
    gradients: whole tensors, after all sums, before clipping.
    norms: the norms before clipping.
    masks: of a rank budget, by the name of each u; empty without one.
    state: the whole adapter after the last step.
    bits: a digest of every tensor that this rank holds, by (chunk, name).
    shapes: the shapes of these tensors.
    starts_as_base: whether the untrained adapter leaves the output unchanged; None on stages without an output.
    codes: the digest of the whole weight's codes, of each quantised linear of this stage.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    masks: list[dict[str, list[bool]]] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    bits: list[dict[tuple[int, str], str]] = field(default_factory=list)
    shapes: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    starts_as_base: bool | None = None
    codes: dict[str, str] = field(default_factory=dict)


def train(run: Run, *, sequence_parallel: bool = False) -> Record:
    """Trains `run.steps` steps of Adam. All factors start at random values, because a zero would hide errors."""
    chunks = build_chunks(run, sequence_parallel)
    record = Record()
    if run.base is not None:
        quantize_base(chunks, **run.base)
        if run.fault == "another code":
            _change_a_code(chunks[0])
        record.codes = _whole_codes(chunks)
        if run.plain:
            for chunk in chunks:
                make_plain(chunk)
    before = [] if run.plain else _outputs(chunks, run)
    adapter = inject(chunks, TiedLoraConfig.from_mapping(run.config))
    after = [] if run.plain else _outputs(chunks, run)
    if before:
        record.starts_as_base = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    randomise(adapter)
    if run.fault is not None and "=" in run.fault:
        flag, _, value = run.fault.partition("=")
        for parameter in adapter.parameters():
            setattr(parameter, flag, value == "True")
    loop = make_loop(run, chunks, adapter)
    if run.fault == "own products":
        _choose_by_own_products(adapter)
    for step in range(run.steps):
        loop.start()
        losses = _forward_backward(loop.models, run, step, forward_only=False)
        loop.finish()
        if losses:
            record.losses.append(_global_loss(losses) / run.microbatches)
        record.gradients.append(_whole_gradients(adapter, loop.gradients()))
        record.norms.append(loop.clip_and_step())
        if adapter.pruning is not None:
            record.masks.append({name: mask.tolist() for name, mask in adapter.pruning.masks().items()})
        if run.fault is None:
            check_ties(adapter, f"after step {step + 1}: ")
        record.bits.append(_digests(adapter))
    loop.close()
    record.state = adapter.full_state()
    record.shapes = {key: tuple(p.shape) for key, p in _local(adapter)}
    return record


def build_chunks(run: Run, sequence_parallel: bool = False) -> list[nn.Module]:
    """Builds this stage's chunks, filled with the base's fixed numbers."""
    options: dict[str, Any] = {"dtype": getattr(torch, run.dtype), **run.model}
    if sequence_parallel:
        options["sequence_parallel"] = True
    if (cp_size := parallel_state.get_context_parallel_world_size()) > 1:
        options |= {"context_parallel_size": cp_size, "core_attention": GatheredAttention}
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        options |= run.stages
    if run.recompute:
        options["recompute_granularity"] = run.recompute
    if run.recompute == "full":
        options |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    num_chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return [build_gpt(**options, vp_stage=stage) for stage in ([None] if num_chunks is None else range(num_chunks))]


def _choose_by_own_products(adapter: Adapter) -> None:
    def products() -> torch.Tensor:
        with mock.patch.object(torch.distributed, "all_reduce"):
            return summed()

    summed = adapter.pruning._summed_products
    adapter.pruning._checked = True  # else the owners of the entries would be missed
    adapter.pruning._summed_products = products  # type: ignore[method-assign]


def _change_a_code(chunk: nn.Module) -> None:
    _, _, weight = next(quantized_weights(chunk))
    weight.codes.packed.view(-1)[5] += 7


def _whole_codes(chunks: list[Any]) -> dict[str, str]:
    """Gathers the codes of each quantised weight of this stage over the tensor-parallel ranks."""
    own = {}
    for chunk in chunks:
        numbers = {f"layers.{i}.": f"layers.{layer.layer_number}." for i, layer in enumerate(chunk.decoder.layers)}
        for path, _, weight in quantized_weights(chunk):
            local = re.search(r"layers\.\d+\.", path)[0]
            blocks = 2 if "linear_fc1" in path and chunk.config.gated_linear_unit else 1
            codes = weight.codes.packed.view(weight.shape[0], -1)
            own[path.replace(local, numbers[local])] = (codes, weight.partition_dim, blocks)
    digests = {}
    shards = _gather(own, parallel_state.get_tensor_model_parallel_group())
    for name, (_, dim, blocks) in own.items():
        parts = [shard[name][0].chunk(blocks if dim == 0 else 1, dim) for shard in shards]
        whole = torch.cat([part for block in zip(*parts, strict=True) for part in block], dim)
        digests[name] = hashlib.sha256(whole.contiguous().numpy().tobytes()).hexdigest()
    return digests


def randomise(adapter: Adapter) -> None:
    """Sets all factors to random numbers, nowhere 0, which are the same on every layout."""
    shapes = expected_shapes(adapter.config, adapter.shapes)
    adapter.load_full_state({name: full_tensor(f"start {name}", shape) for name, shape in shapes.items()})


def _forward_backward(
    models: list[nn.Module], run: Run, step: int, *, forward_only: bool, collect: bool = False
) -> list:
    interleaved = len(models) > 1
    iterators = [_batches(run, step) for _ in models]
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=models if interleaved else models[0],
        num_microbatches=run.microbatches // parallel_state.get_data_parallel_world_size(),
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH_SIZE,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


def _outputs(models: list[nn.Module], run: Run) -> list[torch.Tensor]:
    """This rank's logits of the first batch; empty on stages without logits."""
    for model in models:
        model.eval()
    with torch.no_grad():
        outputs = _forward_backward(models, run, 0, forward_only=True, collect=True)
    for model in models:
        model.train()
    return outputs


def _batches(run: Run, step: int) -> Iterator[torch.Tensor]:
    """This data-parallel rank's microbatches of a step: every DP-th one."""
    generator = torch.Generator().manual_seed(7 + step)
    tokens = torch.randint(0, VOCAB, (run.microbatches, MICRO_BATCH_SIZE, SEQUENCE + 1), generator=generator)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return iter(tokens[rank::size])


def _forward_step(batches: Any, model: nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    all_positions, own = own_positions(SEQUENCE)
    mask = all_positions[None, :] > own[:, None]
    logits = model(tokens[:, own], own.expand(MICRO_BATCH_SIZE, -1), mask[None, None])
    return logits, partial(_loss, tokens[:, own + 1])


def _loss(labels: torch.Tensor, logits: torch.Tensor, non_loss_data: bool = False) -> Any:
    """This rank's share of the microbatch's mean cross entropy, in float32 or wider.

    megatron-core's own loss is always float32. Under context parallelism a rank has only a part of the sequence, so its
    share is a part of the mean. megatron-core's schedule and DDP compensate for it.
    """
    if non_loss_data:
        return logits.detach().clone()
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        logits = gather_from_tensor_model_parallel_region(logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = nn.functional.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))
    loss = loss / parallel_state.get_context_parallel_world_size()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place


def _global_loss(losses: list[dict[str, torch.Tensor]]) -> float:
    """The sum of the losses over all microbatches, data-parallel ranks and context-parallel ranks."""
    total = torch.stack([loss["loss"].double() for loss in losses]).sum()
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total.item()


def _whole_gradients(adapter: Adapter, gradients: dict[nn.Parameter, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gathers every trained tensor's whole gradient: shards over the tensor-parallel ranks, then layers over the stages.

    A gradient that this rank holds whole, or that its stage has, is the rank's own copy.
    """
    own: dict[str, torch.Tensor] = {}
    for name, parameter in adapter.named_parameters():
        gradient = gradients[parameter].detach().clone()
        assert torch.equal(own.setdefault(name, gradient), gradient), f"{name}: this stage's chunks differ"
    shards = _gather(own, parallel_state.get_tensor_model_parallel_group())
    whole = {}
    for name in own:
        parsed = FactorName.parse(name)
        shape = adapter.shapes[parsed.group]
        split = shape.sharded_dim(parsed.factor) is not None
        whole[name] = unshard([shard[name] for shard in shards], parsed.factor, shape) if split else own[name]
    stages = _gather(whole, parallel_state.get_pipeline_model_parallel_group())
    return {name: whole.get(name, tensor) for stage in stages for name, tensor in stage.items()}


def _gather(value: Any, group: Any) -> list[Any]:
    values = [value] * group.size()
    if group.size() > 1:
        torch.distributed.all_gather_object(values, value, group=group)
    return values


def _local(adapter: Adapter) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
    for index, chunk in enumerate(adapter.chunks):
        chunk.factors()
        for name, parameter in chunk.factors.named_parameters():
            yield (index, name), parameter.detach()


def _digests(adapter: Adapter) -> dict[tuple[int, str], str]:
    raw = {key: tensor.contiguous().view(torch.uint8).numpy().tobytes() for key, tensor in _local(adapter)}
    return {key: hashlib.sha256(data).hexdigest() for key, data in raw.items()}
