# SPDX-License-Identifier: Apache-2.0
"""Tiny models, prompts and answers for the tests of inference, and what Megatron's own forward without a cache says."""

from __future__ import annotations

from typing import Any

import torch

from nemo_tied_lora import TiedLoraConfig
from nemo_tied_lora.adapter.inject import inject
from nemo_tied_lora.nemo.answer_scores import losses_of_answers
from nemo_tied_lora.nemo.generated_rows import Ends
from nemo_tied_lora.nemo.greedy_decoding import decode_greedily
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt
from tests.parity.training import randomise

__all__ = ["ENDS", "KINDS", "PAIRS", "PROMPTS", "build", "everything", "expected", "logits_of", "without_cache"]

KINDS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "rope, grouped heads": {"llama": True, "groups": 2},
}
PROMPTS = [
    *([5, 7, 9], [1], [30, 2, 8, 4, 17, 3], [11, 12], [5, 7, 9, 21, 6, 13], [19, 19, 19], [25, 8]),
    [9, 3, 14, 15, 22, 1, 8, 8, 20],  # leaves room for four tokens
]
ENDS = Ends(tokens=frozenset([4, 26, 27]), most=7, positions=SEQUENCE)
"""Of these models, some rows end early and some do not."""
PAIRS = [
    ([5, 7, 9], [4, 3]),
    ([5, 7, 9], [8]),
    ([1], [2, 3, 4, 5]),
    ([5, 7, 9], [1, 1, 6]),
    ([30, 2, 8, 4, 17], [9, 9]),
]


def build(kind: str, *, adapter: bool = False, merged: bool = False, **options: Any) -> Any:
    """This rank's chunk, with random factors injected or merged."""
    model = build_gpt(**{**KINDS[kind], **options}).eval()
    if adapter:
        injected = inject(model, TiedLoraConfig(rank=3, alpha=30.0))
        randomise(injected)
        if merged:
            injected.merge()
    return model


def everything(kind: str, adapter: bool) -> dict[str, Any]:
    """What inference makes of the prompts and the answers on this layout."""
    model = build(kind, adapter=adapter)
    return {
        "tokens": dict(decode_greedily([model], PROMPTS, ENDS, batch_size=5)),
        "losses": losses_of_answers([model], PAIRS, batch_tokens=16),
    }


def expected(kind: str, adapter: bool) -> dict[str, Any]:
    """The same by Megatron's forward of one row at a time, in this process."""
    model = build(kind, adapter=adapter)
    return {
        "tokens": {number: without_cache(model, prompt) for number, prompt in enumerate(PROMPTS)},
        "losses": [(_nats(model, *pair), len(pair[1])) for pair in PAIRS],
    }


def without_cache(model: Any, prompt: list[int], ends: Ends = ENDS, vocabulary: int = VOCAB) -> list[int]:
    """Greedy decoding by a whole forward for each token; fails at a tie."""
    new: list[int] = []
    while len(new) < ends.limit(prompt):
        best, tokens = logits_of(model, [*prompt, *new])[-1, :vocabulary].topk(2)
        assert best[0] - best[1] > 1e-9
        if int(tokens[0]) in ends.tokens:
            break
        new.append(int(tokens[0]))
    return new


def logits_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """Megatron's own logits (tokens, vocabulary) of one row."""
    length = len(tokens)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(torch.tensor([tokens]), torch.arange(length)[None], mask)[0]


def _nats(model: Any, prompt: list[int], answer: list[int]) -> float:
    chances = logits_of(model, [*prompt, *answer]).log_softmax(-1)
    return -sum(float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
