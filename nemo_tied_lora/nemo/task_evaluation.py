# SPDX-License-Identifier: Apache-2.0
"""Makes the predictions of a loaded base, with and without adapters, for the items of a task. On any layout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from nemo_tied_lora.adapter.agreement import from_rank_0, raise_together
from nemo_tied_lora.adapter.target_modules import gpt_model
from nemo_tied_lora.adapter.weight_checksums import fingerprint_model
from nemo_tied_lora.checkpoint.base_identity import check_architecture, check_weights, tokenizer_identity
from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.nemo.base_precision_note import say_precision
from nemo_tied_lora.nemo.generation import load_base
from nemo_tied_lora.nemo.model import MegatronGPTTiedLoraModel
from nemo_tied_lora.nemo.tokenized_items import TokenizedItems
from nemo_tied_lora.progress import Progress
from nemo_tied_lora.tasks.evaluation import Evaluation

__all__ = ["check_adapters", "generate_answers", "predict", "score_answers"]

Keep = Callable[[Mapping[int, Mapping[str, Any]]], None]
"""Takes the number of each item that is done, and its values. Called on every rank with the same."""

_KEPT_AT_ONCE = 8
"""So many batches are scored before they are kept: what a kill can lose."""


def predict(cfg: DictConfig, evaluation: Evaluation | None) -> None:
    """Makes the predictions that are missing, adapter after adapter on one base. All ranks call it.

    Args:
        cfg: the composed configuration of `tied-lora evaluate`.
        evaluation: on rank 0; it keeps the predictions. None on the others.

    Raises:
        ConfigError: on every rank; an adapter does not fit the base, an item does not, or the disk is full.
    """

    work = from_rank_0("evaluate", lambda: _Work.of(evaluation))
    for number, name in enumerate(work.names):
        _say(f"{name}: {work.said_before(number)}")
    unfinished = [number for number, missing in enumerate(work.missing) if any(missing.values())]
    if not unfinished:
        return
    model = load_base(cfg)
    model.eval()
    items = TokenizedItems.of(model, work.items)
    paths = [path for number in unfinished if (path := work.adapters[number]) is not None]
    check_adapters(model, paths, allow_other_base=bool(cfg.allow_other_base))
    for number in unfinished:
        _predict_with(model, work, number, items, cfg, evaluation)


def _predict_with(
    model: MegatronGPTTiedLoraModel,
    work: _Work,
    number: int,
    items: TokenizedItems,
    cfg: DictConfig,
    evaluation: Evaluation | None,
) -> None:
    """Makes the missing predictions of one adapter."""

    def on_rank_0(keep: Callable[[Evaluation], None]) -> None:
        def mine() -> None:
            assert evaluation is not None
            keep(evaluation)

        from_rank_0("evaluate", mine)

    path, name, missing = work.adapters[number], work.names[number], work.missing[number]
    if path is not None:
        model.load_adapters(path)
        say_precision(model, path, items.prompts[0])

    def keep(done: Mapping[int, Mapping[str, Any]]) -> None:
        on_rank_0(lambda mine: mine.keep(number, done))

    score_answers(model, items, missing["loss"], keep, name=name, batch_tokens=cfg.batch_tokens)
    limits: dict[str, Any] = {"max_new_tokens": work.max_new_tokens, "stop": work.stop, "batch_size": cfg.batch_size}
    generate_answers(model, items, missing["completion"], keep, name=name, **limits)
    model.remove_adapter()
    on_rank_0(lambda mine: mine.complete(number))


@dataclass(frozen=True)
class _Work:
    """What rank 0 tells the others."""

    items: list[dict[str, Any]]
    adapters: list[str | None]
    names: list[str]
    missing: list[dict[str, list[int]]]
    max_new_tokens: int
    stop: tuple[str, ...]

    @classmethod
    def of(cls, evaluation: Evaluation | None) -> _Work:
        assert evaluation is not None
        task, generates = evaluation.task, evaluation.generates
        missing = [
            {"loss": one.missing("loss"), "completion": one.missing("completion") if generates else []}
            for one in evaluation.predictions
        ]
        return cls(evaluation.items, evaluation.adapters, evaluation.names, missing, task.max_new_tokens, task.stop)

    def said_before(self, number: int) -> str:
        """What the user reads about an adapter at the start."""
        count, missing = len(self.items), max(map(len, self.missing[number].values()))
        if not missing:
            return f"all {count:,} predictions are there from before"
        return f"{count:,} items" + (f", {count - missing:,} of them are there from before" if missing < count else "")


def _say(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def check_adapters(model: MegatronGPTTiedLoraModel, paths: Sequence[str], *, allow_other_base: bool) -> None:
    """Compares all adapters with the loaded base, before the first is evaluated. All ranks call it.

    Raises:
        ConfigError: with what any adapter does not fit in.
    """
    chunks = [gpt_model(chunk) for chunk in model._unwrap_model_list()]
    tokenizer, problems = tokenizer_identity(model.tokenizer), Problems()
    fingerprints: dict[int | None, dict[str, Any]] = {}
    for path in paths:
        failure: Exception | None = None
        try:
            file = read_adapter(path)
        except Exception as error:
            failure = error
        raise_together("evaluate", failure)
        recorded = file.yaml.get("base") or {}
        found: dict[str, Any] = {"tokenizer": tokenizer}
        if recorded.get("fingerprint"):
            rows = recorded["fingerprint"].get("vocab_rows")
            if rows not in fingerprints:
                fingerprints[rows] = fingerprint_model(chunks, rows)
            found["fingerprint"] = fingerprints[rows]
        problems.attempt(check_architecture, recorded, chunks[0], path)
        problems.attempt(check_weights, recorded, found, path, allow_other_base=allow_other_base)
    problems.raise_if_any()


def score_answers(
    model: MegatronGPTTiedLoraModel,
    items: TokenizedItems,
    numbers: Sequence[int],
    keep: Keep,
    *,
    name: str,
    batch_tokens: int,
) -> None:
    """The loss of the answers of the chosen items: `loss` in nats and `tokens`, and of a choice `endings`, (nats, tokens)
    for each ending. All ranks call it.

    Args:
        numbers: which items.
        name: for the progress bar.
        batch_tokens: tokens, padding included, in one forward pass.
    """
    from nemo_tied_lora.nemo.answer_scores import answer_losses

    with _bar(f"{name}: losses", len(numbers)) as bar:
        for chosen in _chunks(items, numbers, _KEPT_AT_ONCE * batch_tokens):
            pairs = [(items.prompts[number], answer) for number in chosen for answer in items.answers[number]]
            losses = iter(answer_losses(model, pairs, batch_tokens=batch_tokens))
            done: dict[int, dict[str, Any]] = {}
            for number in chosen:
                found = [next(losses) for _ in items.answers[number]]
                nats, tokens = found[items.labels[number]]
                done[number] = {"loss": nats, "tokens": tokens} | ({"endings": found} if len(found) > 1 else {})
            keep(done)
            bar.update(len(done))


def generate_answers(
    model: MegatronGPTTiedLoraModel,
    items: TokenizedItems,
    numbers: Sequence[int],
    keep: Keep,
    *,
    name: str,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
) -> None:
    """The likeliest `completion` of each chosen item's prompt, up to end-of-text or a stop text. All ranks call it.

    Args:
        numbers, name: as in `score_answers`.
        stop: texts; a completion ends before the first of them.
        batch_size: prompts at a time.
    """
    from nemo_tied_lora.nemo.greedy_decoding import greedy_tokens

    order = sorted(numbers, key=lambda number: -len(items.prompts[number]))
    with _bar(f"{name}: answers", len(order)) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found = greedy_tokens(
                model,
                [items.prompts[number] for number in chosen],
                max_new_tokens=max_new_tokens,
                stop=stop,
                batch_size=batch_size,
            )
            # Ranks learn of a finished row at different times, so nothing is exchanged in this loop.
            done = {}
            for place, tokens in found:
                done[chosen[place]] = {"completion": _text(model.tokenizer, tokens, stop)}
                bar.update()
            keep(done)


def _chunks(items: TokenizedItems, numbers: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """The numbers, the longest items first, in parts of about so many tokens."""

    def tokens(number: int) -> int:
        return sum(len(items.prompts[number]) + len(answer) for answer in items.answers[number])

    chosen: list[int] = []
    held = 0
    for number in sorted(numbers, key=lambda number: -tokens(number)):
        if chosen and held + tokens(number) > most_tokens:
            yield chosen
            chosen, held = [], 0
        chosen.append(number)
        held += tokens(number)
    if chosen:
        yield chosen


def _text(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> str:
    ids = [int(token) for token in tokens]
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    text = str(tokenizer.ids_to_text(ids))
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]


def _bar(title: str, total: int) -> Progress:
    return Progress(total=total, desc=title, unit="items", disable=torch.distributed.get_rank() != 0)
