# SPDX-License-Identifier: Apache-2.0
"""The switch for a machine without a GPU: Megatron and NeMo then run on the CPU, over gloo.

It changes nothing if torch finds a GPU. In torch itself it replaces only names that raise without a GPU; everything else
is replaced in the module of Megatron or NeMo that fails. Checked with megatron-core 0.13.1, 0.16.1 and 0.19.2, and with
NeMo 2.4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nemo_tied_lora.platform import detect, no_gpu_rng
from nemo_tied_lora.platform.no_gpu_torch import no_gpu_torch, no_streams, stand_in, with_cuda_type_names
from nemo_tied_lora.platform.patching import Patch, apply

__all__ = ["BRIDGE_PATCHES", "MEGATRON_PATCHES", "NEMO_PATCHES", "TORCH_PATCHES", "enable", "enable_bridge"]

_CPU = torch.device("cpu")


def enable(*, nemo: bool) -> tuple[str, ...]:
    """Makes Megatron (and NeMo, with ``nemo=True``) run without a GPU.

    Returns:
        The names that were replaced; empty if there is a GPU.
    """
    if detect.has_gpu():
        return ()
    done = apply(TORCH_PATCHES) + apply(MEGATRON_PATCHES)
    return done + apply(NEMO_PATCHES) if nemo else done


def enable_bridge() -> tuple[str, ...]:
    """Makes Megatron-Bridge run without a GPU. Imports the part of megatron-core that wraps Bridge's models.

    Returns:
        The names that were replaced; empty if there is a GPU.
    """
    return () if detect.has_gpu() else apply(BRIDGE_PATCHES)


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _original: value


def _noop(_original: Any) -> Callable[..., None]:
    # A new function at each call: torch.compile's tables refuse one object under two names.
    return lambda *_args, **_kwargs: None


def _stay(tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return tensor


def _cpu_torch(_torch: Any) -> Any:
    return no_gpu_torch()


def _cpu_autocast(decorate: Callable[..., Any]) -> Callable[[Any], Any]:
    """Decorates the upstream function with the CPU's ``custom_fwd`` or ``custom_bwd`` in place of the GPU's."""
    return lambda decorated: staticmethod(decorate(decorated.__wrapped__, device_type="cpu"))


TORCH_PATCHES: tuple[Patch, ...] = (
    Patch(
        owner="torch:Tensor",
        name="cuda",
        make=_always(_stay),
        reason="batches, parameters and losses are sent to the GPU with .cuda(); Module.cuda() goes through here too",
    ),
    Patch(
        owner="torch.cuda",
        name="current_device",
        make=_always(lambda: _CPU),
        reason="used as device=torch.cuda.current_device() (megatron/core/tensor_parallel/mappings.py, ...)",
    ),
    Patch(
        owner="torch.cuda",
        name="set_device",
        make=_noop,
        reason="MegatronBaseModel.__init__ selects the rank's GPU (nemo/.../megatron_base_model.py)",
    ),
    Patch(
        owner="torch.cuda",
        name="synchronize",
        make=_noop,
        reason="waits for the GPU (megatron/core/pipeline_parallel/p2p_communication.py, dist_checkpointing)",
    ),
    *(
        Patch(
            owner="torch.cuda",
            name=name,
            make=_always(getattr(torch, name)),
            reason="NeMo builds tensors with it (nemo/.../dataset_utils.py, text_generation_utils.py, clip_grads.py)",
        )
        for name in ("ByteTensor", "FloatTensor", "IntTensor", "LongTensor")
    ),
)

_CUDA_LITERALS = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)
_CUDA_TYPE_NAMES = (
    ("megatron.core.optimizer.clip_grads", "clip_grad_by_total_norm_fp32"),
    ("megatron.core.optimizer.optimizer", "clip_grad_by_total_norm_fp32"),
    ("megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params", "__init__"),
    ("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer", "__init__"),
)

_AUTOCAST_FUNCTIONS = ("LinearWithFrozenWeight", "LinearWithGradAccumulationAndAsyncCommunication")

MEGATRON_PATCHES: tuple[Patch, ...] = (
    *(
        Patch(owner=owner, name="torch", make=_cpu_torch, reason='passes device="cuda", or pins memory')
        for owner in _CUDA_LITERALS
    ),
    *(
        Patch(
            owner=owner, name=name, make=with_cuda_type_names, reason="compares tensor.type() with a CUDA type's name"
        )
        for owner, name in _CUDA_TYPE_NAMES
    ),
    *(
        Patch(
            owner=f"megatron.core.tensor_parallel.layers:{function}",
            name=name,
            make=_cpu_autocast(decorate),
            reason="saves the GPU's autocast state for backward: bf16-mixed then multiplies bfloat16 with float32",
        )
        for function in _AUTOCAST_FUNCTIONS
        for name, decorate in (("forward", torch.amp.custom_fwd), ("backward", torch.amp.custom_bwd))
    ),
    Patch(
        owner="megatron.core.tensor_parallel.random",
        name="torch",
        make=lambda torch_: stand_in(
            torch_,
            cuda=stand_in(torch_.cuda, get_rng_state=torch_.get_rng_state, manual_seed=no_gpu_rng.seed_cpu),
        ),
        reason="seeds the GPU's generator, which torch queues until a GPU is there",
    ),
    Patch(
        owner="megatron.core.tensor_parallel.random",
        name="_get_cuda_rng_state",
        make=_always(no_gpu_rng.get_state),
        reason="reads the GPU's generator, for dropout and for activation recompute",
    ),
    Patch(
        owner="megatron.core.tensor_parallel.random",
        name="_set_cuda_rng_state",
        make=_always(no_gpu_rng.set_state),
        reason="writes the GPU's generator",
    ),
    Patch(
        owner="megatron.core.tensor_parallel.random:CudaRNGStatesTracker",
        name="fork",
        make=_always(no_gpu_rng.fork),
        reason="warns at every use that the CPU's generator has changed, which is intended here",
    ),
    Patch(
        owner="megatron.core.distributed.param_and_grad_buffer",
        name="torch",
        make=no_streams,
        reason="from 0.19 on DDP asks for the current stream before every sum of gradients",
    ),
    Patch(
        owner="megatron.core.transformer.moe.token_dispatcher",
        name="torch",
        make=no_streams,
        reason="copies token counts to the CPU on a separate stream (MoEAlltoAllTokenDispatcher)",
    ),
    Patch(
        owner="megatron.core.dist_checkpointing.mapping:ShardedTensor",
        name="init_data",
        make=lambda init_data: lambda self, device, *args, **kwargs: init_data(self, _CPU, *args, **kwargs),
        reason='called with "cuda" when shards are exchanged between ranks (dist_checkpointing/exchange_utils.py)',
    ),
)

BRIDGE_PATCHES: tuple[Patch, ...] = (
    Patch(
        owner="megatron.training.models.dist_utils",
        name="torch",
        make=no_streams,
        reason="Bridge's models are wrapped in DDP on a stream of their own; from megatron-core 0.19 on",
    ),
)

_NEMO_CUDA_LITERALS = (
    "nemo.collections.nlp.modules.common.megatron.clip_grads",
    "nemo.collections.nlp.modules.common.text_generation_utils",
)

NEMO_PATCHES: tuple[Patch, ...] = (
    *(
        Patch(owner=owner, name="torch", make=_cpu_torch, reason='passes device="cuda"')
        for owner in _NEMO_CUDA_LITERALS
    ),
    Patch(
        owner="nemo.collections.nlp.modules.common.megatron.megatron_init",
        name="torch",
        make=lambda torch_: stand_in(torch_, cuda=stand_in(torch_.cuda, device_count=lambda: 1)),
        reason="seeds Megatron's random states only if it counts a GPU; else building the model fails",
    ),
    Patch(
        owner="nemo.collections.nlp.models.language_modeling.megatron_base_model:MegatronBaseModel",
        name="setup_transformer_engine_cp_groups",
        make=_noop,
        reason="opens a CUDA stream for Transformer Engine's context parallelism, even if neither is used",
    ),
    Patch(
        owner="lightning.fabric.utilities.device_dtype_mixin:_DeviceDtypeModuleMixin",
        name="cuda",
        make=_always(lambda module, *_args, **_kwargs: module),
        reason="MegatronGPTModel.generate sends the model to the GPU (nemo/.../megatron_gpt_model.py)",
    ),
    Patch(
        owner="nemo.core.optim.optimizer_with_main_params:MainParamsOptimizerWrapper",
        name="__init__",
        make=with_cuda_type_names,
        reason="compares tensor.type() with a CUDA type's name (megatron_amp_O2)",
    ),
    Patch(
        owner="nemo.core.optim.optimizers",
        name="torch",
        make=lambda torch_: stand_in(torch_, cuda=stand_in(torch_.cuda, is_available=lambda: True)),
        reason="refuses fused_adam, the default of NeMo's configs, without a GPU",
    ),
)
