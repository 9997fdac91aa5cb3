# SPDX-License-Identifier: Apache-2.0
"""An injected adapter: its parameters, the sums of its gradients, merging and removal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from torch import nn

from nemo_tied_lora.adapter import full_state
from nemo_tied_lora.adapter.grad_allreduce import reduce_over_pipeline, reduce_over_tensor_parallel, take_part
from nemo_tied_lora.adapter.param_count import parameter_counts
from nemo_tied_lora.adapter.shapes import TargetShape, TargetSpec
from nemo_tied_lora.adapter.tied_factors import ChunkFactors, own_frozen
from nemo_tied_lora.adapter.tied_linear import LinearAdapter, attach_to_linear, detach_from_linear
from nemo_tied_lora.config import TiedLoraConfig

if TYPE_CHECKING:
    from nemo_tied_lora.adapter.target_modules import AdaptableLinear

__all__ = ["Adapter", "Chunk"]


@dataclass
class Chunk:
    """One model chunk with its factors, and what is needed to give the base back as it was."""

    outer: nn.Module
    body: Any
    factors: ChunkFactors
    sites: tuple[AdaptableLinear, ...]
    was_trained: frozenset[str]
    had_cond_embedder: bool | None = None
    hooks: list[Any] = field(default_factory=list)
    originals: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    detached_links: dict[nn.Module, LinearAdapter] | None = None

    def detach(self) -> None:
        """The base as it was, with the factors kept for `attach`. No tensor is copied."""
        links = {site.module: site.module.tied_lora for site in self.sites}
        self.restore_base()
        self.detached_links = links

    def attach(self) -> None:
        """Undoes `detach`: swaps the classes in again, and freezes whatever the base trains by now."""
        assert self.detached_links is not None
        self.was_trained = frozenset(name for name, p in self.outer.named_parameters() if p.requires_grad)
        self.outer.requires_grad_(False)
        self.body.decoder.tied_lora = self.factors
        for module, link in self.detached_links.items():
            attach_to_linear(module, link)
        self.detached_links = None
        self.prepare_base()

    def prepare_base(self) -> None:
        """Makes Megatron sum what is tied, and lets gradients reach adapters behind a frozen, recomputed base.

        `has_cond_embedder` is set on the very config object that the caller may hand to Megatron's DDP, not on a
        copy: `finalize_model_grads` reads whichever object the wrapper was given, and without the flag the tied
        gradients are silently wrong. It acts on nothing but parameters marked `pipeline_parallel`.
        """
        config = self.body.config
        self.had_cond_embedder = getattr(config, "has_cond_embedder", None)
        config.has_cond_embedder = True
        self.hooks.append(self.body.decoder.register_forward_pre_hook(lambda *_: self.factors()))
        pipelined = parallel_state.get_pipeline_model_parallel_world_size() > 1
        # Checkpointed regions give no gradients unless an input requires one; a stage's output must require one
        # for the pipeline's backward, also where the stage has no linear of the adapter.
        needed = getattr(config, "recompute_granularity", None) or (pipelined and not self.sites)
        embedding = getattr(self.body, "embedding", None)
        if needed and embedding is not None:
            self.hooks.append(embedding.register_forward_hook(_require_grad))
        # With overlap_grad_reduce, Megatron's DDP starts a sum when the backward pass has reached all its parameters.
        if unused := self._tied_without_a_linear():
            self.hooks.append(self.body.decoder.register_forward_hook(lambda *call: take_part(call[-1], unused)))

    def _tied_without_a_linear(self) -> list[nn.Parameter]:
        """The trained tied tensors that no linear of this chunk uses; it holds them for the sums over stages."""
        used = {p for site in self.sites for p in self.factors.tied(site.target).parameters()}
        return [p for _, _, p in self.factors.named_tied() if p.requires_grad and p not in used]

    def restore_base(self) -> None:
        """Swaps the classes back, drops the factors, and thaws what was trained before."""
        for site in self.sites:
            detach_from_linear(site.module)
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
    """A Tied-LoRA adapter on a model; made by `inject`.

    Args:
        config: its configuration.
        specs: the whole shape and the layers of each target, the same on every rank.
        chunks: this stage's chunks.
    """

    def __init__(self, config: TiedLoraConfig, specs: Mapping[str, TargetSpec], chunks: Sequence[Chunk]):
        self.config = config
        self.specs = dict(specs)
        self.chunks = list(chunks)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of this rank, each once."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the trainable ones: "linear_qkv.A", "layers.7.linear_qkv.u", one copy a chunk."""
        for chunk in self.chunks:
            for name, parameter in chunk.factors.named_parameters():
                if parameter.requires_grad:
                    yield name, parameter

    def num_parameters(self) -> dict[str, int]:
        """Trained parameters per target (experts' for themselves) over the whole model, by the paper's formula."""
        shapes = {
            target: TargetShape(spec.in_features, spec.out_features, len(spec.layers), spec.num_experts)
            for target, spec in self.specs.items()
        }
        return parameter_counts(shapes, self.config)

    def reduce_gradients(self, grad_attr: str | None = None, *, tensor_parallel: bool = True) -> None:
        """Does every sum of gradients that a training loop leaves open (see `gradients`), once after backward.

        All ranks must call it. In a loop with Megatron's DDP and `finalize_model_grads` it does nothing: gradients
        are then in `main_grad`, and summed.

        Args:
            grad_attr: where the gradients are. None: in `grad`, and nothing is done where `main_grad` exists.
                "main_grad": there, for loops that use it without `finalize_model_grads` (NeMo's O2).
            tensor_parallel: False where the loop sums parameters marked `sequence_parallel` itself (NeMo's does).
        """
        if grad_attr is None:
            if any(hasattr(parameter, "main_grad") for parameter in self.parameters()):
                return
            grad_attr = "grad"
        reduce_over_pipeline([chunk.factors for chunk in self.chunks], grad_attr)
        if tensor_parallel:
            reduce_over_tensor_parallel(self.parameters(), grad_attr)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Every stored tensor, whole, on the CPU of every rank, tied ones once; all ranks must call it.

        "linear_qkv.A" (r, in), "linear_qkv.B" (out, r), "layers.7.linear_qkv.u" (r,), "layers.7.linear_qkv.v" (out,).
        """
        for chunk in self.chunks:
            chunk.factors()
        device = next(self.chunks[0].body.parameters()).device
        return full_state.gather(self.config, self.specs, [chunk.factors for chunk in self.chunks], device)

    def load_full_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Loads what `full_state` returned, on any layout.

        Raises:
            ValueError: lists every missing, unexpected or misshapen tensor and every NaN; nothing is changed then.
        """
        full_state.check_state(state, full_state.expected_shapes(self.config, self.specs))
        for chunk in self.chunks:
            own_frozen(chunk.factors)
        full_state.load(self.config, self.specs, [chunk.factors for chunk in self.chunks], state)

    def merge(self) -> None:
        """W += (alpha / r) diag(v) B diag(u) A, in float32, then cast; each rank its own shard, nothing is sent.

        Raises:
            RuntimeError: the adapter is merged already, or detached. ValueError: the merged weight would not be finite.
        """
        if not self.attached:
            raise RuntimeError("merge: the adapter is not attached to the model; call attach() first")
        if any(chunk.originals for chunk in self.chunks):
            raise RuntimeError("merge: the adapter is merged already; call unmerge() first")
        merged = [(chunk, site.module, _merged_weight(site.module)) for chunk in self.chunks for site in chunk.sites]
        for chunk, module, weight in merged:
            chunk.originals[module] = module.weight.data
            module.weight.data = weight
            module.tied_lora.enabled = False

    def unmerge(self) -> None:
        """The base's own weights again, bit for bit, with the adapter beside them."""
        for chunk in self.chunks:
            for module, weight in chunk.originals.items():
                module.weight.data = weight
                module.tied_lora.enabled = True  # type: ignore[union-attr]
            chunk.originals.clear()

    @property
    def attached(self) -> bool:
        """Whether the model has it: True from `inject` on, until `detach` or `remove`."""
        return any(chunk.detached_links is None for chunk in self.chunks)

    def detach(self) -> None:
        """Gives the base model back as it was, and keeps the adapter for `attach`. No tensor is copied or moved.

        Raises:
            RuntimeError: the adapter is merged.
        """
        if any(chunk.originals for chunk in self.chunks):
            raise RuntimeError("detach: the adapter is merged; call unmerge() first")
        if self.attached:
            for chunk in reversed(self.chunks):  # chunks may share a config: the first one knows how it was
                chunk.detach()

    def attach(self) -> None:
        """Puts a detached adapter back, and freezes the base.

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
        """Gives the base model back as it was. A merged adapter stays in the weights."""
        for chunk in reversed(self.chunks):  # chunks may share a config: the first one knows how it was
            chunk.originals.clear()
            if chunk.detached_links is None:
                chunk.restore_base()
        self.chunks = []


def _require_grad(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def _merged_weight(module: nn.Module) -> torch.Tensor:
    link: LinearAdapter = module.tied_lora  # type: ignore[assignment]
    weight: torch.Tensor = module.weight.data  # type: ignore[assignment]
    with torch.no_grad():
        A, h_scale, B = link.folded(torch.promote_types(weight.dtype, torch.float32))
        A = A if h_scale is None else A * h_scale.unsqueeze(1)
        merged = (weight.to(A.dtype) + B @ A).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError("merge: a merged weight is not finite; the base or the adapter holds NaN or infinity")
    return merged
