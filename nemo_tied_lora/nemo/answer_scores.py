# SPDX-License-Identifier: Apache-2.0
"""How likely given answers are: their cross entropy after their prompts, on any layout.

One forward pass, in which only the answers' tokens reach the output layer. Answers of one prompt, such as the endings of a
choice, share a row: prompt, first answer, second answer, ... Each answer has the positions that follow the prompt, and sees
the prompt and itself. So a prompt is read once, and the numbers are those of separate rows.

    row        p0 p1 p2   a0 a1   b0 b1 b2
    positions   0  1  2    3  4    3  4  5
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.nemo.inference_chunk import InferenceChunk
from nemo_tied_lora.nemo.stage_ring import StageRing
from nemo_tied_lora.nemo.usable_prompts import check_prompts, learned_positions, too_long
from nemo_tied_lora.nemo.vocabulary_parallel import cross_entropy

__all__ = ["answer_losses", "losses_of_answers"]

Pair = tuple[Sequence[int], Sequence[int]]

_LOGITS_AT_ONCE = 512
"""Rows of logits in memory at a time: with a vocabulary of 49,152 in float32, 100 MB."""


def answer_losses(
    model: Any, pairs: Sequence[Pair], *, batch_tokens: int = 4096, progress: Callable[[int], object] = lambda _: None
) -> list[tuple[float, int]]:
    """The losses of answers under a NeMo GPT model. As `losses_of_answers`.

    Raises:
        ConfigError: a prompt or an answer is empty, together they are longer than the base's learned positions, or one
            holds a token without a row in its embedding; or the model has what inference does not compute.
    """
    check_prompts(model, [prompt for prompt, _ in pairs])
    check_prompts(model, [answer for _, answer in pairs])
    whole = [[*prompt, *answer][:-1] for prompt, answer in pairs]  # the last token is only predicted
    Problems(too_long(whole, learned_positions(model), "prompt and answer")).raise_if_any()
    return losses_of_answers(model._unwrap_model_list(), pairs, batch_tokens=batch_tokens, progress=progress)


def losses_of_answers(
    chunks: Any, pairs: Sequence[Pair], *, batch_tokens: int = 4096, progress: Callable[[int], object] = lambda _: None
) -> list[tuple[float, int]]:
    """For each (prompt, answer) in token ids: the summed cross entropy of the answer's tokens in nats, and their number.

    All ranks call it and get the same. Rows of similar length run together, the longest first.

    Args:
        chunks: this rank's GPTModel, or a list with it. Adapters may be injected or merged.
        pairs: neither prompt nor answer is empty.
        batch_tokens: tokens in one forward pass, padding included; a longer row runs alone.
        progress: called with the number of pairs that are done since the last call.

    Raises:
        ConfigError: the model has what inference does not compute.
    """
    ring = StageRing()
    nats = [0.0] * len(pairs)
    with InferenceChunk(chunks) as chunk:
        batches = list(_batches(_rows(pairs, batch_tokens), batch_tokens))
        at_once = 1 if ring.size == 1 else 4 * ring.size
        for start in range(0, len(batches), at_once):
            window = [_Batch(rows, pairs, chunk) for rows in batches[start : start + at_once]]
            _run(window, ring)
            for batch in window:
                ring.from_last_stage(batch.losses)
                for number, loss in zip(batch.numbers, batch.losses.tolist(), strict=True):
                    nats[number] = loss
            progress(sum(len(batch.numbers) for batch in window))
    return [(loss, len(answer)) for loss, (_, answer) in zip(nats, pairs, strict=True)]


@dataclass
class _Row:
    """A prompt and the numbers of the pairs whose answers share it. length: its tokens."""

    prompt: Sequence[int]
    numbers: list[int]
    length: int


def _rows(pairs: Sequence[Pair], batch_tokens: int) -> list[_Row]:
    rows: list[_Row] = []
    open_rows: dict[tuple[int, ...], _Row] = {}
    for number, (prompt, answer) in enumerate(pairs):
        row = open_rows.get(key := tuple(prompt))
        if row is None or row.length + len(answer) > batch_tokens:
            row = open_rows[key] = _Row(prompt, [], len(prompt))
            rows.append(row)
        row.numbers.append(number)
        row.length += len(answer) - 1
    return sorted(rows, key=lambda row: -row.length)


def _batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    start = 0
    while start < len(rows):
        fitting = max(1, batch_tokens // rows[start].length)
        yield list(rows[start : start + fitting])
        start += fitting


def _run(window: Sequence[_Batch], ring: StageRing) -> None:
    """Runs the batches through the stages: at tick k, stage s runs batch k - s, and then hands its output on."""
    received = None
    for tick in range(len(window) + ring.size - 1):
        mine, following = tick - ring.stage, tick + 1 - ring.stage
        sent = window[mine].forward(received) if 0 <= mine < len(window) else None
        comes = ring.stage > 0 and 0 <= following < len(window)
        received = ring.exchange(sent, window[following].hidden_to_come() if comes else None)


class _Batch:
    """Rows of one forward pass. losses: (answers), float64, zero until the last stage has run."""

    def __init__(self, rows: Sequence[_Row], pairs: Sequence[Pair], chunk: InferenceChunk) -> None:
        self._chunk = chunk
        self._width = max(row.length for row in rows)
        self.numbers = [number for row in rows for number in row.numbers]
        self._owner = {number: place for place, number in enumerate(self.numbers)}
        self._tokens: list[list[int]] = []
        self._positions: list[list[int]] = []
        self._parts: list[list[int]] = []
        self._places: list[tuple[int, int]] = []  # (column, row) of the hidden states that predict an answer's token
        self._targets: list[int] = []
        self._owners: list[int] = []  # the place in `numbers` of the answer that a target belongs to
        for index, row in enumerate(rows):
            self._add(index, row, pairs)
        self._rows = len(rows)
        self._branched = any(len(row.numbers) > 1 for row in rows)
        self.losses = torch.zeros(len(self.numbers), dtype=torch.float64, device=chunk.device)

    def forward(self, received: torch.Tensor | None) -> torch.Tensor | None:
        """Runs this stage. Returns the hidden states to send on; on the last stage None, and `losses` are there."""
        device = self._chunk.device
        tokens = torch.tensor(self._tokens, device=device)
        positions = torch.tensor(self._positions, device=device)
        mask = _mask(torch.tensor(self._parts, device=device)) if self._branched else None
        used = max(map(max, self._positions)) + 1
        hidden = self._chunk.hidden(tokens, positions, received, used=used, mask=mask)
        if not self._chunk.last:
            return hidden.to(self._chunk.dtype)
        places = torch.tensor(self._places, device=device)
        targets, owners = (torch.tensor(values, device=device) for values in (self._targets, self._owners))
        for start in range(0, len(targets), _LOGITS_AT_ONCE):
            part = slice(start, start + _LOGITS_AT_ONCE)
            chosen = hidden[places[part, 0], places[part, 1]]
            losses = cross_entropy(self._chunk.logits(chosen), targets[part])
            self.losses.index_add_(0, owners[part], losses.double())
        return None

    def hidden_to_come(self) -> torch.Tensor:
        """Where the previous stage's hidden states (S, N, hidden) are to be received."""
        chunk = self._chunk
        return torch.empty(self._width, self._rows, chunk.hidden_size, dtype=chunk.dtype, device=chunk.device)

    def _add(self, index: int, row: _Row, pairs: Sequence[Pair]) -> None:
        """Lays out a row; each answer without its last token, which is only predicted."""
        prompt = len(row.prompt)
        tokens, positions, parts = list(row.prompt), list(range(prompt)), [0] * prompt
        for part, number in enumerate(row.numbers, 1):
            answer = pairs[number][1]
            columns = [prompt - 1, *range(len(tokens), len(tokens) + len(answer) - 1)]
            self._places += [(column, index) for column in columns]
            self._targets.extend(answer)
            self._owners += [self._owner[number]] * len(answer)
            tokens.extend(answer[:-1])
            positions.extend(range(prompt, prompt + len(answer) - 1))
            parts += [part] * (len(answer) - 1)
        padding = self._width - len(tokens)
        self._tokens.append(tokens + [0] * padding)
        self._positions.append(positions + [0] * padding)
        self._parts.append(parts + [-1] * padding)


def _mask(parts: torch.Tensor) -> torch.Tensor:
    """True where a token sees another (N, 1, S, S), from parts (N, S): 0 is the prompt, an answer has a number, -1 pads.

    A token sees those before it and itself, of the prompt and of its own part.
    """
    own, other = parts[:, :, None], parts[:, None, :]
    earlier = torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool, device=parts.device).tril()
    return (((other == 0) | (own == other)) & earlier)[:, None]
