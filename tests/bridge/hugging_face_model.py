# SPDX-License-Identifier: Apache-2.0
"""Bridge's model of a Hugging Face folder, on this rank's part of the layout, with layers that a CPU can run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from tests.bridge.cpu_mamba import CpuMamba
from tests.harness.tiny_hybrid import hybrid_spec

__all__ = ["load_through_bridge", "on_a_cpu"]

_OFF = (
    *("gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion"),
    *("persist_layer_norm", "apply_rope_fusion", "moe_permute_fusion", "moe_router_fusion", "moe_grouped_gemm"),
    "moe_shared_expert_overlap",
)


def load_through_bridge(folder: Path, peft: Any) -> tuple[Any, list[Any]]:
    """Returns the bridge, and the model in float32 with the folder's weights and then the adapter."""
    bridge = AutoBridge.from_hf_pretrained(str(folder))
    provider = bridge.to_megatron_provider()
    on_a_cpu(provider)
    provider.tensor_model_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
    provider.pipeline_model_parallel_size = parallel_state.get_pipeline_model_parallel_world_size()
    provider.pipeline_dtype = torch.float32
    provider.should_pad_vocab = True  # as Bridge's own training does
    provider.finalize()
    provider.register_pre_wrap_hook(peft)
    model = provider.provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=True, fp16=False, bf16=False
    )
    return bridge, model


def on_a_cpu(provider: Any) -> None:
    """Sets layers and options that need no GPU."""
    if hasattr(provider, "hybrid_stack_spec"):
        provider.hybrid_stack_spec = hybrid_spec(get_gpt_layer_local_spec(normalization="RMSNorm"), CpuMamba)
        provider.activation_func = squared_relu
    else:
        provider.transformer_layer_spec = _local_spec
    for name in _OFF:
        setattr(provider, name, False)
    provider.moe_token_dispatcher_type = "allgather"


def _local_spec(config: Any, vp_stage: int | None = None) -> Any:
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization=config.normalization, qk_layernorm=config.qk_layernorm
    )
    if not config.layernorm_zero_centered_gamma:
        return spec
    norms = {"input_layernorm": ZeroCentredNorm, "pre_mlp_layernorm": ZeroCentredNorm}
    layer = dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **norms))
    layers = [layer] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=ZeroCentredNorm)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Megatron's own is compiled, which takes seconds on a CPU."""
    return torch.nn.functional.relu(x).square()


class ZeroCentredNorm(torch.nn.RMSNorm):
    """RMSNorm times 1 + weight, as in Gemma. Transformer Engine has it; megatron-core's own layers do not."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_options: Any):
        super().__init__(hidden_size, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)
