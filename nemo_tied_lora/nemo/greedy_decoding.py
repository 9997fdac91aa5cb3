# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding on megatron-core: the likeliest token at each step, with a key-value cache, on any layout.

A prompt is read once; then each step runs one token a row. With P pipeline stages the rows of a batch form P groups, so
that all stages work at the same time: at tick k, stage s runs group (k - s) mod P. At the end of a tick each stage sends on
what it has: hidden states (S, N, hidden) to the next stage, and with them the tokens (N) that were chosen the step before;
the last stage sends the tokens that it has chosen to the first. So each rank learns every token, and ends rows alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nemo_tied_lora.nemo.generated_rows import Ends, GeneratedRows, Row
from nemo_tied_lora.nemo.inference_attention import KeyValueCache
from nemo_tied_lora.nemo.inference_chunk import InferenceChunk
from nemo_tied_lora.nemo.stage_ring import StageRing
from nemo_tied_lora.nemo.usable_prompts import check_prompts, learned_positions
from nemo_tied_lora.nemo.vocabulary_parallel import likeliest

__all__ = ["decode_greedily", "greedy_tokens"]

_SLOTS_AT_ONCE = 32_768
"""A batch needs at most so many slots of the cache, whatever `batch_size` says; one row is always taken."""


def greedy_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 64,
    min_new_tokens: int = 0,
) -> Iterator[tuple[int, list[int]]]:
    """Completes each prompt with the likeliest tokens of a NeMo GPT model, up to its end-of-text token.

    As `decode_greedily`: yields (index, new tokens) batch by batch, the same on every rank.

    Args:
        stop: texts; a row ends with the token that completes one of them, and keeps it.
        min_new_tokens: the end-of-text token cannot come earlier.

    Raises:
        ConfigError: a prompt is empty, longer than the base's learned positions, or holds a token without a row in its
            embedding; or the model has what inference does not compute.
    """
    check_prompts(model, prompts)
    ends = Ends(
        tokens=frozenset([model.tokenizer.eos_id]),
        texts=tuple(stop),
        to_text=model.tokenizer.ids_to_text,
        most=max_new_tokens,
        least=min_new_tokens,
        positions=learned_positions(model),
    )
    chunks = model._unwrap_model_list()
    return decode_greedily(chunks, prompts, ends, batch_size=batch_size, vocabulary=model.tokenizer.vocab_size)


def decode_greedily(
    chunks: Any, prompts: Sequence[Sequence[int]], ends: Ends, *, batch_size: int, vocabulary: int | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Completes each prompt. Yields (its index, its new tokens) whenever a batch has ended, the longest prompts first.

    All ranks call it, consume it in step, and get the same. The model stays ready for inference until the iterator is
    exhausted or closed.

    Args:
        chunks: this rank's GPTModel, or a list with it. Adapters may be injected or merged.
        prompts: token ids, at least one each.
        batch_size: prompts at a time, on all stages together.
        vocabulary: tokens from here on are padding and never win.

    Raises:
        ConfigError: the model has what inference does not compute.
    """
    ring = StageRing()
    with InferenceChunk(chunks) as chunk:
        for batch in _batches(prompts, ends, batch_size):
            groups = [_Group(batch[i :: ring.size], ends, chunk, vocabulary) for i in range(ring.size)]
            ended = list(_run(groups, ring))  # whole: a rank whose caller stops early leaves no other waiting
            yield from ((row.number, row.new) for row in ended)


def _batches(prompts: Sequence[Sequence[int]], ends: Ends, batch_size: int) -> Iterator[list[Row]]:
    """Rows of similar length together, the longest first: a batch that does not fit into memory fails at once."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    start = 0
    while start < len(order):
        first = prompts[order[start]]
        fitting = _SLOTS_AT_ONCE // (len(first) + ends.limit(first))
        taken = order[start : start + max(1, min(batch_size, fitting))]
        yield [Row(number, prompts[number]) for number in taken]
        start += len(taken)


def _run(groups: list[_Group], ring: StageRing) -> Iterator[Row]:
    """Runs the groups to their end; see the top of the file. Yields the rows as they end."""
    tick = 0
    received: torch.Tensor | None = None
    while not all(group.closed for group in groups):
        known, hidden = None, None
        if tick >= ring.stage:
            group = groups[(tick - ring.stage) % ring.size]
            known, hidden = group.step(received)
        following = tick + 1 - ring.stage
        receiver = groups[following % ring.size] if following >= 0 else None
        if ring.size == 1:
            yield from groups[0].take(known)
        elif receiver is None:
            ring.exchange(known, None)
            ring.exchange(hidden, None)
        else:
            tokens = ring.exchange(known, receiver.tokens_to_come())
            yield from receiver.take(tokens)
            received = ring.exchange(hidden, receiver.hidden_to_come())
        tick += 1


class _Group:
    """Rows that run together, with their part of the cache on this stage."""

    def __init__(self, rows: list[Row], ends: Ends, chunk: InferenceChunk, vocabulary: int | None) -> None:
        self._rows = GeneratedRows(rows, ends)
        self._chunk, self._vocabulary = chunk, vocabulary
        self._cache = KeyValueCache(len(rows), self._rows.slots) if rows else None
        self._started = False
        self._last_tokens: torch.Tensor | None = None
        self.closed = False

    def step(self, received: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Runs this stage's layers. Returns the tokens and the hidden states to send on; None: nothing is sent.

        On the last stage the tokens are those just chosen, and there are no hidden states.
        """
        if self.closed:
            return None, None
        known, self._last_tokens = self._last_tokens, None
        if not self._rows:
            self.closed, self._cache = True, None
            return (None if self._chunk.last else known), None
        hidden = self._forward(None if self._chunk.first else received)
        if not self._chunk.last:
            return known, hidden.to(self._chunk.dtype)
        return self._chosen(hidden), None

    def tokens_to_come(self) -> torch.Tensor | None:
        """Where the tokens that were chosen for this group are to be received; None: none will come."""
        if not self._started or not self._rows:
            return None
        return torch.empty(len(self._rows), dtype=torch.long, device=self._chunk.device)

    def take(self, tokens: torch.Tensor | None) -> list[Row]:
        """Adds the chosen tokens. Returns the rows that have ended."""
        if tokens is None:
            return []
        self._last_tokens = tokens
        used = self._rows.used
        done, holes, movers = self._rows.take(tokens.tolist())
        if holes and self._cache is not None:
            self._cache.move(holes, movers, used)
        return done

    def hidden_to_come(self) -> torch.Tensor | None:
        """Where the previous stage's hidden states are to be received; None: none will come."""
        if self._chunk.first or not self._rows or self.closed:
            return None
        width = 1 if self._started else self._rows.used
        return torch.empty(
            width, len(self._rows), self._chunk.hidden_size, dtype=self._chunk.dtype, device=self._chunk.device
        )

    def _forward(self, received: torch.Tensor | None) -> torch.Tensor:
        rows, device, used = self._rows.rows, self._chunk.device, self._rows.used
        if self._started:
            tokens = torch.tensor([[row.new[-1]] for row in rows], device=device)
            positions = torch.tensor([[row.position] for row in rows], device=device)
        else:
            tokens = torch.tensor([[*row.prompt, *[0] * (used - len(row.prompt))] for row in rows], device=device)
            positions = torch.arange(used, device=device)[None]
        grows, self._started = self._started, True
        return self._chunk.hidden(tokens, positions, received, used=used, cache=self._cache, grows=grows)

    def _chosen(self, hidden: torch.Tensor) -> torch.Tensor:
        """The next token (N) of each row, from hidden states (S, N, hidden) of its last tokens or of its prompt."""
        rows = self._rows.rows
        if hidden.shape[0] > 1:
            last = torch.tensor([row.position for row in rows], device=hidden.device)
            hidden = hidden[last, torch.arange(len(rows), device=hidden.device)]
        else:
            hidden = hidden[0]
        return likeliest(self._chunk.logits(hidden), self._vocabulary, self._rows.forbidden())
