# SPDX-License-Identifier: Apache-2.0
"""Bridge's own training loop on a CPU: `pretrain` and `finetune` on the tiny Llama, with checkpoints. For a rank of a test.

The loop asks for a GPU in many places, compiles kernels, and imports nvidia_resiliency_ext, which is not installed here.
`prepare_loop` replaces these names in Bridge's modules for the rest of the process.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from megatron.bridge.data.base import DatasetProvider
from megatron.bridge.training import config
from megatron.bridge.training.tokenizers.config import TokenizerConfig
from megatron.core import parallel_state

from nemo_tied_lora.bridge import TiedLoRA
from nemo_tied_lora.platform.no_gpu_torch import no_gpu_torch, stand_in
from tests.bridge.bridge_model import provider
from tests.harness.tiny_gpt import VOCAB

__all__ = ["DROPPED", "Forgetful", "Rows", "Scrambled", "prepare_loop", "settings", "step"]

DROPPED = "decoder.tied_lora.linear_qkv.A"
SEQUENCE = 12
_LOOP = ("train", "setup", "initialize", "checkpointing", "pretrain", "finetune", "utils.train_utils")


def prepare_loop() -> None:
    """Makes Bridge's loop run in this process, after `platform.prepare(bridge=True)`."""
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.inprocess"):
        package: Any = ModuleType(name)
        package.__path__, package.__spec__ = [], importlib.machinery.ModuleSpec(name, None, is_package=True)
        package.CallWrapper = object
        sys.modules[name] = package
    loop = {name: importlib.import_module(f"megatron.bridge.training.{name}") for name in _LOOP}
    loop["initialize"].compile_helpers = lambda: None  # of datasets that are not used here
    loop["setup"].set_jit_fusion_options = lambda *_args, **_options: None
    cuda = stand_in(
        torch.cuda,
        is_available=lambda: True,
        device_count=lambda: 1,
        empty_cache=lambda: None,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
    )
    without_gpu = stand_in(no_gpu_torch(), cuda=cuda)
    importlib.import_module("megatron.core.rerun_state_machine").torch = without_gpu  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.bridge.") and getattr(module, "torch", None) is torch:
            module.torch = without_gpu  # type: ignore[attr-defined]


class _Rows(torch.utils.data.Dataset):
    """Row i is always the same."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(0, VOCAB, (SEQUENCE + 1,), generator=torch.Generator().manual_seed(100 + index))
        return {"tokens": row[:-1], "labels": row[1:]}


@dataclass(kw_only=True)
class Rows(DatasetProvider):
    """Random tokens to train on."""

    seq_length: int = SEQUENCE

    def build_datasets(self, context: Any) -> tuple[Any, None, None]:
        return _Rows(), None, None


class Forgetful(TiedLoRA):
    """Its checkpoints lack a tensor, and so does what it asks for when it resumes."""

    def adapter_key_filter(self, key: str | tuple[str, Any]) -> bool:
        return super().adapter_key_filter(key) and (key[0] if isinstance(key, tuple) else key) != DROPPED


class Scrambled(TiedLoRA):
    """Its factors start anywhere: what a checkpoint lacks is seen, also in frozen factors."""

    def __call__(self, model: Any, training: bool = True) -> Any:
        super().__call__(model, training)
        assert self.adapter is not None
        for chunk in self.adapter.chunks:
            for parameter in chunk.factors.parameters():
                parameter.data.normal_()
        return model


def settings(save: Path, *, steps: int, peft: Any = None, **checkpoint: Any) -> Any:
    """A recipe: Adam, a rate that falls over four steps, a checkpoint every second step.

    Args:
        save: where the checkpoints go.
        checkpoint: more fields of Bridge's `CheckpointConfig`.
    """
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()  # a run of the loop ends with destroying the groups
    model = provider()
    model.seq_length, model.use_cpu_initialization = SEQUENCE, True
    return config.ConfigContainer(
        train=config.TrainingConfig(train_iters=steps, global_batch_size=4, micro_batch_size=2),
        validation=config.ValidationConfig(eval_iters=0, eval_interval=None),
        model=model,
        optimizer=config.OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=1e-3, weight_decay=0.0, clip_grad=1.0),
        scheduler=config.SchedulerConfig(
            lr_decay_style="linear", lr_warmup_iters=1, lr_decay_iters=4, start_weight_decay=0.0, end_weight_decay=0.0
        ),
        ddp=config.DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False),
        dataset=Rows(num_workers=0, dataloader_type="single", pin_memory=False, persistent_workers=False),
        logger=config.LoggerConfig(log_interval=100),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB),
        checkpoint=config.CheckpointConfig(
            save=str(save),
            save_interval=2,
            fully_parallel_save=False,
            **checkpoint,
        ),
        dist=config.DistributedInitConfig(distributed_backend="gloo", use_gloo_process_groups=True),
        peft=peft,
    )


def step(batches: Any, model: Any, return_schedule_plan: bool = False) -> tuple[torch.Tensor, Any]:
    """Bridge's forward step: the loss of one microbatch."""
    batch = next(batches)
    positions, mask = torch.arange(SEQUENCE), torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    losses = model(batch["tokens"], positions.expand(len(batch["tokens"]), -1), mask, labels=batch["labels"])

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int)
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    return losses, loss
