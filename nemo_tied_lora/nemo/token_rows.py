# SPDX-License-Identifier: Apache-2.0
"""Names the tokens of a tokenizer that have no row of their own in the base's embedding.

An embedding is padded to a number of rows that tensor-parallel ranks can split. A token beyond the vocabulary would take a
row of the padding, whose numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["rowless_note", "rowless_problems"]

_SHOWN = 5


def _rows(model: Any) -> int | None:
    """The number of rows that belong to tokens; None: unknown."""
    cfg = model.cfg
    recorded = (cfg.get("huggingface") or {}).get("vocab_size")
    return recorded or cfg.get("override_vocab_size") or getattr(model, "padded_vocab_size", None)


def _beyond(tokenizer: Any, rows: int) -> list[tuple[int, str]]:
    """Every id that the tokenizer can give and that has no row, with its token."""
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "get_vocab"):
        return sorted((index, token) for token, index in inner.get_vocab().items() if index >= rows)
    return [(index, str(tokenizer.ids_to_tokens([index])[0])) for index in range(rows, tokenizer.vocab_size)]


def rowless_note(model: Any) -> list[str]:
    """One line that names the tokens without a row; none if all have one."""
    rows = _rows(model)
    beyond = [] if rows is None else _beyond(model.tokenizer, rows)
    if not beyond:
        return []
    shown = ", ".join(f"{index} {token!r}" for index, token in beyond[:_SHOWN])
    more = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
    return [
        f"{len(beyond)} tokens have no row in the embedding, which has {rows}: {shown}{more}; texts with them are not "
        "understood. To give them rows: model.resize_token_embeddings(len(tokenizer)) in transformers"
    ]


def rowless_problems(model: Any, prompts: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> list[str]:
    """One line per prompt that has a token without a row.

    Args:
        names: what messages call the prompts; None: their numbers.
    """
    rows = _rows(model)
    problems = []
    for number, ids in enumerate(prompts, 1):
        beyond = next((index for index in ids if rows is not None and index >= rows), None)
        if beyond is not None:
            name, token = (
                names[number - 1] if names else f"prompt {number}",
                model.tokenizer.ids_to_tokens([beyond])[0],
            )
            problems.append(
                f"{name}: holds the token {beyond} {token!r}, which has no row in the base's embedding of {rows} rows; leave "
                "it out"
            )
    return problems
