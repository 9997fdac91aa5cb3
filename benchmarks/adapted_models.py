# SPDX-License-Identifier: Apache-2.0
"""Builds the models that the benchmarks compare, on any parallel layout, and counts their FLOPs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

# Functions import torch, Megatron and NeMo themselves: after the number of threads is set, and after `prepare`.
if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig
    from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import ParallelLinearAdapter
    from torch import nn

    from nemo_tied_lora import Adapter

__all__ = [
    "VARIANTS",
    "NemoLora",
    "Sizes",
    "adapter_flops",
    "add_nemo",
    "add_ours",
    "build_llama",
    "build_model",
    "build_variants",
    "frozen",
    "frozen_flops",
    "share_weights",
    "thin_products",
]

VARIANTS = ("frozen", "nemo", "ours")
PATHS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def _size(default: int, what: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": what})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the model. A microbatch is one sequence."""

    layers: int = _size(6, "transformer layers")
    hidden: int = _size(512, "hidden width")
    ffn: int = _size(2048, "width inside the MLP")
    heads: int = _size(8, "attention heads")
    sequence: int = _size(512, "tokens in a sequence")
    vocab: int = _size(1024, "vocabulary size")

    def linears(self) -> dict[str, tuple[int, int]]:
        """Target to (in, out). Each layer has one linear per target."""
        return {
            "linear_qkv": (self.hidden, 3 * self.hidden),
            "linear_proj": (self.hidden, self.hidden),
            "linear_fc1": (self.hidden, self.ffn),
            "linear_fc2": (self.ffn, self.hidden),
        }


def frozen_flops(sizes: Sizes) -> int:
    """FLOPs of the frozen model's matrix products, forward and backward. A multiplication and an addition are 2.

    A frozen linear and the output layer: 2 T in out forward, and 2 T in out for the gradient of the input. Weights
    have no gradient. Attention: scores and context, 2 T T hidden each, and two gradients of that cost for each. The
    half that the causal mask hides is computed too.
    """
    tokens = sizes.sequence
    linears = sum(4 * tokens * width_in * width_out for width_in, width_out in sizes.linears().values())
    attention = 3 * (2 * 2 * tokens * tokens * sizes.hidden)
    return sizes.layers * (linears + attention) + 4 * tokens * sizes.hidden * sizes.vocab


def adapter_flops(sizes: Sizes, rank: int) -> int:
    """FLOPs of the adapter's products, forward and backward: 6 T r (in + out) per linear.

    h = A x and B h; grad_h and grad_B; grad_x and grad_A: 2 T r in or 2 T r out each.
    """
    return sizes.layers * sum(6 * sizes.sequence * rank * sum(widths) for widths in sizes.linears().values())


class NemoLora:
    """A mixin in front of a Megatron linear's class: output + adapter(input), as in NeMo's mcore_mixins.py.

    NeMo's attention mixin does not run on the megatron-core that NeMo is paired with: its forward lacks
    `inference_context`. The measured layer is NeMo's; only these lines around it are ours.
    """

    nemo_lora: nn.Module

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        return output + self.nemo_lora(self.adapter_input(input_)), bias

    def adapter_input(self, input_: torch.Tensor) -> torch.Tensor:
        """The adapter's input, from the linear's input."""
        return input_


def build_model(sizes: Sizes, seed: int, base: GPTModel | None = None, *, sequence_parallel: bool = False) -> GPTModel:
    """This rank's part of a frozen float32 GPT, on Megatron's current layout.

    Backward reaches the embedding's output. With `base`, the model uses the memory of the base's weights.
    """
    import torch
    from megatron.core import tensor_parallel

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    config = {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": sizes.ffn,
        "num_attention_heads": sizes.heads,
        "sequence_parallel": sequence_parallel,
    }
    model = _gpt(config, "LayerNorm", vocab_size=sizes.vocab, max_sequence_length=sizes.sequence)
    if base is not None:
        share_weights(model, base)
    return frozen(model)


def build_llama(cfg: Mapping[str, Any]) -> GPTModel:
    """A Llama style GPT of NeMo's keys, frozen, in bfloat16 on the CPU, with random weights that cost little time to draw.

    Backward reaches the embedding's output.
    """
    import torch

    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    config = {
        **{name: cfg[name] for name in names},
        "perform_initialization": False,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "activation_func": torch.nn.functional.silu,
    }
    sizes = {"vocab_size": cfg["override_vocab_size"], "max_sequence_length": cfg["encoder_seq_length"]}
    model = _gpt(config, "RMSNorm", **sizes, position_embedding_type="rope", share_embeddings_and_output_weights=True)
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    for parameter in model.parameters():
        flat = parameter.data.to(torch.bfloat16).view(-1)
        for start in range(0, flat.numel(), numbers.numel()):
            part = flat[start : start + numbers.numel()]
            part.copy_(numbers[: part.numel()] if parameter.dim() > 1 else torch.ones(()))
        parameter.data = flat.view(parameter.shape)
    return frozen(model)


def share_weights(model: GPTModel, base: GPTModel) -> None:
    """Gives a model the memory of a base's weights."""
    for parameter, shared in zip(model.parameters(), base.parameters(), strict=True):
        parameter.data = shared.data


def frozen(model: GPTModel) -> GPTModel:
    """Freezes a model. Its backward reaches the embedding's output: without this a frozen model would have none."""
    model.requires_grad_(False)
    if model.pre_process:
        model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model.train()


def _gpt(config: Mapping[str, Any], normalization: str, **options: Any) -> GPTModel:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    stages = {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }
    spec = get_gpt_layer_local_spec(normalization=normalization)
    options = {"share_embeddings_and_output_weights": False, **stages, **options}
    return GPTModel(_transformer_config(config), spec, **options)


def _transformer_config(config: Mapping[str, Any]) -> TransformerConfig:
    """The configuration on Megatron's current layout, without what needs a GPU, and without dropout."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        **config,
    )


def add_ours(model: GPTModel, rank: int, seed: int) -> Adapter:
    """Injects Tied-LoRA `tl6` into all four linears. No factor is zero."""
    import torch

    from nemo_tied_lora import TiedLoraConfig, inject

    adapter = inject(model, TiedLoraConfig.preset("tl6", rank=rank, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        mean = 1.0 if name.endswith((".u", ".v")) else 0.0
        parameter.data.normal_(mean, 0.02, generator=generator)
    return adapter


def add_nemo(model: GPTModel, rank: int, ours: GPTModel, mixin: type = NemoLora) -> None:
    """Adds NeMo's LoRA layer to all four linears, with the update of `ours`.

    Under tensor parallelism NeMo's layer splits the rank of a column's A, and the rows of every B.
    """
    import torch
    from megatron.core import parallel_state

    tp_rank = parallel_state.get_tensor_model_parallel_rank()

    for layer, adapted in zip(model.decoder.layers, ours.decoder.layers, strict=True):
        for path in PATHS:
            linear = layer.get_submodule(path)
            A, h_scale, B = adapted.get_submodule(path).tied_lora.folded(torch.float32)
            linear.nemo_lora = _nemo_layer(linear, rank, model.config)
            whole = {"linear_in": A if h_scale is None else A * h_scale.unsqueeze(1), "linear_out": B}
            for name, factor in whole.items():
                weight = getattr(linear.nemo_lora, name).weight
                first = tp_rank * len(weight) if len(weight) < len(factor) else 0
                weight.data.copy_(factor[first : first + len(weight)])
            linear.__class__ = type(f"Nemo{type(linear).__name__}", (mixin, type(linear)), {})


def _nemo_layer(linear: Any, rank: int, config: TransformerConfig) -> ParallelLinearAdapter:
    """NeMo's layer with the arguments of its LoraPEFTConfig."""
    from megatron.core import parallel_state
    from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import ParallelLinearAdapter

    width_out, width_in = (int(width) for width in linear.weight.shape)
    is_row = type(linear).__name__.startswith("Row")
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    width_in, width_out = (width_in * tp_size, width_out) if is_row else (width_in, width_out * tp_size)
    return ParallelLinearAdapter(
        width_in,
        width_out,
        rank,
        activation="identity",
        norm_position=None,
        norm_type=None,
        column_init_method="normal",
        row_init_method="zero",
        gather_output=False,
        input_is_parallel=is_row,
        dropout=0.0,
        model_parallel_config=copy.copy(config),
        alpha=rank,
    )


def build_variants(sizes: Sizes, rank: int, seed: int) -> dict[str, GPTModel]:
    """The three models. Both adapters compute the same update."""
    base = build_model(sizes, seed)
    nemo, ours = build_model(sizes, seed, base), build_model(sizes, seed, base)
    add_ours(ours, rank, seed)
    add_nemo(nemo, rank, ours)
    return dict(zip(VARIANTS, (base, nemo, ours), strict=True))


def thin_products(sizes: Sizes, rank: int, seed: int) -> Callable[[], None]:
    """Returns a function that runs only the six products of `adapter_flops` for every linear. Every adapter needs them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tokens, linears = sizes.sequence, sizes.layers * list(sizes.linears().values())

    def draw(*shapes: tuple[int, int]) -> list[torch.Tensor]:
        return [torch.empty(shape).normal_(0.0, 0.02, generator=generator) for shape in shapes]

    tensors = [
        draw((tokens, i), (tokens, i), (tokens, o), (tokens, o), (rank, i), (o, rank), (tokens, rank), (tokens, rank))
        for i, o in linears
    ]

    def run() -> None:
        for x, grad_x, y, grad_y, A, B, h, grad_h in tensors:
            torch.mm(x, A.t(), out=h)
            y.addmm_(h, B.t())
            torch.mm(grad_y, B, out=grad_h)
            torch.mm(h.t(), grad_y)  # the faster order for the gradient of B
            torch.mm(grad_h.t(), x)
            grad_x.addmm_(grad_h, A)

    return run
