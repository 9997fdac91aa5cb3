# SPDX-License-Identifier: Apache-2.0
"""The token ids of a task's items, as `tied-lora finetune` and `evaluate` have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nemo_tied_lora.tasks.training_order import file_lines, training_items

from .llama import Batch

__all__ = ["Encoder", "Pair", "evaluation_batches", "training_batches", "training_pairs"]

Pair = tuple[list[int], list[int]]
"""The ids of a prompt, and of its answer with end-of-text."""


class Encoder:
    """A Hugging Face folder's tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        names = json.loads((folder / "tokenizer_config.json").read_text())
        self._end = self._tokenizer.token_to_id(names["eos_token"])

    def pair(self, item: dict[str, Any], longest: int | None = None) -> Pair:
        """Prompt and answer, tokenized apart.

        Args:
            longest: tokens of both; a longer prompt loses its end, as in NeMo.
        """
        prompt, answer = self.ids(item["input"]), [*self.ids(item["output"]), self._end]
        excess = 0 if longest is None else len(prompt) + len(answer) - longest
        return (prompt[:-excess] if 0 < excess < len(prompt) else prompt), answer

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def training_pairs(encoder: Encoder, train: Path, *, steps: int, batch: int, seed: int, longest: int) -> list[Pair]:
    """The items of a run, the same in the same order as in the study."""
    lines = training_items(file_lines(train), steps, batch, seed)
    return [encoder.pair(json.loads(line), longest) for line in lines]


def training_batches(encoder: Encoder, train: Path, *, steps: int, batch: int, seed: int, longest: int) -> list[Batch]:
    """The same in batches."""
    pairs = training_pairs(encoder, train, steps=steps, batch=batch, seed=seed, longest=longest)
    return [Batch.of(pairs[start : start + batch]) for start in range(0, len(pairs), batch)]


def evaluation_batches(pairs: Sequence[Pair], tokens: int = 1024) -> list[tuple[list[int], Batch]]:
    """Batches of similar length with about so many tokens, each with the numbers of its items."""
    order = sorted(range(len(pairs)), key=lambda number: sum(map(len, pairs[number])))
    found, chosen = [], list[int]()
    for number in order:
        chosen.append(number)
        if sum(len(pairs[one][0]) + len(pairs[one][1]) for one in chosen) >= tokens:
            found.append((chosen, Batch.of([pairs[one] for one in chosen])))
            chosen = []
    return [*found, (chosen, Batch.of([pairs[one] for one in chosen]))] if chosen else found
