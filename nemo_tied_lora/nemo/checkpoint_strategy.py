# SPDX-License-Identifier: Apache-2.0
"""Writes and reads training checkpoints of an adapter in NeMo, as folders that load on any layout.

NeMo's exp_manager and NeMoModelCheckpoint decide when to write a checkpoint, how to name it, and which ones to remove.
This module decides what a checkpoint holds. Other PEFT schemes, and training without an adapter, use NeMo's format.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from megatron.core import parallel_state
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
from nemo_tied_lora.nemo.launched_trainer import LaunchedTrainerBuilder
from nemo_tied_lora.nemo.resuming import KeepRandomStates, whole_steps

__all__ = ["AdapterCheckpointStrategy", "TiedLoraTrainerBuilder"]

_RANDOM = "random_states"
# Keys of Lightning's dictionary that a checkpoint leaves out: the tensors have files of their own, and the run has the
# model's config.
_NOT_IN_JSON = (
    "state_dict",
    "sharded_state_dict",
    "optimizer_states",
    "hyper_parameters",
    "hparams_name",
    "hparams_type",
)
_SCHEDULE_LENGTH = ("max_steps", "warmup_steps", "constant_steps", "decay_steps")


class TiedLoraTrainerBuilder(LaunchedTrainerBuilder):
    """`LaunchedTrainerBuilder` with `AdapterCheckpointStrategy` and `KeepRandomStates`."""

    def _training_strategy(self) -> Any:
        strategy = super()._training_strategy()
        if type(strategy) is NLPDDPStrategy:  # a change of class keeps the arguments that NeMo passed
            strategy.__class__ = AdapterCheckpointStrategy
        return strategy

    def _callbacks(self, callbacks: list[Callback] | None) -> list[Callback]:
        return [KeepRandomStates(), *super()._callbacks(callbacks)]


class AdapterModelCheckpoint(NeMoModelCheckpoint):
    """NeMo's callback, except if both `always_save_nemo` and `save_best_model` are set.

    NeMo's own would then read the best checkpoint with `torch.load`, but ours is a folder.
    """

    previous_best_path: str

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> Any:
        """Writes the `.nemo` from the best checkpoint. Unless both settings are on, leaves it to NeMo."""
        if not (self.always_save_nemo and self.save_best_model):
            return super().on_save_checkpoint(trainer, pl_module, checkpoint)
        best: str = self.best_model_path
        # The best checkpoint may still be in writing. As in NeMo, its .nemo then comes with the next checkpoint.
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
    """NeMo's strategy; checkpoints of a Tied-LoRA run hold the adapter, not the base, and load on any layout."""

    saves: list[dict[str, float]]
    """{"seconds", "bytes"} of every checkpoint that this process has helped to write."""
    _base: dict[str, Any] | None = None

    def setup(self, trainer: Trainer) -> None:
        """NeMo's, then makes NeMo's checkpoint callback an `AdapterModelCheckpoint`."""
        super().setup(trainer)
        self.saves = getattr(self, "saves", [])  # a test after training calls setup a second time
        if self._adapter() is not None:
            for callback in trainer.checkpoint_callbacks:
                if type(callback) is NeMoModelCheckpoint:
                    callback.__class__ = AdapterModelCheckpoint
                    # A killed run may have left checkpoints newer than the one that it resumes from. The resumed run
                    # overwrites them; a version counter would write a second copy, "-v1".
                    callback._enable_version_counter &= trainer.ckpt_path is None

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Empty for an adapter: `save_checkpoint` gathers the state, and a second call would cost a collective."""
        return super().optimizer_state(optimizer) if self._adapter() is None else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint's folder. All ranks call it; rank 0 writes.

        Raises:
            OSError: rank 0 could not write. Raised on every rank; older checkpoints are unchanged.
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
            **self.describe(self.lightning_module),
            "step": checkpoint["global_step"],
            "consumed_samples": self._consumed_samples(),
            "layout": _layout(),
            "optimizer": encode({"options": options, "scalars": scalars}, "optimizer"),
            "lightning": {k: encode(v, k) for k, v in whole_steps(checkpoint).items() if k not in _NOT_IN_JSON},
        }
        vectors: dict[str, torch.Tensor] = {}
        if adapter.pruning is not None:
            description["rank_budget"], vectors = adapter.pruning.state()
        path = _dir(filepath)
        write = _RankZeroWriter(path, is_rank_zero=self.is_global_zero)
        for target, tensors in gather_tensors(adapter, state):
            write.add(target, tensors)
        if vectors:
            write.add("rank_budget", {f"rank_budget/{name}": vector for name, vector in vectors.items()})
        write.add(_RANDOM, self._gather_random_states())
        write.finish(description)
        self._record(path, time.perf_counter() - started)

    def load_checkpoint(self, checkpoint_path: Any, load_optimizer_states: bool = True) -> dict[str, Any]:
        """Returns Lightning's dictionary. The two methods below load the tensors of the adapter and the optimizer.

        Raises:
            ConfigError: the checkpoint is damaged, or belongs to another adapter or base.
        """
        adapter = self._adapter()
        if adapter is None or not training_checkpoint.is_checkpoint(_dir(checkpoint_path)):
            return super().load_checkpoint(checkpoint_path, load_optimizer_states)
        path = _dir(checkpoint_path)
        description = training_checkpoint.read_description(path)
        problems = differences(path, description, self.describe(self.lightning_module))
        if problems:
            raise training_checkpoint.CheckpointError(problems)
        state = {key: decode(value) for key, value in description["lightning"].items()}
        if "lr_schedulers" in state:
            state["lr_schedulers"] = self._with_new_length(state["lr_schedulers"])
        if load_optimizer_states and description["optimizer"]["options"]:
            state["optimizer_states"] = [description]
        return {**state, "state_dict": {}, "adapter_checkpoint": str(path)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads this rank's part of the adapter."""
        adapter, path = self._adapter(), checkpoint.get("adapter_checkpoint")
        if adapter is None or path is None:
            super().load_model_state_dict(checkpoint, strict)
        else:
            adapter.load_full_state(training_checkpoint.read_tensors(path, "adapter"))
            if adapter.pruning is not None:
                values = training_checkpoint.read_description(path)["rank_budget"]
                adapter.pruning.load(values, training_checkpoint.read_tensors(path, "rank_budget"))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this rank's part of the optimizer's state, and the random states if the layout is unchanged."""
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
        self._restore_random_states(path, description["layout"])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Removes a checkpoint atomically: others see the whole folder or none."""
        path = _dir(filepath)
        if not training_checkpoint.is_checkpoint(path):
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            training_checkpoint.remove(path)

    def _adapter(self) -> Adapter | None:
        return getattr(self.lightning_module, "tied_lora", None)

    def describe(self, model: Any) -> dict[str, Any]:
        """Describes a model's adapter and base, as checkpoints do. All ranks call it.

        The base is frozen, so its description is cached.
        """
        adapter: Adapter = model.tied_lora
        facts = model._facts()
        if self._base is None:
            tokenizer = facts["base"].get("tokenizer")
            self._base = describe_base([chunk.body for chunk in adapter.chunks], tokenizer=tokenizer)
        return describe(adapter.config, adapter.shapes, facts, self._base)

    def _optimizer(self) -> Any:
        optimizer = self.optimizers[0]
        return getattr(optimizer, "_optimizer", optimizer)

    def _consumed_samples(self) -> int:
        model: Any = self.lightning_module
        return int(model.compute_consumed_samples(model.trainer.global_step - model.init_global_step))

    def _with_new_length(self, saved: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The saved schedules, with this run's length if its number of steps has changed: the old schedule has ended."""
        schedules = []
        for old, config in zip(saved, self.lightning_module.trainer.lr_scheduler_configs, strict=True):
            new = config.scheduler.state_dict()
            if old.get("max_steps") != new.get("max_steps"):
                logging.info(f"the learning rate's schedule: max_steps={new['max_steps']}, was {old['max_steps']}")
                old = {**old, **{key: new[key] for key in _SCHEDULE_LENGTH if key in new}}
                config.scheduler.load_state_dict(old)
                config.scheduler.get_lr()
                old["unscaled"] = config.scheduler.unscaled  # the saved rate may be the old schedule's last
            schedules.append(old)
        return schedules

    def _random_state_keeper(self) -> KeepRandomStates | None:
        callbacks = self.lightning_module.trainer.callbacks
        return next((callback for callback in callbacks if isinstance(callback, KeepRandomStates)), None)

    def _gather_random_states(self) -> dict[str, torch.Tensor]:
        keeper = self._random_state_keeper()
        own = None if keeper is None else keeper.states
        own = rng_state.capture(self.lightning_module.device) if own is None else own
        ranks: list[Any] = [own] * self.world_size
        torch.distributed.all_gather_object(ranks, own)
        return {f"{rank}/{name}": state for rank, states in enumerate(ranks) for name, state in states.items()}

    def _restore_random_states(self, path: str, layout: Mapping[str, int]) -> None:
        if layout != _layout():
            logging.warning(
                f"{path}: was written on {layout}, this run has {_layout()}: random states do not fit another layout, "
                "so dropout masks will differ from those of an uninterrupted run"
            )
            return
        states = training_checkpoint.read_tensors(path, str(self.global_rank))
        keeper = self._random_state_keeper()
        if keeper is None:
            rng_state.restore(states, self.lightning_module.device)
        else:
            keeper.states = states

    def _record(self, path: Path, seconds: float) -> None:
        size = sum(file.stat().st_size for file in path.iterdir()) if self.is_global_zero else 0
        self.saves.append({"seconds": seconds, "bytes": size})
        logging.info(f"checkpoint {path.name}: {size:,} bytes in {seconds:.2f} s")


class _RankZeroWriter:
    """Writes on rank 0, does nothing on other ranks. Holds a failure back until all collectives are done."""

    def __init__(self, path: Path, *, is_rank_zero: bool) -> None:
        self._path = path
        self._writer: training_checkpoint.CheckpointWriter | None = None
        self._failure = _attempt(self._open) if is_rank_zero else None

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
    """Broadcasts the result of rank 0's write. Without it, other ranks would hang or continue without a file."""
    result = [f"{type(failure).__name__}: {failure}" if failure else None]
    torch.distributed.broadcast_object_list(result, src=0)
    if failure is not None:
        raise failure
    if result[0] is not None:
        raise OSError(f"{what}: rank 0 could not write it: {result[0]}")


def _dir(path: Any) -> Path:
    """The checkpoint's folder for one of NeMo's file names."""
    return ckpt_to_dir(path) if str(path).endswith(".ckpt") else Path(path)


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }
