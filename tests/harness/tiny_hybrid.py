# SPDX-License-Identifier: Apache-2.0
"""The tiny GPT as a HybridModel of megatron-core 0.19: attention and MLP as layers of their own, by a pattern.

Megatron's Mamba needs CUDA kernels. Its layer here is Megatron's `MambaLayer` with a mixer that a CPU can run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm

__all__ = ["Mixer", "hybrid_model", "hybrid_spec"]


def hybrid_model(pattern: str) -> Callable[..., Any]:
    """HybridModel with this pattern, which takes GPTModel's arguments."""
    return partial(HybridModel, hybrid_layer_pattern=pattern)


def hybrid_spec(layer: Any, mixer: type | None = None) -> ModuleSpec:
    """The spec of a HybridModel whose attention and MLP are those of a GPTModel's layer. mixer: Mamba's; None: `Mixer`."""
    no_attention = {"input_layernorm": IdentityOp, "self_attention": IdentityOp, "self_attn_bda": IdentityFuncOp}
    no_mlp = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}
    mamba = MambaLayerSubmodules(
        norm=WrappedTorchNorm, mixer=ModuleSpec(mixer or Mixer), mamba_bda=get_bias_dropout_add
    )
    return ModuleSpec(
        HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(MambaLayer, submodules=mamba),
            attention_layer=_without(layer, no_mlp),
            mlp_layer=_without(layer, no_attention),
        ),
    )


def _without(layer: Any, parts: dict[str, Any]) -> Any:
    return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, **parts))


class Mixer(MegatronModule):
    """A mixer with the linears of Mamba's: y = out_proj(g z), z a decaying sum of in_proj's other half over the sequence."""

    def __init__(self, config: Any, d_model: int, pg_collection: Any, **_options: Any):
        super().__init__(config)
        shared = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "skip_bias_add": True,
            "tp_group": pg_collection.tp,
        }
        self.in_proj = ColumnParallelLinear(d_model, 2 * d_model, gather_output=False, **shared)
        self.out_proj = RowParallelLinear(d_model, d_model, input_is_parallel=True, **shared)

    def forward(self, hidden_states: torch.Tensor, **_options: Any) -> tuple[torch.Tensor, None]:
        x, gate = self.in_proj(hidden_states)[0].unflatten(-1, (-1, 2)).unbind(-1)  # pairs, which no shard splits
        steps = torch.arange(x.shape[0])
        decay = (0.5 ** (steps[:, None] - steps)).tril().to(x.dtype)
        mixed = torch.einsum("ts,sbd->tbd", decay, x)
        return self.out_proj(mixed * torch.nn.functional.silu(gate))[0], None
