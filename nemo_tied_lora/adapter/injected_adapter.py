# SPDX-License-Identifier: Apache-2.0
"""The adapter that `inject` returns: parameters, gradient sums and norm, whole state, merging, detaching and removal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemo_tied_lora.adapter import full_state, grad_norm
from nemo_tied_lora.adapter.agreement import raise_together
from nemo_tied_lora.adapter.factor_names import each_linear, expected_shapes
from nemo_tied_lora.adapter.grad_allreduce import reduce_over_pipeline, reduce_over_tensor_parallel
from nemo_tied_lora.adapter.injected_chunk import Chunk
from nemo_tied_lora.adapter.lr_multipliers import factor_multipliers
from nemo_tied_lora.adapter.merged_weights import changed_since_merge, merged_weights, version_of
from nemo_tied_lora.adapter.param_count import parameter_counts
from nemo_tied_lora.adapter.rank_budget.pruning import RankPruning
from nemo_tied_lora.adapter.rate_groups import groups_by_multiplier, megatron_optimizer
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.tied_factors import own_frozen
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.platform.devices import collective_device

__all__ = ["Adapter"]


class Adapter:
    """A Tied-LoRA adapter on a model, made by `inject`.

    After `remove`, every method raises RuntimeError.

    Args:
        config: its configuration.
        shapes: group to whole shape and selected layers, the same on every rank.
        chunks: this stage's chunks.
    """

    def __init__(self, config: TiedLoraConfig, shapes: Mapping[str, LinearShape], chunks: Sequence[Chunk]):
        self.config = config
        self.shapes = dict(shapes)
        self._chunks: list[Chunk] | None = list(chunks)
        self._merged = False
        self.pruning: RankPruning | None = None
        """The rank budget; None without one."""
        if config.budget is not None:
            self.pruning = RankPruning(config, self.shapes, [chunk.factors for chunk in chunks])
            for chunk in chunks:
                chunk.before_training = self.pruning.check_followed

    @property
    def chunks(self) -> list[Chunk]:
        """This stage's chunks.

        Raises:
            RuntimeError: the adapter was removed.
        """
        return self._present("chunks")

    @property
    def device(self) -> torch.device:
        """The device of this rank's factors; of the base, then of collectives, if the rank has none."""
        held = ((*chunk.factors.parameters(), *chunk.body.parameters()) for chunk in self._present("device"))
        first = next(itertools.chain.from_iterable(held), None)
        return collective_device() if first is None else first.device

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of this rank, each once.

        A pipeline stage may have none: one without layers, if no tied factor is trained (presets lora and vera). torch's
        optimizers refuse an empty list of parameters, but not an empty group: `parameter_groups` works on every stage.
        """
        return (parameter for _, parameter in self._named(self._present("parameters")))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, parameter) of the trainable ones, as "layers.7.linear_qkv.u"; tied ones once per chunk."""
        return self._named(self._present("named_parameters"))

    def parameter_groups(self, lr: float, lr_multipliers: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        """Returns the trained parameters as groups for torch's optimizers, one for each learning rate.

        ``torch.optim.AdamW(adapter.parameter_groups(1e-3, {"B": 4}))``. The number of groups is the same on every rank;
        on a stage that trains none of their factors they are empty. torch's schedulers keep the ratios of the rates.

        Args:
            lr: the rate of a factor whose multiplier is 1.
            lr_multipliers: any of A, B, u, v to a multiplier; see `factor_multipliers`. A factor that is not trained has
                no effect.

        Returns:
            `{"params": [...], "lr": lr * m, "lr_mult": m}` for each multiplier m.

        Raises:
            ConfigError: a name is no factor, or a multiplier is not a finite number greater than 0.
        """
        self._present("parameter_groups")
        multipliers = factor_multipliers(self.config, lr_multipliers)
        groups = groups_by_multiplier(list(self.named_parameters()), multipliers)
        return [{**group, "lr": lr * group["lr_mult"]} for group in groups]

    def megatron_optimizer(
        self,
        config: Any,
        model_chunks: Sequence[nn.Module],
        lr_multipliers: Mapping[str, float] | None = None,
        **more: Any,
    ) -> Any:
        """Returns Megatron's optimizer, with a parameter group for each learning rate. All ranks must call it.

        `megatron.core.optimizer.get_megatron_optimizer` with the groups of `lr_multipliers`. Megatron's
        `OptimizerParamScheduler` scales what it sets: the largest and the smallest rate, and the warm-up from 0.

        Args:
            config: Megatron's `OptimizerConfig`; its `lr` is the rate of a factor whose multiplier is 1.
            model_chunks: the wrapped chunks, as for `get_megatron_optimizer`.
            lr_multipliers: as for `parameter_groups`.
            more: other arguments of `get_megatron_optimizer`.

        Raises:
            ConfigError: as `parameter_groups`.
        """
        self._present("megatron_optimizer")
        multipliers = factor_multipliers(self.config, lr_multipliers)
        return megatron_optimizer(list(self.named_parameters()), multipliers, config, model_chunks, **more)

    def num_parameters(self) -> dict[str, int]:
        """Trained parameters of the whole model per group, by the paper's formula."""
        self._present("num_parameters")
        return parameter_counts(self.shapes, self.config)

    def follow_optimizer(self, optimizer: Any, max_steps: int) -> None:
        """Lets the rank budget observe each step of the optimizer. Without a budget, does nothing.

        Call it once, on all ranks, after the optimizer is made. From then on, each step that the optimizer makes updates the
        importance of u's entries, and prunes when the schedule says so; a step that it skips does not count. Without this
        call, a forward pass that trains raises RuntimeError. A later call replaces the optimizer and keeps the rest.

        Args:
            optimizer: a torch optimizer of `parameters()`, or what megatron-core's `get_megatron_optimizer` returns.
            max_steps: the optimizer steps of the whole run. They decide the start_step and the final_step that the
                configuration leaves open, at the first call: a resumed run keeps its schedule.

        Raises:
            ConfigError: the run is too short for the budget, the optimizer does not hold u, or is of an unknown kind.
        """
        self._present("follow_optimizer")
        if self.pruning is not None:
            self.pruning.follow(optimizer, max_steps)

    def ranks(self) -> dict[str, int]:
        """The entries of u that each linear of the whole model has left, as {"layers.7.linear_qkv": 3}.

        The same on every rank. Without a rank budget, each linear has the configuration's rank.
        """
        self._present("ranks")
        if self.pruning is None:
            return {f"layers.{layer}.{name}": self.config.rank for layer, name, _ in each_linear(self.shapes)}
        return {name.removesuffix(".u"): int(mask.sum()) for name, mask in self.pruning.masks().items()}

    def reduce_gradients(self, grad_attr: str | None = None, *, tensor_parallel: bool = True) -> None:
        """Does the sums of gradients that a training loop does not do itself (see `grad_allreduce`).

        All ranks must call it, once after backward. With Megatron's DDP and `finalize_model_grads` it does nothing:
        the gradients are in `main_grad` and are already summed.

        Args:
            grad_attr: the attribute that holds the gradients. None: `grad`, and nothing is done if `main_grad` exists.
                "main_grad": for loops that use it without `finalize_model_grads` (NeMo's O2).
            tensor_parallel: False if the loop itself sums parameters marked `sequence_parallel` (NeMo's does).

        Raises:
            RuntimeError: the adapter is merged, so it gets no gradients.
        """
        chunks = self._unmerged("reduce_gradients")
        if grad_attr is None:
            if any(hasattr(parameter, "main_grad") for parameter in self.parameters()):
                return
            grad_attr = "grad"
        reduce_over_pipeline([chunk.factors for chunk in chunks], grad_attr)
        if tensor_parallel:
            reduce_over_tensor_parallel(self.parameters(), grad_attr)

    def gradient_norm(self, norm_type: float = 2.0) -> torch.Tensor:
        """Returns the norm of the whole adapter's gradient: on every layout that of the single process.

        All ranks must call it, after `reduce_gradients` and the mean over data-parallel ranks. Each element counts once,
        however many ranks hold it: tied copies, replicas and shards. Sends two numbers per model-parallel rank, in one
        all-reduce.

        Reads `grad`; where that is None, the `main_grad` of Megatron's DDP.

        Args:
            norm_type: 2 or infinity.

        Returns:
            () float64 on the CPU, with the same bits on every rank. 0 without gradients.

        Raises:
            RuntimeError: on every rank: data-parallel ranks hold different gradients. They are not averaged yet, or
                Megatron's distributed optimizer has left each rank a part; then let it clip (`OptimizerConfig.clip_grad`).
                Or the adapter is merged.
        """
        self._unmerged("gradient_norm")
        return grad_norm.global_norm(list(self.parameters()), norm_type)

    def clip_gradients(
        self, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scales the gradients so that their `gradient_norm` is at most `max_norm`. All ranks must call it.

        `torch.nn.utils.clip_grad_norm_` would use another norm on each rank, and copies of a tied tensor would drift
        apart. Here all ranks scale by the same bits. As in torch, gradients without a finite norm become NaN or 0.

        Args:
            max_norm: greater than 0.
            norm_type: 2 or infinity.
            error_if_nonfinite: raise RuntimeError on every rank, and scale nothing, if the norm is not finite.

        Returns:
            The norm before clipping, as `gradient_norm`.

        Raises:
            ValueError: `max_norm` is not greater than 0, or `norm_type` is not 2 or infinity.
            RuntimeError: as `gradient_norm`, or see `error_if_nonfinite`.
        """
        self._unmerged("clip_gradients")
        return grad_norm.clip(list(self.parameters()), max_norm, norm_type, error_if_nonfinite)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Returns every stored tensor, whole, on the CPU of every rank; tied ones once. All ranks must call it.

        "linear_qkv.A" (r, in), "linear_qkv.B" (out, r), "layers.7.linear_qkv.u" (r,), "layers.7.linear_qkv.v" (out,).
        """
        chunks = self._present("full_state")
        for chunk in chunks:
            chunk.factors()
        return full_state.gather(self.config, self.shapes, [chunk.factors for chunk in chunks], self.device)

    def load_full_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Loads what `full_state` returned, on any layout.

        Raises:
            ValueError: lists every missing, unexpected, misshapen or non-finite tensor. Nothing is changed then.
            RuntimeError: the adapter is merged: the weights would keep the old values.
        """
        chunks = self._unmerged("load_full_state")
        full_state.check_state(state, expected_shapes(self.config, self.shapes))
        for chunk in chunks:
            own_frozen(chunk.factors)
        if self.pruning is not None:
            self.pruning.forget_versions()
        full_state.load(self.config, self.shapes, [chunk.factors for chunk in chunks], state)

    def merge(self) -> None:
        """W += (alpha / r) diag(v) B diag(u) A, in float32, then cast. All ranks must call it.

        Each rank merges its own shard; ranks only tell each other whether they can. A merged adapter is not trained: call
        `unmerge` first. `model.state_dict()` holds the merged weights then.

        Raises:
            RuntimeError: the adapter is already merged, or detached.
            ConfigError: the base is quantised, or linears share one weight, which cannot hold two updates.
            ValueError: a merged weight would not be finite.
            Each is raised on every rank, and nothing is changed then.
        """
        chunks = self._present("merge")
        if not self.attached:
            raise RuntimeError("merge: the adapter is not attached to the model; call attach() first")
        if self._merged:
            raise RuntimeError("merge: the adapter is merged already; call unmerge() first")
        merged, failure = [], None
        try:
            merged = merged_weights(chunks)
        except Exception as error:
            failure = error
        raise_together("merge", failure)
        for chunk, module, weight in merged:
            chunk.originals[module] = module.weight.data
            module.weight.data = weight
            chunk.versions[module] = version_of(module.weight)
            module.tied_lora.enabled = False
        self._set_merged(True)

    def unmerge(self) -> None:
        """Restores the base's own weights, bit for bit, and enables the adapter again. Does nothing if it is not merged.

        If the model was cast or moved since `merge`, the base's own weights are cast and moved likewise.

        Raises:
            RuntimeError: merged weights were changed in place since `merge`, for instance by loading a state dict, so the
                old ones are not the base's any more. Nothing is changed then.
        """
        chunks = self._present("unmerge")
        if changed := changed_since_merge(chunks):
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise RuntimeError(
                f"unmerge: the weight of {changed[0]}{more} was changed since merge(), so the old one is not the base's any "
                "more; call remove(), load the base again, then the adapter"
            )
        for chunk in chunks:
            for module, weight in chunk.originals.items():
                now: torch.Tensor = module.weight  # type: ignore[assignment]
                now.data = weight.to(device=now.device, dtype=now.dtype)
                module.tied_lora.enabled = True  # type: ignore[union-attr]
            chunk.originals.clear()
            chunk.versions.clear()
        self._set_merged(False)

    @property
    def attached(self) -> bool:
        """Whether the model has this adapter now: False after `detach` or `remove`."""
        return any(chunk.attached for chunk in self._chunks or ())

    def detach(self) -> None:
        """Restores the base model and keeps the adapter for `attach`. Copies and moves no tensor.

        Raises:
            RuntimeError: the adapter is merged.
        """
        for chunk in reversed(self._unmerged("detach")):
            chunk.detach()

    def attach(self) -> None:
        """Puts a detached adapter back on the model, and freezes the base.

        Raises:
            RuntimeError: the model has another adapter.
        """
        chunks = self._present("attach")
        if self.attached:
            return
        if any(hasattr(chunk.body.decoder, "tied_lora") for chunk in chunks):
            raise RuntimeError("attach: the model has another Tied-LoRA adapter; call its detach() or remove() first")
        try:
            for chunk in chunks:
                chunk.attach()
        except BaseException:
            for chunk in reversed(chunks):
                chunk.detach()
            raise

    def remove(self) -> None:
        """Restores the base model. A merged adapter stays in the weights. Afterwards the adapter cannot be used."""
        for chunk in reversed(self._present("remove")):
            chunk.originals.clear()
            chunk.detach()
        if self.pruning is not None:
            self.pruning.stop()
        self._chunks = None

    def _set_merged(self, merged: bool) -> None:
        self._merged = merged
        for chunk in self._chunks or ():
            chunk.factors.merged = merged

    def _present(self, call: str) -> list[Chunk]:
        if self._chunks is None:
            raise RuntimeError(f"{call}: the adapter was removed from the model; inject or load it again")
        return self._chunks

    def _unmerged(self, call: str) -> list[Chunk]:
        chunks = self._present(call)
        if self._merged:
            raise RuntimeError(f"{call}: the adapter is merged; call unmerge() first")
        return chunks

    @staticmethod
    def _named(chunks: Sequence[Chunk]) -> Iterator[tuple[str, nn.Parameter]]:
        for chunk in chunks:
            for name, parameter in chunk.factors.named_parameters():
                if parameter.requires_grad:
                    yield name, parameter
