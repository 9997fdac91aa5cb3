# SPDX-License-Identifier: Apache-2.0
"""The rows that are generated together: what each has so far, and when it ends. Every rank keeps the same state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Ends", "GeneratedRows", "Row"]


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What ends a row.

    tokens: end-of-text tokens; they are not part of the result. texts: a row ends with the token that completes one of
    them. to_text: makes a text of tokens; needed with texts.
    most: of new tokens. least: an end-of-text token cannot come before so many. positions: that a model has learned, None
    without a limit; the last token needs none.
    """

    tokens: frozenset[int]
    texts: tuple[str, ...] = ()
    to_text: Callable[[list[int]], str] | None = None
    most: int
    least: int = 0
    positions: int | None = None

    def limit(self, prompt: Sequence[int]) -> int:
        """The largest number of new tokens after this prompt."""
        return self.most if self.positions is None else min(self.most, self.positions - len(prompt) + 1)

    def completes_text(self, new: list[int]) -> bool:
        """Whether the last token completes one of `texts`.

        Only the last tokens are made into text: a character takes four tokens at most, and the first token of a text may
        lose its leading blank.
        """
        if not self.texts or self.to_text is None:
            return False
        tail = self.to_text(new[-(4 * max(map(len, self.texts)) + 1) :])
        return any(text in tail for text in self.texts)


@dataclass
class Row:
    """One prompt: its place in the caller's list, its tokens, its new tokens."""

    number: int
    prompt: Sequence[int]
    new: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of the last token."""
        return len(self.prompt) + len(self.new) - 1


class GeneratedRows:
    """The rows of one group that have not ended, in the order of the cache."""

    def __init__(self, rows: list[Row], ends: Ends) -> None:
        self.rows = rows
        self._ends = ends

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def slots(self) -> int:
        """Slots of the cache that the rows can need: the last new token has none."""
        return max(len(row.prompt) + self._ends.limit(row.prompt) - 1 for row in self.rows)

    @property
    def used(self) -> int:
        """The largest position of a token, plus 1."""
        return max(row.position for row in self.rows) + 1

    def forbidden(self) -> list[tuple[int, int]]:
        """(row, token) of end-of-text tokens that would come too early."""
        early = [i for i, row in enumerate(self.rows) if len(row.new) < self._ends.least]
        return [(i, token) for i in early for token in self._ends.tokens]

    def take(self, tokens: Sequence[int]) -> tuple[list[Row], list[int], list[int]]:
        """Adds a token to each row.

        Returns:
            The rows that have ended; and the places of the cache whose rows have ended, beside the places, at the end, of
            the rows that are to be copied there.
        """
        ended = [not self._goes_on(row, token) for row, token in zip(self.rows, tokens, strict=True)]
        done = [row for row, over in zip(self.rows, ended, strict=True) if over]
        left = len(self.rows) - len(done)
        holes = [i for i in range(left) if ended[i]]
        movers = [i for i in range(left, len(self.rows)) if not ended[i]]
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[left:]
        return done, holes, movers

    def _goes_on(self, row: Row, token: int) -> bool:
        if token in self._ends.tokens:
            return False
        row.new.append(token)
        return len(row.new) < self._ends.limit(row.prompt) and not self._ends.completes_text(row.new)
