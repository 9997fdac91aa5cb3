# SPDX-License-Identifier: Apache-2.0
"""Counts the answers that `max_seq_length` cuts, with NeMo's own rule, before the first step. Refuses to train on none."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import GPTSFTChatDataset
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset, GPTSFTPackedDataset
from nemo.utils import logging as nemo_logging

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.progress import Progress

__all__ = ["check_answers", "count_answers", "special_token_problems"]

_SHOW_FROM = 20_000
"""From so many examples on, progress is shown."""
_KINDS = ("answers", "cut", "lost", "prompts_cut")


def check_answers(sections: Mapping[str, Sequence[Any]]) -> None:
    """Counts on all ranks together, each its share. Rank 0 prints a line for each section that loses something.

    Args:
        sections: the datasets of each section, such as {"train_ds": [...]}.

    Raises:
        ConfigError: on every rank; in a section no answer is left, or a conversation cannot be trained on.
    """
    problems, rank = Problems(), torch.distributed.get_rank()
    for name, datasets in sections.items():
        counts = dict.fromkeys(_KINDS, 0)
        found: list[str] = []
        for dataset in datasets:
            if isinstance(dataset, GPTSFTDataset) and not isinstance(dataset, GPTSFTPackedDataset):
                share = range(rank, len(dataset.indexed_dataset), torch.distributed.get_world_size())
                part, wrong = count_answers(dataset, share, show=rank == 0)
                counts = {kind: counts[kind] + part[kind] for kind in _KINDS}
                found += [f"model.data.{name}.file_names: {dataset.file_path}: {problem}" for problem in wrong]
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, (counts, found))
        problems += [problem for _, its in shares for problem in its]
        line = _line(f"model.data.{name}", datasets[0], {k: sum(s[k] for s, _ in shares) for k in _KINDS}, problems)
        if line and rank == 0:
            print(line, flush=True)
    problems.raise_if_any()


def count_answers(dataset: Any, share: range, *, show: bool = False) -> tuple[dict[str, int], list[str]]:
    """Counts over the examples of `share`.

    Returns:
        The numbers of answers that are not empty; of those cut in part; of those lost; of prompts cut. And what is wrong
        with single examples.
    """
    measure = _conversation if isinstance(dataset, GPTSFTChatDataset) else _example
    counts, wrong = dict.fromkeys(_KINDS, 0), []
    shown = show and len(share) >= _SHOW_FROM
    bar = Progress(desc="counting tokens", total=len(share), unit="example", disable=not shown)
    with bar, nemo_logging.temp_verbosity(logging.ERROR):  # NeMo warns about each example
        for index in share:
            bar.update(1)
            try:
                answer, kept, prompt_cut = measure(dataset, dataset.indexed_dataset[index])
            except (AssertionError, ValueError, TypeError, KeyError) as error:
                wrong.append(
                    f"example {index + 1}, without blank lines: NeMo cannot read it: {error or type(error).__name__}"
                )
                continue
            counts["answers"] += answer > 0
            counts["lost"] += answer > 0 and kept == 0
            counts["cut"] += 0 < kept < answer
            counts["prompts_cut"] += prompt_cut
    more = len(wrong) - _MOST_LISTED
    return counts, [*wrong[:_MOST_LISTED], *([f"and {more:,} more examples like these"] if more > 0 else [])]


_MOST_LISTED = 5


def special_token_problems(model: Any, data: Mapping[str, Any]) -> Iterator[str]:
    """Yields the special tokens that the data's configuration needs and the tokenizer lacks."""
    tokenizer = model.tokenizer
    for name in ("train_ds", "validation_ds", "test_ds"):
        section = data.get(name) or {}
        if not section.get("file_names"):
            continue
        bos = getattr(tokenizer, "bos_id", None)
        if section.get("add_bos") and (bos is None or bos < 0):
            yield f"model.data.{name}.add_bos=true: the tokenizer has no token for the beginning of a text; set it to false"
        if section.get("add_sep") and not 0 <= model.sep_id < model.padded_vocab_size:
            yield (
                f"model.data.{name}.add_sep=true: model.sep_id={model.sep_id} is not a token of the base, which has "
                f"{model.padded_vocab_size}; set +model.sep_id, or add_sep=false"
            )
    if data.get("chat"):
        yield from _chat_token_problems(tokenizer, data.get("chat_prompt_tokens") or _NEMO_CHAT_TOKENS)


_NEMO_CHAT_TOKENS = {
    "system_turn_start": "<extra_id_0>",
    "turn_start": "<extra_id_1>",
    "label_start": "<extra_id_2>",
    "end_of_turn": "\n",
    "end_of_name": "\n",
}


def _chat_token_problems(tokenizer: Any, tokens: Mapping[str, str]) -> Iterator[str]:
    unknown = getattr(tokenizer, "unk_id", None)
    prefix = "\x00"  # as in NeMo: some tokenizers put a token in front of a text
    before = len(tokenizer.text_to_ids(prefix))
    for name, text in tokens.items():
        ids = tokenizer.text_to_ids(prefix + text)[before:]
        if len(ids) > 1 and torch.distributed.get_rank() == 0:
            shorter = "a text of one token leaves more room"
            print(
                f"model.data.chat_prompt_tokens.{name}={text!r}: {len(ids)} tokens of this tokenizer; {shorter}",
                flush=True,
            )
        if not ids or unknown in ids:
            yield (
                f"model.data.chat_prompt_tokens.{name}={text!r}: the tokenizer does not know it; choose a text that it "
                "can write, for all keys of chat_prompt_tokens"
            )


def _line(key: str, dataset: Any, counts: Mapping[str, int], problems: Problems) -> str | None:
    """The line to print; appends a problem if no answer is left."""
    answers, lost, cut, prompts = (counts[kind] for kind in ("answers", "lost", "cut", "prompts_cut"))
    length = dataset.max_seq_length
    fix = f"raise {key}.max_seq_length"
    if not isinstance(dataset, GPTSFTChatDataset):
        fix += ", or name fields of the prompt in truncation_field"
    if dataset.tokens_to_generate:
        fix += f", or lower tokens_to_generate={dataset.tokens_to_generate}, for which NeMo cuts too"
    if answers and lost == answers:
        problems.append(
            f"{key}.max_seq_length={length}: cuts away all {answers:,} answers, so nothing is left to learn; {fix}"
        )
        return None
    if not (lost or cut or prompts):
        return None
    parts = [f"{lost:,} of {answers:,} answers wholly", f"{cut:,} in part"] if lost or cut else ["no answer"]
    return f"{key}: max_seq_length={length} cuts {' and '.join(parts)}, and {prompts:,} prompts" + (
        f"; {fix}" if lost or cut else ""
    )


def _example(dataset: Any, example: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Returns the tokens of the answer, those that stay, and whether the prompt is cut. An empty answer has none."""
    values = [str(example.get(name, "")).strip(" ") for name in dataset.prompt_template_keys]
    texts, keys = dataset._separate_template(values)
    if _surely_fits(dataset, texts):
        return len(values[-1]), len(values[-1]), False
    ids = [dataset.tokenizer.text_to_ids(text) for text in texts]
    answer, prompt = len(ids[-1]), sum(map(len, ids[:-1]))
    kept_prompt, kept = dataset._multiple_truncation(ids, keys)
    return (answer, len(kept), len(kept_prompt) < prompt) if values[-1] else (0, 0, len(kept_prompt) < prompt)


def _surely_fits(dataset: Any, texts: Sequence[str]) -> bool:
    """Whether the example needs no tokenizer to see that it fits: ASCII has at most one token per character.

    A tokenizer may put a token in front of each text. Other characters may become several tokens.
    """
    most = sum(len(text) + 1 for text in texts[:-1]) + max(len(texts[-1]) + 1, dataset.tokens_to_generate)
    most += dataset.virtual_tokens + dataset.add_bos + dataset.add_sep + dataset.add_eos
    return most <= dataset.max_seq_length and all(text.isascii() for text in texts)


def _conversation(dataset: Any, example: dict[str, Any]) -> tuple[int, int, bool]:
    """The same for NeMo's conversations: what counts is the tokens that are trained on."""
    found = dataset._process_example(example)
    prompt, new, length = len(found["context_ids"]), dataset.tokens_to_generate, dataset.max_seq_length
    if new and prompt + new > length:
        sizes = f"its prompt of {prompt} tokens and tokens_to_generate={new} exceed max_seq_length={length}"
        raise ValueError(f"{sizes}; raise it, lower tokens_to_generate, or set metric.name=loss")
    mask = found["mask"][1:]
    return int(mask.sum()), int(mask[: dataset.max_seq_length].sum()), False
