# SPDX-License-Identifier: Apache-2.0
"""The switch for a machine without NVIDIA's apex, with or without a GPU.

megatron-core has its own substitutes for apex's kernels. NeMo 2.4 has none and refuses to start, so this module gives
NeMo megatron-core's. It changes nothing if apex can be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from nemo_tied_lora.platform import detect
from nemo_tied_lora.platform.group_step_adam import GroupStepAdam, GroupStepAdamW
from nemo_tied_lora.platform.no_gpu_norm import allow_sequence_parallel
from nemo_tied_lora.platform.patching import Patch, apply

__all__ = ["MEGATRON_PATCHES", "NEMO_PATCHES", "enable"]


def enable(*, nemo: bool) -> tuple[str, ...]:
    """Makes Megatron (and NeMo, with ``nemo=True``) run without apex.

    Returns:
        The names that were replaced; empty if apex is installed.
    """
    if detect.has_apex():
        return ()
    done = apply(MEGATRON_PATCHES)
    return done + apply(NEMO_PATCHES) if nemo else done


class _NoSuchOptimizer:
    """Replaces apex's distributed Adam in ``isinstance`` checks: no object is an instance."""


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _original: value


def _multi_tensor_applier(_original: Any) -> Any:
    from megatron.core.utils import local_multi_tensor_applier

    return local_multi_tensor_applier


def _amp_c(_original: Any) -> SimpleNamespace:
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    return SimpleNamespace(multi_tensor_l2norm=local_multi_tensor_l2_norm, multi_tensor_scale=local_multi_tensor_scale)


def _tensor_parallel_defaults(_original: Any) -> Any:
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes

    return set_defaults_if_not_set_tensor_model_parallel_attributes


def _mcore_optimizer(_original: Any) -> Any:
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    return McoreDistributedOptimizer


def _listify(model: Any) -> list[torch.nn.Module]:
    return model if isinstance(model, list) else [model]


def _torch_optimizers(optimizers: dict[str, Any]) -> dict[str, Any]:
    optimizers.update(adam=GroupStepAdam, adamw=GroupStepAdamW, fused_adam=GroupStepAdamW)
    return optimizers


MEGATRON_PATCHES: tuple[Patch, ...] = (
    Patch(
        owner="megatron.core.transformer.torch_norm:WrappedTorchNorm",
        name="__new__",
        make=allow_sequence_parallel,
        reason="the local spec's substitute for apex's norm refuses sequence parallelism",
    ),
)

_NLP = "nemo.collections.nlp"
_MEGATRON = f"{_NLP}.modules.common.megatron"

NEMO_PATCHES: tuple[Patch, ...] = (
    Patch(
        owner=f"{_NLP}.parts.nlp_overrides",
        name="HAVE_APEX",
        make=_always(True),
        reason="NLPDDPStrategy.__init__ raises without apex",
    ),
    Patch(
        owner=f"{_NLP}.parts.nlp_overrides",
        name="McoreDistributedOptimizer",
        make=_mcore_optimizer,
        reason="its import shares a try block with apex's optimizer, and saving a checkpoint needs the name",
    ),
    Patch(
        owner=f"{_NLP}.parts.nlp_overrides",
        name="MegatronDistributedFusedAdam",
        make=_always(_NoSuchOptimizer),
        reason="saving a checkpoint asks whether the optimizer is one",
    ),
    Patch(
        owner=f"{_MEGATRON}.build_model",
        name="set_defaults_if_not_set_tensor_model_parallel_attributes",
        make=_tensor_parallel_defaults,
        reason="apex's name; megatron-core has the same function",
    ),
    *(
        Patch(owner=owner, name=name, make=make, reason="apex's kernels for lists of tensors (clipping, O2)")
        for owner in (f"{_MEGATRON}.clip_grads", "nemo.core.optim.optimizer_with_main_params")
        for name, make in (("multi_tensor_applier", _multi_tensor_applier), ("amp_C", _amp_c))
    ),
    Patch(
        owner="nemo.core.optim.optimizer_with_main_params",
        name="HAVE_APEX",
        make=_always(True),
        reason="megatron_amp_O2 raises without apex",
    ),
    *(
        Patch(
            owner=f"{_MEGATRON}.utils",
            name=name,
            make=_always(value),
            reason="get_params_for_weight_decay_optimization",
        )
        for name, value in (
            ("listify_model", _listify),
            ("FusedLayerNorm", torch.nn.LayerNorm),
            ("FastLayerNorm", torch.nn.LayerNorm),
            ("MixedFusedRMSNorm", torch.nn.RMSNorm),
        )
    ),
    Patch(
        owner="nemo.core.optim.optimizers",
        name="AVAILABLE_OPTIMIZERS",
        make=_torch_optimizers,
        reason="fused_adam, the default of NeMo's configs, is apex's kernel for AdamW; and adam and adamw cannot be saved",
    ),
)
