# SPDX-License-Identifier: Apache-2.0
"""The adapter that `inject` returns: parameters, gradient sums, whole state, merging, detaching and removal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from torch import nn

from nemo_tied_lora.adapter import full_state
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.grad_allreduce import (
    add_zero_gradients,
    reduce_over_pipeline,
    reduce_over_tensor_parallel,
)
from nemo_tied_lora.adapter.param_count import parameter_counts
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.tied_factors import ChunkFactors, own_frozen
from nemo_tied_lora.adapter.tied_linear import LinearAdapter, attach_to_linear, detach_from_linear
from nemo_tied_lora.config import TiedLoraConfig

if TYPE_CHECKING:
    from nemo_tied_lora.adapter.target_modules import AdaptableLinear

__all__ = ["Adapter", "Chunk"]


@dataclass
class Chunk:
    """One model chunk with its factors, and what is needed to restore the base."""

    outer: nn.Module
    body: Any
    factors: ChunkFactors
    linears: tuple[AdaptableLinear, ...]
    was_trained: frozenset[str]
    had_cond_embedder: bool | None = None
    hooks: list[Any] = field(default_factory=list)
    originals: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    detached: dict[nn.Module, LinearAdapter] | None = None

    def detach(self) -> None:
        """Restores the base and keeps the factors for `attach`. Copies no tensor."""
        adapters = {linear.module: linear.module.tied_lora for linear in self.linears}
        self.restore_base()
        self.detached = adapters

    def attach(self) -> None:
        """Undoes `detach`, and freezes all parameters that the base trains now."""
        assert self.detached is not None
        self.was_trained = frozenset(name for name, p in self.outer.named_parameters() if p.requires_grad)
        self.outer.requires_grad_(False)
        self.body.decoder.tied_lora = self.factors
        for module, adapter in self.detached.items():
            attach_to_linear(module, adapter)
        self.detached = None
        self.prepare_base()

    def prepare_base(self) -> None:
        """Makes Megatron sum tied gradients, and lets gradients reach adapters behind a frozen, recomputed base.

        Sets `has_cond_embedder` on the config object itself, not on a copy. The caller may give this object to
        Megatron's DDP, and `finalize_model_grads` reads it from there; without the flag, tied gradients are silently
        wrong. The flag affects only parameters marked `pipeline_parallel`.
        """
        config = self.body.config
        self.had_cond_embedder = getattr(config, "has_cond_embedder", None)
        config.has_cond_embedder = True
        self.hooks.append(self.body.decoder.register_forward_pre_hook(lambda *_: self.factors()))
        pipelined = parallel_state.get_pipeline_model_parallel_world_size() > 1
        # A checkpointed region gives no gradients unless an input requires one. And the pipeline's backward needs an
        # output that requires one, even if the stage has no linear of the adapter.
        needed = getattr(config, "recompute_granularity", None) or (pipelined and not self.linears)
        embedding = getattr(self.body, "embedding", None)
        if needed and embedding is not None:
            self.hooks.append(embedding.register_forward_hook(_require_grad))
        # With overlap_grad_reduce, Megatron's DDP starts a sum when backward has reached all its parameters.
        if unused := self._tied_without_a_linear():
            self.hooks.append(
                self.body.decoder.register_forward_hook(lambda *call: add_zero_gradients(call[-1], unused))
            )

    def _tied_without_a_linear(self) -> list[nn.Parameter]:
        """The trained tied tensors that no linear of this chunk uses. The chunk holds them for the sums over stages."""
        used = {p for linear in self.linears for p in self.factors.tied(linear.name).parameters()}
        return [p for p in self.factors.tied_parameters() if p not in used]

    def restore_base(self) -> None:
        """Restores the linears' classes, removes the factors, and unfreezes what was trained before."""
        for linear in self.linears:
            detach_from_linear(linear.module)
        del self.body.decoder.tied_lora
        if self.had_cond_embedder is None:
            del self.body.config.has_cond_embedder
        else:
            self.body.config.has_cond_embedder = self.had_cond_embedder
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for name, parameter in self.outer.named_parameters():
            parameter.requires_grad_(name in self.was_trained)


class Adapter:
    """A Tied-LoRA adapter on a model, made by `inject`.

    Args:
        config: its configuration.
        shapes: group to whole shape and selected layers, the same on every rank.
        chunks: this stage's chunks.
    """

    def __init__(self, config: TiedLoraConfig, shapes: Mapping[str, LinearShape], chunks: Sequence[Chunk]):
        self.config = config
        self.shapes = dict(shapes)
        self.chunks = list(chunks)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of this rank, each once."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, parameter) of the trainable ones, as "layers.7.linear_qkv.u"; tied ones once per chunk."""
        for chunk in self.chunks:
            for name, parameter in chunk.factors.named_parameters():
                if parameter.requires_grad:
                    yield name, parameter

    def num_parameters(self) -> dict[str, int]:
        """Trained parameters of the whole model per group, by the paper's formula."""
        return parameter_counts(self.shapes, self.config)

    def reduce_gradients(self, grad_attr: str | None = None, *, tensor_parallel: bool = True) -> None:
        """Does the sums of gradients that a training loop does not do itself (see `grad_allreduce`).

        All ranks must call it, once after backward. With Megatron's DDP and `finalize_model_grads` it does nothing:
        the gradients are in `main_grad` and are already summed.

        Args:
            grad_attr: the attribute that holds the gradients. None: `grad`, and nothing is done if `main_grad` exists.
                "main_grad": for loops that use it without `finalize_model_grads` (NeMo's O2).
            tensor_parallel: False if the loop itself sums parameters marked `sequence_parallel` (NeMo's does).
        """
        if grad_attr is None:
            if any(hasattr(parameter, "main_grad") for parameter in self.parameters()):
                return
            grad_attr = "grad"
        reduce_over_pipeline([chunk.factors for chunk in self.chunks], grad_attr)
        if tensor_parallel:
            reduce_over_tensor_parallel(self.parameters(), grad_attr)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Returns every stored tensor, whole, on the CPU of every rank; tied ones once. All ranks must call it.

        "linear_qkv.A" (r, in), "linear_qkv.B" (out, r), "layers.7.linear_qkv.u" (r,), "layers.7.linear_qkv.v" (out,).
        """
        for chunk in self.chunks:
            chunk.factors()
        device = next(self.chunks[0].body.parameters()).device
        return full_state.gather(self.config, self.shapes, [chunk.factors for chunk in self.chunks], device)

    def load_full_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Loads what `full_state` returned, on any layout.

        Raises:
            ValueError: lists every missing, unexpected, misshapen or non-finite tensor. Nothing is changed then.
        """
        full_state.check_state(state, expected_shapes(self.config, self.shapes))
        for chunk in self.chunks:
            own_frozen(chunk.factors)
        full_state.load(self.config, self.shapes, [chunk.factors for chunk in self.chunks], state)

    def merge(self) -> None:
        """W += (alpha / r) diag(v) B diag(u) A, in float32, then cast. Each rank merges its own shard; nothing is sent.

        Raises:
            RuntimeError: the adapter is already merged, or detached.
            ValueError: a merged weight would not be finite. Nothing is changed then.
        """
        if not self.attached:
            raise RuntimeError("merge: the adapter is not attached to the model; call attach() first")
        if any(chunk.originals for chunk in self.chunks):
            raise RuntimeError("merge: the adapter is merged already; call unmerge() first")
        merged = [
            (chunk, linear.module, _merged_weight(linear.module)) for chunk in self.chunks for linear in chunk.linears
        ]
        for chunk, module, weight in merged:
            chunk.originals[module] = module.weight.data
            module.weight.data = weight
            module.tied_lora.enabled = False

    def unmerge(self) -> None:
        """Restores the base's own weights, bit for bit, and enables the adapter again."""
        for chunk in self.chunks:
            for module, weight in chunk.originals.items():
                module.weight.data = weight
                module.tied_lora.enabled = True  # type: ignore[union-attr]
            chunk.originals.clear()

    @property
    def attached(self) -> bool:
        """Whether the model has this adapter now: False after `detach` or `remove`."""
        return any(chunk.detached is None for chunk in self.chunks)

    def detach(self) -> None:
        """Restores the base model and keeps the adapter for `attach`. Copies and moves no tensor.

        Raises:
            RuntimeError: the adapter is merged.
        """
        if any(chunk.originals for chunk in self.chunks):
            raise RuntimeError("detach: the adapter is merged; call unmerge() first")
        if self.attached:
            for chunk in reversed(self.chunks):  # chunks may share a config; the first one has its old value
                chunk.detach()

    def attach(self) -> None:
        """Puts a detached adapter back on the model, and freezes the base.

        Raises:
            RuntimeError: the adapter was removed, or the model has another adapter.
        """
        if not self.chunks:
            raise RuntimeError("attach: the adapter was removed; inject or load it again")
        if self.attached:
            return
        if any(hasattr(chunk.body.decoder, "tied_lora") for chunk in self.chunks):
            raise RuntimeError("attach: the model has another Tied-LoRA adapter; call its detach() or remove() first")
        for chunk in self.chunks:
            chunk.attach()

    def remove(self) -> None:
        """Restores the base model. A merged adapter stays in the weights."""
        for chunk in reversed(self.chunks):  # chunks may share a config; the first one has its old value
            chunk.originals.clear()
            if chunk.detached is None:
                chunk.restore_base()
        self.chunks = []


def _require_grad(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def _merged_weight(module: nn.Module) -> torch.Tensor:
    adapter: LinearAdapter = module.tied_lora  # type: ignore[assignment]
    weight: torch.Tensor = module.weight.data  # type: ignore[assignment]
    with torch.no_grad():
        A, h_scale, B = adapter.folded(torch.promote_types(weight.dtype, torch.float32))
        A = A if h_scale is None else A * h_scale.unsqueeze(1)
        merged = (weight.to(A.dtype) + B @ A).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError("merge: a merged weight is not finite; the base or the adapter holds NaN or infinity")
    return merged
