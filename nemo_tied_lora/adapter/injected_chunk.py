# SPDX-License-Identifier: Apache-2.0
"""One model chunk and its factors: attaches them to the base, and restores the base exactly.

Every change of the model is a step that first records how to undo it. So a chunk whose attachment fails in the middle can
be restored like one that is attached.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from torch import nn

from nemo_tied_lora.adapter.grad_allreduce import add_zero_gradients
from nemo_tied_lora.adapter.tied_factors import ChunkFactors
from nemo_tied_lora.adapter.tied_linear import LinearAdapter, attach_to_linear, detach_from_linear

if TYPE_CHECKING:
    from nemo_tied_lora.adapter.target_modules import AdaptableLinear

__all__ = ["Chunk"]

_FLAG = "has_cond_embedder"
_MISSING = object()


@dataclass
class Chunk:
    """One model chunk with its factors.

    outer: the module that the caller passed. body: the GPTModel in it. adapters: of each linear's module.
    originals: the weights of the base that `Adapter.merge` has replaced. versions: torch's counters of changes in place
    of the merged weights, just after the merge. before_training: called before each forward pass that trains.
    """

    outer: nn.Module
    body: Any
    factors: ChunkFactors
    linears: tuple[AdaptableLinear, ...]
    adapters: dict[nn.Module, LinearAdapter]
    originals: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    versions: dict[nn.Module, int] = field(default_factory=dict)
    before_training: Callable[[], None] | None = None
    _undo: ExitStack = field(default_factory=ExitStack)

    @property
    def attached(self) -> bool:
        """Whether the model has these factors now."""
        return self.body.decoder._modules.get("tied_lora") is self.factors

    def attach(self) -> None:
        """Freezes the base and adds the factors to it. Copies no tensor. After a failure, call `detach`."""
        self._freeze_base()
        self._undo.callback(self.body.decoder._modules.pop, "tied_lora", None)
        self.body.decoder.tied_lora = self.factors
        for module, adapter in self.adapters.items():
            self._undo.callback(detach_from_linear, module)
            attach_to_linear(module, adapter)
        self._set_flag()
        self._add_hooks()

    def detach(self) -> None:
        """Restores the base and keeps the factors for `attach`. Copies no tensor."""
        self._undo.close()

    def _freeze_base(self) -> None:
        trained = {name: parameter.requires_grad for name, parameter in self.outer.named_parameters()}
        self._undo.callback(self._unfreeze_base, trained)
        self.outer.requires_grad_(False)

    def _unfreeze_base(self, trained: dict[str, bool]) -> None:
        for name, parameter in self.outer.named_parameters():
            parameter.requires_grad_(trained.get(name, False))

    def _set_flag(self) -> None:
        """Makes Megatron's `finalize_model_grads` sum tied gradients.

        Sets `has_cond_embedder` on the config object itself, not on a copy. The caller may give this object to
        Megatron's DDP, and `finalize_model_grads` reads it from there; without the flag, tied gradients are silently
        wrong. The flag affects only parameters marked `pipeline_parallel`. Chunks may share a config: they are detached
        in reverse order, and the first one has the old value.
        """
        config = self.body.config
        self._undo.callback(_restore_attribute, config, _FLAG, vars(config).get(_FLAG, _MISSING))
        setattr(config, _FLAG, True)

    def _add_hooks(self) -> None:
        """Lets gradients reach adapters behind a frozen, recomputed base, and keeps DDP's gathers and sums right."""
        body, undo = self.body, self._undo
        undo.callback(body.decoder.register_forward_pre_hook(self._before_forward).remove)
        pipelined = parallel_state.get_pipeline_model_parallel_world_size() > 1
        # A checkpointed region gives no gradients unless an input requires one. And the pipeline's backward needs an
        # output that requires one, even if the stage has no linear of the adapter.
        needed = getattr(body.config, "recompute_granularity", None) or (pipelined and not self.linears)
        embedding = getattr(body, "embedding", None)
        if needed and embedding is not None:
            undo.callback(embedding.register_forward_hook(_require_grad).remove)
        # With overlap_grad_reduce, Megatron's DDP starts a sum when backward has reached all its parameters.
        if unused := self._tied_without_a_linear():
            undo.callback(
                body.decoder.register_forward_hook(lambda *call: add_zero_gradients(call[-1], unused)).remove
            )

    def _before_forward(self, decoder: nn.Module, _: Any) -> None:
        self.factors()
        if self.before_training is not None and decoder.training and torch.is_grad_enabled():
            self.before_training()

    def _tied_without_a_linear(self) -> list[nn.Parameter]:
        """The trained tied tensors that no linear of this chunk uses. The chunk holds them for the sums over stages."""
        used = {p for linear in self.linears for p in self.factors.tied(linear.name).parameters()}
        return [p for p in self.factors.tied_parameters() if p not in used]


def _restore_attribute(owner: Any, name: str, value: object) -> None:
    if value is _MISSING:
        vars(owner).pop(name, None)
    else:
        setattr(owner, name, value)


def _require_grad(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output
