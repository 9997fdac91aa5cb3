# SPDX-License-Identifier: Apache-2.0
"""The tiny Llama of `other_release`, from Bridge's own providers, and Megatron's loop on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import get_model_config

from tests.bridge.other_release import LAYERS, SIZES, mask, tokens
from tests.harness.tiny_gpt import VOCAB, fill
from tests.harness.tiny_hybrid import hybrid_spec

__all__ = ["build", "fill_base", "logits", "provider", "train"]

Hook = Callable[[list[Any]], Any]


def provider(hybrid: bool = False) -> Any:
    """Bridge's provider of this rank's part of the model, as a GPTModel or a HybridModel with the same weights."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    kind: dict[str, Any] = {"num_layers": LAYERS, "transformer_layer_spec": lambda config: layer}
    if hybrid:
        pattern = "*-" * LAYERS
        # The second stage begins inside a pair.
        kind = {"hybrid_layer_pattern": pattern if stages == 1 else f"{pattern[:5]}|{pattern[5:]}"}
        # Its own default backend is flash, and megatron-core wants one for all models of a process.
        kind |= {"hybrid_stack_spec": hybrid_spec(layer), "bf16": False, "attention_backend": AttnBackend.auto}
    made = (HybridModelProvider if hybrid else GPTModelProvider)(
        **kind,
        hidden_size=SIZES["hidden"],
        ffn_hidden_size=SIZES["ffn"],
        num_attention_heads=SIZES["heads"],
        num_query_groups=SIZES["groups"],
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=1,  # the default pads by TP, which changes the numbers of `fill`
        seq_length=32,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,  # its gradient is rounded to bfloat16
    )
    made.finalize()
    return made


def fill_base(model: list[Any]) -> list[Any]:
    """The hook that stands for loading a base: sets every weight by its name."""
    for chunk in model:
        fill(chunk)
    return model


def build(*hooks: Hook, ddp: bool = True, post_wrap_hook: Hook | None = None, hybrid: bool = False) -> list[Any]:
    """Builds the model by `provide_distributed_model`, with these hooks before it is wrapped."""
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    return provider(hybrid).provide_distributed_model(
        ddp_config=config,
        wrap_with_ddp=ddp,
        use_cpu_initialization=True,
        fp16=False,
        bf16=False,
        pre_wrap_hook=list(hooks),
        post_wrap_hook=post_wrap_hook,
    )


def train(model: Sequence[Any], optimizer: Any, steps: int) -> list[float]:
    """Trains by Megatron's schedule and `finalize_model_grads`, two microbatches a step. Returns the gradient norms."""
    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    norms = []
    for _ in range(steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(tokens().split(2)),
            model=list(model),
            num_microbatches=2,
            seq_length=mask().shape[-1],
            micro_batch_size=2,
            forward_only=False,
        )
        norms.append(float(optimizer.step()[1]))
    return norms


def logits(model: Sequence[Any]) -> torch.Tensor:
    """(4, 12, vocab) logits of a whole model on one rank."""
    batch = tokens()[:, :-1]
    with torch.no_grad():
        return model[0](batch, _positions(batch), mask())


def _forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(batches)
    output = model(batch[:, :-1], _positions(batch[:, :-1]), mask(), labels=batch[:, 1:])

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = losses.float().mean()
        return mean, {"loss": mean.detach()}

    return output, loss


def _positions(batch: torch.Tensor) -> torch.Tensor:
    return torch.arange(batch.shape[1]).expand(len(batch), -1)
