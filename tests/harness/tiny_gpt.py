# SPDX-License-Identifier: Apache-2.0
"""A tiny real megatron-core GPT. Its weights depend only on their global name and position, so all layouts have the same.

A HybridModel whose pattern is paired (see `nemo_tied_lora.adapter.layer_numbers`) has the weights of the GPTModel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_tied_lora.adapter.layer_numbers import LayerNumbers
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.sharding import shard

__all__ = ["SEQUENCE", "VOCAB", "build_gpt", "fill", "full_tensor"]

VOCAB = 32
SEQUENCE = 12


def build_gpt(
    *,
    num_layers: int = 4,
    hidden: int = 24,
    heads: int = 4,
    groups: int | None = None,
    ffn: int = 40,
    llama: bool = False,
    dtype: torch.dtype = torch.float64,
    vp_stage: int | None = None,
    idle_expert: int | None = None,
    without: dict[int, str] | None = None,
    core_attention: type | None = None,
    pattern: str | None = None,
    **options: Any,
) -> Any:
    """Builds this rank's chunk of a GPT, filled with fixed numbers.

    Args:
        llama: Llama style (gated MLP, RMSNorm, RoPE, no biases); else GPT-2 style.
        idle_expert: an expert that gets no token.
        without: layers, from 0, that have no "attention" or no "mlp".
        core_attention: replaces Megatron's core attention.
        pattern: builds a HybridModel with this pattern, not a GPTModel. num_layers has no meaning then.
        options: more fields of `TransformerConfig`. num_moe_experts makes a mixture of experts, in which
            moe_layer_freq selects the dense layers.
    """
    config = TransformerConfig(
        num_layers=num_layers if pattern is None else len(pattern.replace("|", "")),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups or heads,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        gated_linear_unit=llama,
        add_bias_linear=not llama,
        normalization="RMSNorm" if llama else "LayerNorm",
        activation_func=torch.nn.functional.silu if llama else torch.nn.functional.gelu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        attention_softmax_in_fp32=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        **options,
    )
    normalization = "RMSNorm" if llama else None
    spec: Any = get_gpt_layer_local_spec(normalization=normalization)
    if config.num_moe_experts is not None:
        spec = get_gpt_decoder_block_spec(config, False, normalization, vp_stage=vp_stage)
    if core_attention is not None:
        spec.submodules.self_attention.submodules.core_attention = core_attention
    if without is not None:
        spec = _spec_without(spec, config, without, vp_stage)
    kind: Any = GPTModel
    if pattern is not None:
        from tests.harness.tiny_hybrid import hybrid_model, hybrid_spec

        kind, spec = hybrid_model(pattern), hybrid_spec(spec)
    model = kind(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope" if llama else "learned_absolute",
        vp_stage=vp_stage,
    ).to(dtype)
    fill(model)
    if idle_expert is not None:
        _keep_idle(model, idle_expert)
    return model


def fill(model: Any) -> None:
    """Sets every base parameter to this rank's part of a whole tensor that depends only on the global name."""
    at = LayerNumbers.of(model).at
    layers = {f"decoder.layers.{i}.": at(layer.layer_number - 1) for i, layer in enumerate(model.decoder.layers)}
    gated = model.config.gated_linear_unit
    for name, parameter in model.named_parameters():
        for local, number in layers.items():
            if name.startswith(local):
                name = f"decoder.layers.{number}." + name.removeprefix(local)
                break  # the new name may be the local name of another layer
        name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")  # HybridModel's name and GPTModel's
        blocks = 2 if gated and "linear_fc1" in name else 1
        parameter.data.copy_(_rank_part(name, parameter, blocks))


def full_tensor(name: str, shape: tuple[int, ...], scale: float = 0.3) -> torch.Tensor:
    """Normally distributed numbers that depend only on the name and the shape, in float64."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.float64).normal_(0.0, scale, generator=generator)


def _spec_without(spec: Any, config: TransformerConfig, without: dict[int, str], vp_stage: int | None) -> Any:
    """The spec of this chunk's layers, some of them without attention or MLP."""
    identity = {
        "attention": {"input_layernorm": IdentityOp, "self_attention": IdentityOp, "self_attn_bda": IdentityFuncOp},
        "mlp": {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp},
        "nothing": {},
    }
    first = get_transformer_layer_offset(config, vp_stage)
    missing = [without.get(first + i, "nothing") for i in range(get_num_layers_to_build(config, vp_stage))]
    specs = [
        dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **identity[what]))
        for what in missing
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=WrappedTorchNorm)


def _keep_idle(model: GPTModel, expert: int) -> None:
    """Makes all routers choose other experts.

    Megatron's own way is a bias. It needs float32 sigmoids, whose last bit depends on the token's position in the batch.
    """
    for layer in model.decoder.layers:
        router = getattr(layer.mlp, "router", None)
        if router is not None:

            def gating(tokens: torch.Tensor, gating: Any = router.gating) -> torch.Tensor:
                logits = gating(tokens)
                return logits.index_fill(-1, torch.tensor([expert]), -1e4)

            router.gating = gating


def _rank_part(name: str, parameter: torch.Tensor, blocks: int) -> torch.Tensor:
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    if re.search(r"norm.*weight", name):
        return 1.0 + full_tensor(name, tuple(parameter.shape))
    dim = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
    if dim < 0 or tp_size == 1:
        return full_tensor(name, tuple(parameter.shape))
    shape = list(parameter.shape)
    shape[dim] *= tp_size
    full = full_tensor(name, tuple(shape))
    # The base splits weights on dim 0 or dim 1. `shard` splits A of a row linear on dim 1 and v of a column linear on dim 0.
    factor, kind = ("A", "row") if dim == 1 else ("v", "column")
    linear = LinearShape(kind, shape[-1], shape[0], blocks, ())
    return shard(full, factor, linear, parallel_state.get_tensor_model_parallel_rank(), tp_size)
