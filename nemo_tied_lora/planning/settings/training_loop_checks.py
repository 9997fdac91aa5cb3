# SPDX-License-Identifier: Apache-2.0
"""Refuses settings with which NeMo 2.4 or megatron-core would train a tied adapter wrongly, or would fail.

Each message names the setting and what to change. Imports neither torch nor NeMo.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_tied_lora.errors import Problems, is_whole_number
from nemo_tied_lora.planning.megatron_version import counts_repeated_gradients

__all__ = ["FLOAT32_UNDER_O2", "check_ddp", "check_loop", "loop_problems"]

# NeMo's O2 optimizer (MainParamsOptimizerWrapper) averages its bucket of 16-bit parameters' gradients alone.
FLOAT32_UNDER_O2 = (
    "not possible with megatron_amp_O2=true, whose optimizer would not average a float32 adapter's gradients over "
    "data-parallel ranks; leave dtype null (O2 steps a float32 copy of the adapter anyway), or set "
    "model.optim.name=mcore_distributed_optim"
)


def loop_problems(model: Mapping[str, Any]) -> Iterator[str]:
    """Yields one line per setting of a NeMo model's configuration that cannot work.

    Args:
        model: the section `model`, with `optim`.
    """
    optim = model.get("optim") or {}
    name = str(optim.get("name"))
    cp_size = model.get("context_parallel_size") or 1
    distributed = name == "mcore_distributed_optim"
    if name == "distributed_fused_adam":
        # apex's optimizer takes each gradient in a hook, before the stages' gradients are summed.
        yield (
            "model.optim.name=distributed_fused_adam: not possible; it would leave tied gradients unsummed over pipeline "
            "stages; use mcore_distributed_optim, or fused_adam"
        )
    if model.get("megatron_amp_O2") and not distributed and is_whole_number(cp_size, 2):
        # NeMo multiplies the loss by the context-parallel size, and this optimizer's sums do not divide by it.
        yield (
            f"model.megatron_amp_O2=true: not possible with context_parallel_size={cp_size}; NeMo's O2 optimizer would make "
            "every gradient that many times too large; set it to false, or model.optim.name=mcore_distributed_optim"
        )
    if _tied_lora_dtype(model) and model.get("megatron_amp_O2") and optim.get("name") and not distributed:
        yield f"model.peft.tied_lora.dtype={_tied_lora_dtype(model)}: {FLOAT32_UNDER_O2}"
    recompute = model.get("activations_checkpoint_granularity")
    if distributed and optim.get("overlap_grad_sync") and _repeats_gradients(recompute, ()):
        yield (
            "model.optim.overlap_grad_sync=true: not possible with activations_checkpoint_granularity=full; megatron-core "
            "before 0.16 asserts 'Cannot set grad twice' for a parameter of several layers; set one of them to false, null"
        )


def check_loop(model: Mapping[str, Any]) -> None:
    """Raises the problems of `loop_problems`.

    Raises:
        ConfigError: with all problems.
    """
    Problems(loop_problems(model)).raise_if_any()


def check_ddp(transformer_config: Any, ddp_config: Any) -> None:
    """Checks an adapted model of your own loop, after `inject` and before megatron-core's DistributedDataParallel wraps it.

    Args:
        transformer_config: the object that you pass to `DistributedDataParallel` as `config`: the model's own.
        ddp_config: the `DistributedDataParallelConfig`.

    Raises:
        ConfigError: with all problems. `transformer_config` lacks the flag `has_cond_embedder` that `inject` sets on the
            model's own object, so `finalize_model_grads` would not sum tied gradients over stages: it is a copy, or
            nothing is injected yet. Or `overlap_grad_reduce` meets a recomputation that runs a tied parameter's gradient
            hook once per layer, on a megatron-core before 0.16.
    """
    problems = Problems()
    if getattr(transformer_config, "has_cond_embedder", None) is not True:
        problems.append(
            "config: this object has no has_cond_embedder=True, by which finalize_model_grads sums tied gradients over "
            "pipeline stages; call inject first, then pass the model's own config (models[0].config), not a copy made "
            "before inject"
        )
    granularity = getattr(transformer_config, "recompute_granularity", None)
    modules = getattr(transformer_config, "recompute_modules", None) or ()
    if getattr(ddp_config, "overlap_grad_reduce", False) and _repeats_gradients(granularity, modules):
        what = "full" if granularity == "full" else f"selective with recompute_modules={list(modules)}"
        fix = (
            "set overlap_grad_reduce=False, or recompute_granularity='selective' with recompute_modules=['core_attn']"
        )
        problems.append(
            f"overlap_grad_reduce=True: not possible with recompute_granularity={what} before megatron-core 0.16; {fix}"
        )
    problems.raise_if_any()


def _tied_lora_dtype(model: Mapping[str, Any]) -> Any:
    """The run's `model.peft.tied_lora.dtype`; None without an adapter."""
    peft = model.get("peft")
    section = peft.get("tied_lora") if isinstance(peft, Mapping) and peft.get("peft_scheme") == "tied_lora" else None
    return section.get("dtype") if isinstance(section, Mapping) else None


def _repeats_gradients(granularity: Any, modules: Any) -> bool:
    """Whether a tied parameter's gradient arrives in several parts, and DDP counts each part as a gradient."""
    if counts_repeated_gradients():
        return False
    return granularity == "full" or (granularity == "selective" and bool({"mlp", "moe"} & set(modules)))
