# SPDX-License-Identifier: Apache-2.0
"""Attention of inference on megatron-core: with a key-value cache, and with the positions of each row.

S = tokens of this forward, N = rows, H = query heads and G = key-value heads of this rank, D = a head's width, K = slots of
the cache in use. Slot j of a row holds the token at position j of that row, so a row needs no padding in front of it, and a
token sees the slots up to its own position.

Megatron's own cache keeps all rows at one position, rotates all keys again at each step, and masks nothing on a GPU with
Transformer Engine once the prompt is read; rows of several lengths are then wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["InferenceAttention", "KeyValueCache", "NoRotation", "Pass", "rotate"]


class KeyValueCache:
    """Rotated keys and values of one group of rows: per layer two tensors (N, G, slots, D), local to this rank.

    They are allocated at the first use of a layer, for all slots that the rows can need.
    """

    def __init__(self, rows: int, slots: int) -> None:
        self._rows, self._slots = rows, slots
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def store_prompt(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores keys and values (N, G, S, D) of the first S positions of each row."""
        for stored, new in zip(self._of(layer, key), (key, value), strict=True):
            stored[: new.shape[0], :, : new.shape[2]] = new

    def with_next(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, used: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values (N, G, 1, D) of one token a row, at `positions` (N). Returns those in use (N, G, K, D)."""
        rows = torch.arange(key.shape[0], device=key.device)
        found = []
        for stored, new in zip(self._of(layer, key), (key, value), strict=True):
            stored[rows, :, positions] = new[:, :, 0]
            found.append(stored[: new.shape[0], :, :used])
        return found[0], found[1]

    def move(self, holes: list[int], movers: list[int], used: int) -> None:
        """Copies the rows `movers` to the rows `holes`, their first `used` slots."""
        for tensors in self._tensors.values():
            for stored in tensors:
                stored[holes, :, :used] = stored[movers, :, :used]

    def _of(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._tensors:
            shape = (self._rows, like.shape[1], self._slots, like.shape[3])
            self._tensors[layer] = (
                like.new_zeros(shape),
                like.new_zeros(shape),
            )  # a masked slot counts 0 times its value
        return self._tensors[layer]


@dataclass
class Pass:
    """What the attention of each layer must know of the forward that runs now.

    rotation: cosines and sines (S, N or 1, 1, rotated width), None without RoPE. mask: True where a token (N or 1, 1, S, K)
    sees a slot; None: the tokens are the first S of each row, and each sees itself and those before it.
    positions: of one new token a row (N), with a cache whose prompts are stored. used: slots in use, K.
    """

    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    mask: torch.Tensor | None = None
    cache: KeyValueCache | None = None
    positions: torch.Tensor | None = None
    used: int = 0


@dataclass
class Running:
    """Holds the pass that runs now; all layers of a chunk share one."""

    now: Pass = field(default_factory=Pass)


class InferenceAttention(nn.Module):
    """Takes the place of Megatron's core attention: softmax(q k^T scale) v, over the cache.

    Takes query (S, N, H, D), key and value (S, N, G, D), not rotated yet. Returns (S, N, H D).
    """

    def __init__(self, running: Running, layer: int, scale: float | None, *, rotates: bool, interleaved: bool) -> None:
        super().__init__()
        self._running, self._layer, self._scale = running, layer, scale
        self._rotates, self._interleaved = rotates, interleaved

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        now = self._running.now
        if now.rotation is not None and self._rotates:
            query = rotate(query, *now.rotation, self._interleaved)
            key = rotate(key, *now.rotation, self._interleaved)
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value.to(query.dtype)))
        if now.cache is not None and now.positions is not None:
            k, v = now.cache.with_next(self._layer, k, v, now.positions, now.used)
        elif now.cache is not None:
            now.cache.store_prompt(self._layer, k, v)
        context = self._attend(q, k, v, now.mask)
        return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        if mask is None or not grouped:
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self._scale, enable_gqa=grouped
            )
        # The heads that share a key are queries of one head, so keys and values are read once and not repeated.
        rows, heads, tokens, width = q.shape
        shared = heads // k.shape[1]
        folded = q.reshape(rows, k.shape[1], shared * tokens, width)
        mask = mask.repeat(1, 1, shared, 1)
        context = functional.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=self._scale)
        return context.reshape(rows, heads, tokens, width)


class NoRotation(nn.Module):
    """Takes the place of a GPTModel's rotary embedding: Megatron rotates nothing, because `InferenceAttention` does."""

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        return 0

    def forward(self, *_: Any, **__: Any) -> None:
        return None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """RoPE: x (S, N, heads, D), cos and sin (S, N or 1, 1, rotated width) as Megatron's; the rest of D stays."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        even, odd = turned[..., ::2], turned[..., 1::2]
        half = torch.stack((-odd, even), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        half = torch.cat((-second, first), dim=-1)
    turned = turned * cos + half * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
