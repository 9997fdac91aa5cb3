# SPDX-License-Identifier: Apache-2.0
"""The switch for a machine without Transformer Engine: megatron-core's local layers, in NeMo too.

Checked with megatron-core 0.13.1, 0.16.1 and 0.19.2, and with NeMo 2.4.1.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from nemo_tied_lora.platform import detect
from nemo_tied_lora.platform.patching import Patch, apply

__all__ = ["HYBRID_PATCHES", "MEGATRON_PATCHES", "NEMO_PATCHES", "enable"]


def enable(*, nemo: bool) -> tuple[str, ...]:
    """Makes megatron-core (and NeMo, with ``nemo=True``) run without Transformer Engine.

    Returns:
        The names that were replaced; empty if Transformer Engine is installed.
    """
    if detect.has_transformer_engine():
        return ()
    done = apply(MEGATRON_PATCHES)
    if importlib.util.find_spec("megatron.core.models.hybrid") is not None:  # from megatron-core 0.19 on
        done += apply(HYBRID_PATCHES)
    return done + (apply(NEMO_PATCHES) if nemo else ())


def _local_norm(_norm: Any) -> Any:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return WrappedTorchNorm


def _local_specs(_get_specs: Any) -> Callable[..., Any]:
    from megatron.core.models.gpt import gpt_layer_specs

    def get_specs(
        spec_name: str, transformer_config: Any = None, use_te: bool = True, *_args: Any, **_kwargs: Any
    ) -> Any:
        if use_te or spec_name not in ("", "decoder_block_gpt"):
            raise ValueError(
                f"model.transformer_engine={use_te} with model.name={spec_name!r} needs Transformer Engine, which is not "
                'installed: set model.transformer_engine=False and model.name=""'
            )
        if spec_name == "decoder_block_gpt":
            return gpt_layer_specs.get_gpt_decoder_block_spec(transformer_config, use_transformer_engine=False)
        return gpt_layer_specs.get_gpt_layer_local_spec(
            getattr(transformer_config, "num_moe_experts", None),
            getattr(transformer_config, "moe_grouped_gemm", False),
            normalization=getattr(transformer_config, "normalization", None),
        )

    return get_specs


def _with_process_groups(provide: Callable[..., Any]) -> Callable[..., Any]:
    def model_provider_func(model: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.core import parallel_state

        # Ask Megatron, not torch: a launcher's checks may have made torch's default group already.
        if not parallel_state.is_initialized():
            strategy = model.trainer.strategy
            if strategy.launcher is not None:
                strategy.launcher.launch(lambda: None, trainer=model.trainer)
            strategy.setup_environment()
        return provide(model, *args, **kwargs)

    return model_provider_func


MEGATRON_PATCHES: tuple[Patch, ...] = (
    Patch(
        owner="megatron.core.transformer.moe.moe_utils",
        name="te_general_gemm",
        make=lambda original: original,
        reason="a mixture's router checks whether this is None, but the name does not exist if its import failed",
    ),
)

HYBRID_PATCHES: tuple[Patch, ...] = (
    Patch(
        owner="megatron.core.models.hybrid.hybrid_block",
        name="TENorm",
        make=_local_norm,
        reason="a HybridModel's last norm is Transformer Engine's, whatever its spec says",
    ),
)

NEMO_PATCHES: tuple[Patch, ...] = (
    Patch(
        owner="nemo.collections.nlp.models.language_modeling.megatron_gpt_model",
        name="get_specs",
        make=_local_specs,
        reason="builds all specs, including Transformer Engine's, before it picks one",
    ),
    Patch(
        owner="nemo.collections.nlp.models.language_modeling.megatron_gpt_model:MegatronGPTModel",
        name="model_provider_func",
        make=_with_process_groups,
        reason="megatron-core's own attention needs the tensor-parallel group (transformer/dot_product_attention.py), "
        "which NeMo makes when training starts; only restoring a .nemo makes it earlier",
    ),
)
