# SPDX-License-Identifier: Apache-2.0
"""Which prompts a NeMo GPT model can read, and which tokens it can answer with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.nemo.token_rows import rowless_problems

__all__ = ["check_prompts", "learned_positions", "too_long"]


def learned_positions(model: Any) -> int | None:
    """The number of positions that the base has learned; None: it has no limit, as with RoPE."""
    cfg = model.cfg
    learned = cfg.get("position_embedding_type", "learned_absolute") == "learned_absolute"
    return int(cfg.encoder_seq_length) if learned else None


def too_long(sequences: Sequence[Sequence[int]], positions: int | None, what: str = "prompt") -> list[str]:
    """One line per sequence that is longer than the learned positions."""
    return [
        f"{what} {number}: has {len(ids)} tokens, and the base learned positions for {positions}; shorten it"
        for number, ids in enumerate(sequences, 1)
        if positions is not None and len(ids) > positions
    ]


def check_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Checks token ids of prompts.

    Raises:
        ConfigError: on every rank; a prompt is empty, longer than the base's learned positions, or holds a token that has
            no row in the base's embedding.
    """
    problems = [
        f"prompt {number}: has no tokens; write at least one" for number, ids in enumerate(prompts, 1) if not ids
    ]
    problems += [*too_long(prompts, learned_positions(model)), *rowless_problems(model, prompts)]
    Problems(problems).raise_if_any()
