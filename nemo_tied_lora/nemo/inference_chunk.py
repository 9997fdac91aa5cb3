# SPDX-License-Identifier: Apache-2.0
"""A stage's chunk made ready for inference, and restored at the end.

While the context is open, the attentions of the chunk use `InferenceAttention`, RoPE is left to them, the chunk returns
hidden states instead of logits, and, under autocast, linears hold their weights in the half precision that autocast would
make of them at each forward (the numbers are the same).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.nemo.inference_attention import InferenceAttention, KeyValueCache, NoRotation, Pass, Running

__all__ = ["InferenceChunk"]

_POSITIONS = ("learned_absolute", "rope", "none")


class InferenceChunk:
    """A context around this rank's chunk (a GPTModel). `hidden` and `logits` run it, without gradients.

    Raises:
        ConfigError: the model or its layout has what inference does not compute; every rank raises the same.
    """

    def __init__(self, chunks: Any) -> None:
        chunks = chunks if isinstance(chunks, (list, tuple)) else [chunks]
        _check(chunks)
        self._chunk: Any = chunks[0]
        self._config: Any = self._chunk.config
        self._running = Running()
        self._undo = ExitStack()
        self._angles: torch.Tensor | None = None
        self._output_weight: torch.Tensor | None = None
        self.device: torch.device = next(self._chunk.parameters()).device
        self.first: bool = self._chunk.pre_process
        self.last: bool = self._chunk.post_process
        self.hidden_size: int = self._config.hidden_size
        wide = self._config.enable_autocast or self._config.fp32_residual_connection
        self.dtype: torch.dtype = torch.float32 if wide else self._config.params_dtype
        """Of hidden states between stages: that of the sums between layers, so nothing is rounded on the way."""

    def __enter__(self) -> InferenceChunk:
        with ExitStack() as undo:
            self._prepare(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    def hidden(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        received: torch.Tensor | None = None,
        *,
        used: int,
        cache: KeyValueCache | None = None,
        grows: bool = False,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the layers of this stage. Returns hidden states (S, N, hidden), after the last norm on the last stage.

        Args:
            tokens: (N, S). positions: (N, S), or (1, S) if all rows have the same.
            received: the previous stage's hidden states (S, N, hidden); None on the first stage.
            used: the largest position, plus 1.
            cache: takes the keys and values of the tokens.
            grows: the cache holds the rows' prompts already, and each row has one new token, S = 1.
            mask: as of `Pass`, for tokens that do not see all tokens before them.
        """
        self._running.now = Pass(
            rotation=self._rotation(positions, used),
            mask=_up_to(positions, used) if grows else mask,
            cache=cache,
            positions=positions[:, 0] if grows else None,
            used=used,
        )
        self._chunk.set_input_tensor(received)
        with torch.no_grad(), self._autocast():
            ids = tokens if self.first else None
            output: torch.Tensor = self._chunk(ids, positions.expand_as(tokens), None)
        return output

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocabulary / TP) of hidden states (n, hidden), on the last stage."""
        with torch.no_grad(), self._autocast():
            output, _ = self._chunk.output_layer(
                hidden.unsqueeze(1), weight=self._output_weight, runtime_gather_output=False
            )
        return output.squeeze(1)

    def _prepare(self, undo: ExitStack) -> None:
        undo.callback(self._chunk.train, self._chunk.training)
        self._chunk.eval()
        undo.callback(self._chunk.set_input_tensor, None)
        for layer in self._chunk.decoder.layers:
            attention: Any = getattr(layer, "self_attention", None)
            if hasattr(attention, "core_attention"):
                _swap_module(undo, attention, "core_attention", self._attention(attention.layer_number))
        if self._chunk.position_embedding_type == "rope":
            self._rotary = self._chunk.rotary_pos_emb
            _swap_module(undo, self._chunk, "rotary_pos_emb", NoRotation())
        if self.last:
            undo.callback(setattr, self._chunk, "post_process", True)
            self._chunk.post_process = False  # hidden states are returned; `logits` takes those that it needs
        self._hold_half_weights(undo)

    def _attention(self, layer_number: int) -> InferenceAttention:
        config = self._config
        without = getattr(config, "no_rope_freq", None)
        return InferenceAttention(
            self._running,
            layer_number,
            config.softmax_scale,
            rotates=not (without and without[layer_number - 1]),
            interleaved=config.rotary_interleaved,
        )

    def _hold_half_weights(self, undo: ExitStack) -> None:
        config = self._config
        dtype = config.autocast_dtype if config.enable_autocast else None
        if self.first and self.last and self._chunk.share_embeddings_and_output_weights:
            undo.callback(setattr, self, "_output_weight", None)
            self._output_weight = self._chunk.embedding.word_embeddings.weight.detach().to(dtype)
        for module in self._chunk.modules() if dtype else ():
            weight = module._parameters.get("weight")
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and weight is not None:
                undo.callback(module._parameters.__setitem__, "weight", weight)
                module._parameters["weight"] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)

    def _rotation(self, positions: torch.Tensor, used: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines (S, N or 1, 1, rotated width) of positions (N or 1, S), all below `used`."""
        if self._chunk.position_embedding_type != "rope":
            return None
        if self._angles is None or self._angles.shape[0] < used:
            self._angles = self._rotary(2 * used)[:, 0, 0].to(self.device)
        angles = self._angles[positions.t()].unsqueeze(2)
        return angles.cos(), angles.sin()

    def _autocast(self) -> Any:
        config = self._config
        if not config.enable_autocast:
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=config.autocast_dtype)


def _up_to(positions: torch.Tensor, used: int) -> torch.Tensor:
    """A mask (N, 1, 1, used): a token sees the slots up to its position (N, 1)."""
    slots = torch.arange(used, device=positions.device)
    return (slots <= positions)[:, None, None]


def _swap_module(undo: ExitStack, owner: nn.Module, name: str, module: nn.Module) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, module)


def _check(chunks: Any) -> None:
    config = chunks[0].config
    problems = Problems()
    if len(chunks) > 1:
        problems.append(
            f"virtual_pipeline_model_parallel_size={len(chunks)}: inference needs one chunk a stage; set it to null, the "
            "weights are the same"
        )
    if config.sequence_parallel:
        problems.append("sequence_parallel=true: inference does without; set it to false, the weights are the same")
    if (size := parallel_state.get_context_parallel_world_size()) > 1:
        problems.append(f"context_parallel_size={size}: inference reads each row on one rank; set it to 1")
    kind = getattr(chunks[0], "position_embedding_type", None)
    if kind not in _POSITIONS:
        problems.append(f"position_embedding_type={kind}: inference knows {', '.join(_POSITIONS)}")
    for name, plain in (("multi_latent_attention", False), ("window_size", None), ("softmax_type", "vanilla")):
        value = getattr(config, name, plain)
        if value != plain:
            problems.append(f"{name}={value}: inference computes only attention with {name}={plain}")
    if getattr(chunks[0], "mtp_process", False):
        problems.append("mtp_num_layers: inference does not compute layers that predict several tokens")
    problems.raise_if_any()
