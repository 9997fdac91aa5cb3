# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints of an adapter in NeMo: layout-free folders in place of one file a rank.

NeMo's exp_manager and NeMoModelCheckpoint decide when a checkpoint is made, under which name, and which are removed;
here stands what is in one. Every other scheme, and training without an adapter, goes NeMo's way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from megatron.core import parallel_state
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
from nemo.utils import logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.model_utils import ckpt_to_dir

from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.checkpoint import rng_state, training_checkpoint
from nemo_tied_lora.checkpoint.base_identity import describe_base
from nemo_tied_lora.checkpoint.checkpoint_to_adapter import describe, differences, write_adapter_of
from nemo_tied_lora.checkpoint.full_optimizer_state import (
    gather_options,
    gather_tensors,
    scatter_options,
    scatter_slot,
)
from nemo_tied_lora.checkpoint.json_values import decode, encode
from nemo_tied_lora.checkpoint.local_optimizer_state import LocalState, read_optimizer, write_optimizer
from nemo_tied_lora.nemo.resuming import KeepRandomStates, whole_steps

__all__ = ["AdapterCheckpointStrategy", "TiedLoraTrainerBuilder"]

_RANDOM = "random_states"
# Of Lightning's dictionary: tensors that are kept otherwise, and the model's config, which the run has.
_KEPT_OTHERWISE = (
    "state_dict",
    "sharded_state_dict",
    "optimizer_states",
    "hyper_parameters",
    "hparams_name",
    "hparams_type",
)
_SCHEDULE_LENGTH = ("max_steps", "warmup_steps", "constant_steps", "decay_steps")


class TiedLoraTrainerBuilder(MegatronLMPPTrainerBuilder):
    """NeMo's builder, with the strategy below, and random states that resuming finds again."""

    def _training_strategy(self) -> Any:
        strategy = super()._training_strategy()
        if type(strategy) is NLPDDPStrategy:  # keeps the arguments that NeMo gave it
            strategy.__class__ = AdapterCheckpointStrategy
        return strategy

    def _callbacks(self, callbacks: list[Callback] | None) -> list[Callback]:
        return [KeepRandomStates(), *super()._callbacks(callbacks)]


class AdapterModelCheckpoint(NeMoModelCheckpoint):
    """NeMo's callback, where `always_save_nemo` and `save_best_model` meet: it would read the best file by torch."""

    previous_best_path: str

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> Any:
        """Keeps the `.nemo` the best checkpoint's, or the current adapter's (NeMo's own way)."""
        if not (self.always_save_nemo and self.save_best_model):
            return super().on_save_checkpoint(trainer, pl_module, checkpoint)
        best: str = self.best_model_path
        # The best may be the one that is being written: it is saved with the next, as in NeMo.
        if (
            best
            and best != self.previous_best_path
            and trainer.strategy.broadcast(training_checkpoint.is_checkpoint(_dir(best)))
        ):
            self.previous_best_path = best
            nemo, failure = Path(self._format_nemo_checkpoint_name()), None
            if trainer.is_global_zero:
                failure = _attempt(lambda: write_adapter_of(_dir(best), nemo))
            _raise_on_every_rank(failure, str(nemo))
        return None


class AdapterCheckpointStrategy(NLPDDPStrategy):
    """NeMo's strategy, whose checkpoints of a Tied-LoRA run hold the adapter, not the base, for any layout."""

    saves: list[dict[str, float]]
    """{"seconds", "bytes"} of every checkpoint that this process took part in."""
    _base: dict[str, Any] | None = None

    def setup(self, trainer: Trainer) -> None:
        """NeMo's; and its checkpoint callback learns to find the best adapter."""
        super().setup(trainer)
        self.saves = getattr(self, "saves", [])  # set up again for a test after training
        if self._adapter() is not None:
            for callback in trainer.checkpoint_callbacks:
                if type(callback) is NeMoModelCheckpoint:
                    callback.__class__ = AdapterModelCheckpoint
                    # A killed run may have left later checkpoints than the one that it goes on from. They are made
                    # again: under their own names, in their own places, not beside themselves as "-v1".
                    callback._enable_version_counter &= trainer.ckpt_path is None

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: `save_checkpoint` gathers it, and asking a distributed optimizer twice costs a collective."""
        return super().optimizer_state(optimizer) if self._adapter() is None else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a folder. All ranks call it; rank 0 writes.

        Raises:
            OSError: on every rank, where rank 0 could not write; older checkpoints are as they were.
        """
        adapter = self._adapter()
        if adapter is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        started = time.perf_counter()
        optimizer = self._optimizer() if (storage_options or {}).get("include_optimizer", True) else None
        state = LocalState()
        if optimizer is not None and "optimizer_states" in checkpoint:
            state = read_optimizer(optimizer, adapter.parameters())
        options, scalars = gather_options(adapter, state)
        description = {
            **self._describe(adapter),
            "step": checkpoint["global_step"],
            "consumed_samples": self._consumed_samples(),
            "layout": _layout(),
            "optimizer": encode({"options": options, "scalars": scalars}, "optimizer"),
            "lightning": {k: encode(v, k) for k, v in whole_steps(checkpoint).items() if k not in _KEPT_OTHERWISE},
        }
        path = _dir(filepath)
        write = _Writing(path, first=self.is_global_zero)
        for target, tensors in gather_tensors(adapter, state):
            write.add(target, tensors)
        write.add(_RANDOM, self._gather_random_states())
        write.finish(description)
        self._record(path, time.perf_counter() - started)

    def load_checkpoint(self, checkpoint_path: Any, load_optimizer_states: bool = True) -> dict[str, Any]:
        """Lightning's dictionary; the adapter's and the optimizer's tensors follow in the two functions below.

        Raises:
            ConfigError: it is damaged, or of another adapter or base.
        """
        adapter = self._adapter()
        if adapter is None or not training_checkpoint.is_checkpoint(_dir(checkpoint_path)):
            return super().load_checkpoint(checkpoint_path, load_optimizer_states)
        path = _dir(checkpoint_path)
        description = training_checkpoint.read_description(path)
        problems = differences(path, description, self._describe(adapter))
        if problems:
            raise training_checkpoint.CheckpointError(problems)
        state = {key: decode(value) for key, value in description["lightning"].items()}
        if "lr_schedulers" in state:
            state["lr_schedulers"] = self._with_this_length(state["lr_schedulers"])
        if load_optimizer_states and description["optimizer"]["options"]:
            state["optimizer_states"] = [description]
        return {**state, "state_dict": {}, "adapter_checkpoint": str(path)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """This rank's part of the adapter."""
        adapter, path = self._adapter(), checkpoint.get("adapter_checkpoint")
        if adapter is None or path is None:
            super().load_model_state_dict(checkpoint, strict)
        else:
            adapter.load_full_state(training_checkpoint.read_tensors(path, "adapter"))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """This rank's part of the optimizer's state; and, on the layout that wrote them, the random states."""
        adapter, path = self._adapter(), checkpoint.get("adapter_checkpoint")
        if adapter is None or path is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        description = checkpoint["optimizer_states"][0]
        saved = decode(description["optimizer"])
        slots = {
            slot: scatter_slot(adapter, training_checkpoint.read_tensors(path, slot))
            for slot in training_checkpoint.slots(path)
        }
        state = LocalState(slots, scatter_options(adapter, saved["scalars"]), saved["options"])
        optimizer = self._optimizer()
        write_optimizer(optimizer, state)
        for schedule in checkpoint.get("lr_schedulers", ()):
            for group, rate in zip(optimizer.param_groups, schedule.get("_last_lr") or (), strict=False):
                group["lr"] = rate
        self._restore_random_states(path, description["layout"])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Removes it, in one move for every onlooker."""
        path = _dir(filepath)
        if not training_checkpoint.is_checkpoint(path):
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            training_checkpoint.remove(path)

    def _adapter(self) -> Adapter | None:
        return getattr(self.lightning_module, "tied_lora", None)

    def _describe(self, adapter: Adapter) -> dict[str, Any]:
        """All ranks call it. The base is frozen, and so read once in a run."""
        facts = self.lightning_module._facts()
        if self._base is None:
            tokenizer = facts["base"].get("tokenizer")
            self._base = describe_base([chunk.body for chunk in adapter.chunks], tokenizer=tokenizer)
        return describe(adapter.config, adapter.specs, facts, self._base)

    def _optimizer(self) -> Any:
        optimizer = self.optimizers[0]
        return getattr(optimizer, "_optimizer", optimizer)

    def _consumed_samples(self) -> int:
        model: Any = self.lightning_module
        return int(model.compute_consumed_samples(model.trainer.global_step - model.init_global_step))

    def _with_this_length(self, saved: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A run that was given more steps goes on along the schedule of its new length; the old one has ended."""
        schedules = []
        for old, config in zip(saved, self.lightning_module.trainer.lr_scheduler_configs, strict=True):
            new = config.scheduler.state_dict()
            if old.get("max_steps") != new.get("max_steps"):
                logging.info(f"the learning rate's schedule: max_steps={new['max_steps']}, was {old['max_steps']}")
                old = {**old, **{key: new[key] for key in _SCHEDULE_LENGTH if key in new}}
                config.scheduler.load_state_dict(old)
                old["_last_lr"] = list(config.scheduler.get_lr())  # of the next step; the old one may be the end's
            schedules.append(old)
        return schedules

    def _random_states(self) -> KeepRandomStates | None:
        callbacks = self.lightning_module.trainer.callbacks
        return next((callback for callback in callbacks if isinstance(callback, KeepRandomStates)), None)

    def _gather_random_states(self) -> dict[str, torch.Tensor]:
        keeper = self._random_states()
        own = None if keeper is None else keeper.states
        own = rng_state.capture(self.lightning_module.device) if own is None else own
        ranks: list[Any] = [own] * self.world_size
        torch.distributed.all_gather_object(ranks, own)
        return {f"{rank}/{name}": state for rank, states in enumerate(ranks) for name, state in states.items()}

    def _restore_random_states(self, path: str, layout: Mapping[str, int]) -> None:
        if layout != _layout():
            logging.warning(
                f"{path}: was written on {layout}, this run has {_layout()}: random states cannot be continued on "
                "another layout; where there is dropout, its masks are others than those of the uninterrupted run"
            )
            return
        states = training_checkpoint.read_tensors(path, str(self.global_rank))
        keeper = self._random_states()
        if keeper is None:
            rng_state.restore(states, self.lightning_module.device)
        else:
            keeper.states = states

    def _record(self, path: Path, seconds: float) -> None:
        size = sum(file.stat().st_size for file in path.iterdir()) if self.is_global_zero else 0
        self.saves.append({"seconds": seconds, "bytes": size})
        logging.info(f"checkpoint {path.name}: {size:,} bytes in {seconds:.2f} s")


class _Writing:
    """Rank 0 writes; the others only take part. A failure is kept until every collective is through."""

    def __init__(self, path: Path, *, first: bool) -> None:
        self._path = path
        self._writer: training_checkpoint.CheckpointWriter | None = None
        self._failure = _attempt(self._open) if first else None

    def add(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        writer = self._writer
        if writer is not None and self._failure is None:
            self._failure = _attempt(lambda: writer.add(name, tensors))

    def finish(self, description: Mapping[str, Any]) -> None:
        writer = self._writer
        if writer is not None and self._failure is None:
            self._failure = _attempt(lambda: writer.finish(description))
        if writer is not None and self._failure is not None:
            writer.abandon()
        _raise_on_every_rank(self._failure, str(self._path))

    def _open(self) -> None:
        self._writer = training_checkpoint.CheckpointWriter(self._path)


def _attempt(step: Callable[[], Any]) -> Exception | None:
    try:
        step()
    except Exception as error:
        return error
    return None


def _raise_on_every_rank(failure: Exception | None, what: str) -> None:
    """Rank 0 tells the others how its write ended: they would wait for it for ever, or go on without a file."""
    told = [f"{type(failure).__name__}: {failure}" if failure else None]
    torch.distributed.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise OSError(f"{what}: rank 0 could not write it: {told[0]}")


def _dir(path: Any) -> Path:
    """The folder for one of NeMo's file names."""
    return ckpt_to_dir(path) if str(path).endswith(".ckpt") else Path(path)


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }
