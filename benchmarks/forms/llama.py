# SPDX-License-Identifier: Apache-2.0
"""A frozen Llama of a Hugging Face folder, with Megatron's four linears, for training adapters on few CPU cores.

The maths is that of transformers' `LlamaForCausalLM`; a test compares the logits. What makes it cheap: tokens of all
sequences follow each other without padding, except in attention; after the last attention only answer positions
are computed, and get logits; Q, K and V are one product, gate and up another. linear_qkv's rows are in Megatron's
order, so factors that a seed draws are those of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional

from .sizes import Sizes

__all__ = ["Apply", "Batch", "FrozenLlama", "at_least_float32"]

Apply = Callable[[int, str, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, target, x (T, in), W (out, in)) to y (T, out)."""


@dataclass(frozen=True)
class Batch:
    """N sequences with T tokens together, one after the other. Each lacks its last token, which is only predicted."""

    tokens: torch.Tensor  # (T,)
    places: torch.Tensor  # (T,): the token's place in a grid (N, longest)
    grid: tuple[int, int]  # (N, longest)
    answers: torch.Tensor  # (P,): the tokens after which a token of an answer comes
    targets: torch.Tensor  # (P,): that token
    owners: torch.Tensor  # (P,): the number of its sequence

    @classmethod
    def of(cls, pairs: list[tuple[list[int], list[int]]]) -> Batch:
        """Lays out pairs (prompt, answer) of token ids."""
        tokens: list[int] = []
        places: list[int] = []
        answers: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        longest = max(len(prompt) + len(answer) - 1 for prompt, answer in pairs)
        for number, (prompt, answer) in enumerate(pairs):
            begin, length = len(tokens), len(prompt) + len(answer) - 1
            tokens += [*prompt, *answer[:-1]]
            places += range(number * longest, number * longest + length)
            answers += range(begin + len(prompt) - 1, begin + length)
            targets += answer
            owners += [number] * len(answer)
        return cls(
            tokens=torch.tensor(tokens),
            places=torch.tensor(places),
            grid=(len(pairs), longest),
            answers=torch.tensor(answers),
            targets=torch.tensor(targets),
            owners=torch.tensor(owners),
        )


class FrozenLlama:
    """The base. Nothing of it is trained."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.sizes = Sizes.of(folder)
        stored = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
        weights = {name.removeprefix("model."): tensor.to(dtype) for part in stored for name, tensor in part.items()}
        self.embedding = weights["embed_tokens.weight"]
        self.head = weights.get("lm_head.weight", self.embedding)
        self.final_norm = weights["norm.weight"]
        self.layers = [self._layer(weights, f"layers.{number}.") for number in range(self.sizes.layers)]
        self._rotations: tuple[torch.Tensor, torch.Tensor] | None = None

    def _layer(self, weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        sizes = self.sizes
        q, k, v = (
            weights[f"{prefix}self_attn.{name}_proj.weight"].view(sizes.groups, -1, sizes.hidden) for name in "qkv"
        )
        return {
            "norm_1": weights[f"{prefix}input_layernorm.weight"],
            "linear_qkv": torch.cat([q, k, v], 1).reshape(-1, sizes.hidden),
            "linear_proj": weights[f"{prefix}self_attn.o_proj.weight"],
            "norm_2": weights[f"{prefix}post_attention_layernorm.weight"],
            "linear_fc1": torch.cat([weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")]),
            "linear_fc2": weights[f"{prefix}mlp.down_proj.weight"],
        }

    def answer_logits(self, batch: Batch, apply: Apply) -> torch.Tensor:
        """The logits (P, vocabulary) that predict the batch's `targets`.

        Args:
            apply: computes each linear of the layers.
        """
        x = self.embedding[batch.tokens]
        last = self.sizes.layers - 1
        for number, weights in enumerate(self.layers):
            mixed = apply(number, "linear_qkv", self._norm(x, weights["norm_1"]), weights["linear_qkv"])
            context = self._attention(mixed, batch)
            if number == last:
                context, x = context[batch.answers], x[batch.answers]
            x = x + apply(number, "linear_proj", context, weights["linear_proj"])
            wide = apply(number, "linear_fc1", self._norm(x, weights["norm_2"]), weights["linear_fc1"])
            gate, up = wide.chunk(2, -1)
            x = x + apply(number, "linear_fc2", functional.silu(gate) * up, weights["linear_fc2"])
        return functional.linear(self._norm(x, self.final_norm), self.head)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.sizes.eps)

    def _attention(self, mixed: torch.Tensor, batch: Batch) -> torch.Tensor:
        """(T, qkv) in Megatron's order to the context (T, heads x head_dim)."""
        sizes, (rows, columns) = self.sizes, batch.grid
        each, width = sizes.heads // sizes.groups, sizes.head_dim
        grid = mixed.new_zeros(rows * columns, mixed.shape[1]).index_copy(0, batch.places, mixed)
        grid = grid.view(rows, columns, sizes.groups, each + 2, width)
        cos, sin = self._rotation(columns, mixed.dtype)
        turned = grid[..., : each + 1, :]
        first, second = turned.chunk(2, -1)
        turned = turned * cos + torch.cat([-second, first], -1) * sin
        q = turned[..., :each, :].reshape(rows, columns, sizes.heads, width).transpose(1, 2)
        k, v = (
            one.unsqueeze(3).expand(-1, -1, -1, each, -1).reshape(rows, columns, sizes.heads, width).transpose(1, 2)
            for one in (turned[..., each, :], grid[..., each + 1, :])
        )
        return _mixed(q, k, v).transpose(1, 2).reshape(rows * columns, -1)[batch.places]

    def _rotation(self, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (length, 1, 1, head_dim)."""
        if self._rotations is None or len(self._rotations[0]) < length:
            width = self.sizes.head_dim
            frequencies = self.sizes.theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
            angles = torch.arange(max(512, length), dtype=torch.float32)[:, None] * frequencies
            angles = torch.cat([angles, angles], -1)[:, None, None, :]
            self._rotations = angles.cos().to(dtype), angles.sin().to(dtype)
        cos, sin = self._rotations
        return cos[:length], sin[:length]

    def plain(self, layer: int, target: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`apply` of the base without an adapter."""
        return functional.linear(x, weight)

    def __repr__(self) -> str:
        return f"FrozenLlama({self.sizes})"


def _mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention (N, heads, S, head_dim), with the softmax in float32.

    Written out: the backward of scaled_dot_product_attention takes five times as long on a CPU at these lengths.
    """
    length = q.shape[2]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = at_least_float32(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    shares = scores.masked_fill(later, float("-inf")).softmax(-1)
    return shares.to(v.dtype) @ v


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
