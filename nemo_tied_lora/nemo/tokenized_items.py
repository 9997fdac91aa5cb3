# SPDX-License-Identifier: Apache-2.0
"""The token ids of a task's items, as training has them: prompt and answer apart, end-of-text after each answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.nemo.token_rows import rowless_problems
from nemo_tied_lora.nemo.usable_prompts import learned_positions

__all__ = ["TokenizedItems", "answer_ids"]

_Item = Mapping[str, Any]
_MOST_NAMED = 10
"""So many problems are listed at most."""


@dataclass(frozen=True)
class TokenizedItems:
    """The token ids of each item: as in training, prompt and answer are tokenized apart, and an answer ends in end-of-text."""

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    """For each item its endings, or the one right answer."""
    labels: list[int]
    """The number of the right one."""

    @classmethod
    def of(cls, model: Any, items: Sequence[_Item]) -> TokenizedItems:
        """Tokenizes all items.

        Raises:
            ConfigError: prompt and answer have more tokens than the base has learned positions, or hold a token without a
                row in its embedding. Names the items.
        """
        tokenizer = model.tokenizer
        bos = getattr(tokenizer, "bos_id", None)
        start = tokenizer.eos_id if bos is None or bos < 0 else bos
        texts = [item.get("endings") or [item["output"]] for item in items]
        found = cls(
            prompts=[tokenizer.text_to_ids(item["input"]) or [start] for item in items],
            answers=[[answer_ids(tokenizer, text) for text in of_item] for of_item in texts],
            labels=[item.get("label", 0) for item in items],
        )
        problems = Problems(found._problems(model, [f"task item {item['id']}" for item in items]))
        if len(problems) > _MOST_NAMED:
            problems = Problems(
                [*problems[:_MOST_NAMED], f"and {len(problems) - _MOST_NAMED:,} more problems of items"]
            )
        problems.raise_if_any()
        return found

    def _problems(self, model: Any, names: Sequence[str]) -> Iterator[str]:
        most = learned_positions(model)
        for name, prompt, answers in zip(names, self.prompts, self.answers, strict=True):
            longest = max(map(len, answers))
            if most is not None and len(prompt) + longest - 1 > most:  # the last token is only predicted
                yield (
                    f"{name}: has {len(prompt)} tokens in its prompt and {longest} in its answer, and the base learned "
                    f"positions for {most}; leave it out, or take a base with more positions"
                )
        whole = zip(self.prompts, self.answers, strict=True)
        yield from rowless_problems(model, [[*prompt, *chain(*answers)] for prompt, answers in whole], names)


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of an answer, which begins with its blank, and end-of-text.

    As in NeMo's `GPTSFTDataset`, a tokenizer that puts a blank before each text itself, such as Llama 2's, does not get
    another one.
    """
    own_blank = not getattr(tokenizer, "space_sensitive", False)
    return [*tokenizer.text_to_ids(text[1:] if own_blank and text.startswith(" ") else text), tokenizer.eos_id]
