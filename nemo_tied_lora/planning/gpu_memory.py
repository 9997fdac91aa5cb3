# SPDX-License-Identifier: Apache-2.0
"""Estimates one GPU's memory during training: the frozen base, the adapter, the activations. Builds no model.

Activations follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", arXiv
2205.05198, sections 4 and 5), written for any MLP and head sizes. Let h be hidden_size, f ffn_hidden_size, q and k the
widths of all heads and of all query groups. g is 2 for a gated MLP, else 1. T is the tensor-parallel size. S is T under
sequence parallelism, else 1. e is the bytes of an element. For each token of a microbatch, a layer keeps

==========================  ===================  =========================================
inputs of both norms        2 e h / S
inputs of linear_qkv, fc1   e h / S each         only where the layer's A of it is trained
Q, K and V                  e (q + 2 k) / T
output of the attention     e q / T              the input of linear_proj too
output of linear_fc1        e g f / T
input of linear_fc2         e f / T              only where the layer's A of it is trained
dropout masks               2 h / S              only with hidden_dropout
==========================  ===================  =========================================

With g = 1, f = 4 h, q = k = h, e = 2, dropout and every A trained, the sum is the paper's: 34 h at T = 1, h (10 + 24 / T)
without and 34 h / T with sequence parallelism. The paper keeps every linear's input for the gradient of its weight; a frozen
base has no such gradient. The attention matrix (one number per pair of tokens) is not kept, as in fused attention and in the
paper's selective recomputation.

A recomputed layer keeps only its input, e h / S. While a group of layers is recomputed, it keeps all of the above. Stage p of
P holds min(P - p, microbatches) microbatches at once. With chunks, it holds the chunks that Megatron's warm-up leaves open.
The last stage adds the inputs of the last norm and of the output layer, 2 e h / S, and the logits, in e bytes and in the 4 of
the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.adapter_cost import Precision
from nemo_tied_lora.planning.architecture import Architecture, selected_linears
from nemo_tied_lora.planning.parallel_layout import Layout, stage_layers
from nemo_tied_lora.planning.quantised_memory import QuantisedLinears, quantised_linears
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization

__all__ = ["Activations", "StageMemory", "base_parameters", "layer_bytes_per_token", "stage_memory"]

_LOSS_BYTES = 4
_VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Which activations are kept for backward, and which are recomputed.

    Raises:
        ConfigError: NeMo would not accept a value.
    """

    granularity: str | None = None
    """None or selective: keep those of every layer. full: recompute layers."""
    method: str | None = None
    """For full. uniform: all layers, num_layers at a time. block: the stage's first num_layers, one at a time."""
    num_layers: int = 1
    dropout: bool = False
    """hidden_dropout is not 0."""

    def __post_init__(self) -> None:
        problems, prefix = Problems(), "model.activations_checkpoint"
        problems.one_of(f"{prefix}_granularity", self.granularity, ("selective", "full", None))
        if self.granularity == "full" and self.method not in ("uniform", "block"):
            problems.append(f"{prefix}_method={self.method!r}: full needs uniform or block")
        problems.whole_number(f"{prefix}_num_layers", self.num_layers)
        problems.raise_if_any()

    @classmethod
    def from_model_config(cls, model: Mapping[str, Any]) -> Activations:
        """Reads NeMo's keys. A null number of layers means 1."""
        prefix = "activations_checkpoint"
        number = model.get(f"{prefix}_num_layers")
        return cls(
            granularity=model.get(f"{prefix}_granularity"),
            method=model.get(f"{prefix}_method"),
            num_layers=1 if number is None else number,
            dropout=bool(model.get("hidden_dropout")),
        )


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one GPU of a pipeline stage."""

    stage: int
    base: int
    adapter: int
    activations: int
    dequantised: int = 0
    """The peak of one linear of a quantised base."""
    quantised: QuantisedLinears | None = None
    """The part of `base` that is quantised; None: nothing is."""

    @property
    def sum(self) -> int:
        """All parts together."""
        return self.base + self.adapter + self.activations + self.dequantised

    def as_dict(self) -> dict[str, Any]:
        """The parts and their sum, as JSON values."""
        return {**asdict(self), "sum": self.sum}


def stage_memory(
    arch: Architecture,
    layout: Layout,
    config: TiedLoraConfig,
    precision: Precision,
    activations: Activations,
    adapter_bytes: int,
    quantization: BaseQuantization | None = None,
) -> StageMemory | None:
    """Returns the stage that holds most. None for a mixture of experts, or if the vocabulary's size is unknown.

    Args:
        adapter_bytes: of the adapter, its gradients and optimizer state, on the rank that holds most.
        quantization: of the base's linears; None: they have the precision's dtype.
    """
    if arch.mixture is not None or arch.vocab_size is None:
        return None
    stages = []
    for stage in range(layout.pp_size):
        base = base_parameters(arch, layout, stage) * precision.weights
        linears = None if quantization is None else quantised_linears(arch, layout, stage, precision, quantization)
        stages.append(
            StageMemory(
                stage,
                base - (linears.unquantised_bytes - linears.held_bytes if linears else 0),
                adapter_bytes,
                _activation_bytes(arch, layout, config, precision.activations, activations, stage),
                linears.peak_bytes if linears else 0,
                linears,
            )
        )
    return max(stages, key=lambda stage: stage.sum)


def base_parameters(arch: Architecture, layout: Layout, stage: int) -> int:
    """Counts the base's parameters on one rank of a stage, with Megatron's sharding and NeMo's padded vocabulary."""
    first, last = stage == 0, stage == layout.pp_size - 1
    rows = _padded_vocabulary(arch, layout) // layout.tp_size
    norm = arch.hidden_size * (2 if arch.norm_bias else 1)
    held = len(stage_layers(arch, layout)[stage]) * _layer_parameters(arch, layout.tp_size)
    # A shared embedding is on the last stage too, if that is another stage.
    copies = first + (last and not (first and arch.shared_output))
    held += rows * arch.hidden_size * copies + norm * last
    return held + arch.seq_length * arch.hidden_size * (first and arch.learned_positions)


def layer_bytes_per_token(
    arch: Architecture, layout: Layout, config: TiedLoraConfig, layer: int, element: int, *, dropout: bool = False
) -> float:
    """Returns the bytes that a layer keeps of one token."""
    tp_size, seq_size = layout.tp_size, layout.tp_size if layout.sequence_parallel else 1
    shapes = selected_linears(arch, config) if "A" in config.trained else {}
    kept = {group for group, shape in shapes.items() if layer in shape.layers}
    hidden, queries, keys = arch.hidden_size, *_attention_widths(arch)
    whole = 2 + ("linear_qkv" in kept) + ("linear_fc1" in kept)
    split = queries + 2 * keys + queries + arch.ffn_hidden_size * ((2 if arch.gated else 1) + ("linear_fc2" in kept))
    return element * (whole * hidden / seq_size + split / tp_size) + 2 * hidden / seq_size * dropout


def _activation_bytes(
    arch: Architecture,
    layout: Layout,
    config: TiedLoraConfig,
    element: int,
    activations: Activations,
    stage: int,
) -> int:
    tokens = arch.seq_length // layout.cp_size * (layout.micro_batch_size or 1)
    of_layer = [
        layer_bytes_per_token(arch, layout, config, layer, element, dropout=activations.dropout)
        for layer in stage_layers(arch, layout)[stage]
    ]
    entry = element * arch.hidden_size / (layout.tp_size if layout.sequence_parallel else 1)
    kept, working = _kept_and_recomputed(of_layer, entry, activations)
    per_token = kept * _in_flight(layout, stage) + working
    if stage == layout.pp_size - 1:
        per_token += 2 * entry + (element + _LOSS_BYTES) * _padded_vocabulary(arch, layout) / layout.tp_size
    return round(tokens * per_token)


def _kept_and_recomputed(of_layer: list[float], entry: float, activations: Activations) -> tuple[float, float]:
    """Returns (bytes kept for each microbatch, bytes held for a time in backward), both for one token."""
    if activations.granularity != "full":
        return sum(of_layer), 0.0
    number = min(activations.num_layers, len(of_layer))
    if activations.method == "block":
        return number * entry + sum(of_layer[number:]), max(of_layer[:number])
    groups = [of_layer[start : start + number] for start in range(0, len(of_layer), number)]
    return len(groups) * entry, max(map(sum, groups))


def _in_flight(layout: Layout, stage: int) -> float:
    """Returns how many microbatches' activations a stage holds at once; with chunks, this may be a fraction."""
    stages, chunks = layout.pp_size, layout.num_chunks
    microbatches = None
    if layout.micro_batch_size and layout.global_batch_size and layout.resolved_dp_size:
        microbatches = layout.global_batch_size // (layout.micro_batch_size * layout.resolved_dp_size)
    if chunks == 1:
        held: float = stages - stage
    else:
        held = (2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks
    return held if microbatches is None else min(held, microbatches)


def _layer_parameters(arch: Architecture, tp_size: int) -> int:
    queries, keys = _attention_widths(arch)
    hidden, gates = arch.hidden_size, arch.ffn_hidden_size * (2 if arch.gated else 1)
    split = hidden * (queries + 2 * keys + queries + gates + arch.ffn_hidden_size)
    split += (gates * arch.bias) + (queries + 2 * keys) * (arch.bias or arch.qkv_bias)
    norms = (2 * hidden + 2 * arch.kv_channels * arch.qk_norm) * (2 if arch.norm_bias else 1)
    return split // tp_size + 2 * hidden * arch.bias + norms


def _attention_widths(arch: Architecture) -> tuple[int, int]:
    """Returns the widths of all heads together: of Q, and of K or V."""
    return arch.kv_channels * arch.num_attention_heads, arch.kv_channels * arch.num_query_groups


def _padded_vocabulary(arch: Architecture, layout: Layout) -> int:
    multiple = _VOCABULARY_MULTIPLE * layout.tp_size
    return -(-(arch.vocab_size or 0) // multiple) * multiple
