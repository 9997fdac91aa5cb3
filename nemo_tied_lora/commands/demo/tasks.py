# SPDX-License-Identifier: Apache-2.0
"""The quickstart's data: numbers written out in words, in NeMo's JSONL form, and the tokenizer that spells them.

One example is one number in one language, the answer taken from num2words:

    {"input": "fr 1234:", "output": "mille deux cent trente-quatre"}

- ``pretrain``: the languages of ``BASE_LANGUAGES``, from which the base model is made.
- ``finetune``: ``FINETUNE_LANGUAGE``, which the base has never seen.

The split rule. A number from 1 to 1999 is put into train, validation or test by its place in one order of all of them,
the order of sha256("seed:number"). The three are disjoint slices of one permutation, and the language takes no part in
the rule: so a held-out number is in no training file of any language, neither the base's nor the fine-tuning's.

NeMo strips blanks from both fields, so no answer begins with one. The prompt template is ``"{input}{output}"``.
Everything is a function of the seed: the same seed gives the same bytes on every machine, with no download.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_tied_lora.files import write_atomically

__all__ = [
    "BASE_LANGUAGES",
    "FINETUNE_LANGUAGE",
    "NUMBERS",
    "Example",
    "NumberSplits",
    "finetune_examples",
    "number_in_words",
    "pretrain_examples",
    "split_numbers",
    "train_tokenizer",
    "write_quickstart_data",
]

BASE_LANGUAGES = ("en", "fr", "es", "it", "pt", "nl", "sv", "tr")
"""num2words' codes of the languages of the base. Dutch puts ones before tens, as German does; Swedish and Turkish have
umlauts. All write every number below 2000 in at most 40 bytes."""

FINETUNE_LANGUAGE = "de"
"""num2words' code of the language that is held back for fine-tuning."""

NUMBERS = range(1, 2000)
"""The numbers of every task. Not 0: its word occurs in no other number, so it could only be learned by heart."""

TOKENIZER_VOCAB_SIZE = 448
"""Pieces: 4 special ones, 256 bytes, the base's characters, then merges. Few, so that the new language is spelled from
short pieces, which fine-tunes better; enough that every prompt and answer together fit into 32 tokens."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One line of a JSONL file; the fields have the names that NeMo's SFT dataset reads."""

    input: str
    """The prompt: language code, blank, digits, colon: ``"de 21:"``."""
    output: str
    """The answer: the number in words, ``"einundzwanzig"``."""


@dataclass(frozen=True, kw_only=True)
class NumberSplits:
    """Three disjoint sets of numbers that together are ``NUMBERS``, each in ascending order."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def number_in_words(number: int, language: str) -> str:
    """``number`` in words, lower case, as num2words writes it.

    English is given in the American reading, "one thousand two hundred thirty-four": without num2words' commas and
    "and" it stays as short as the other languages, and short examples make short batches.

    Raises:
        ValueError: the language is neither in ``BASE_LANGUAGES`` nor ``FINETUNE_LANGUAGE``.
    """
    from num2words import num2words  # imported here: only making the data needs it

    known = (*BASE_LANGUAGES, FINETUNE_LANGUAGE)
    if language not in known:
        raise ValueError(f"language={language!r} is not one of the quickstart's: choose from {', '.join(known)}")
    words: str = num2words(number, lang=language)
    return words.replace(",", "").replace(" and ", " ") if language == "en" else words


def split_numbers(seed: int = 1234, *, validation: int = 100, test: int = 200) -> NumberSplits:
    """Divide ``NUMBERS`` by the split rule of this module.

    Args:
        seed: another seed gives another order of the numbers.
        validation: how many numbers are held out for validation.
        test: how many numbers are held out for the final exact match.

    Raises:
        ValueError: a held-out size is below 1, or nothing is left for training.
    """
    sizes = {"validation": validation, "test": test}
    wrong = [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]
    if not wrong and validation + test >= len(NUMBERS):
        wrong = [f"validation={validation} and test={test} leave no number to train on: give less than {len(NUMBERS)}"]
    if wrong:
        raise ValueError("; ".join(wrong))
    order = sorted(NUMBERS, key=lambda number: _digest(seed, number))
    return NumberSplits(
        test=tuple(sorted(order[:test])),
        validation=tuple(sorted(order[test : test + validation])),
        train=tuple(sorted(order[test + validation :])),
    )


def pretrain_examples(numbers: Iterable[int], seed: int = 1234) -> list[Example]:
    """One example for each number in each base language, in an order that mixes languages and sizes."""
    return _examples([(language, number) for number in numbers for language in BASE_LANGUAGES], seed)


def finetune_examples(numbers: Iterable[int], seed: int = 1234) -> list[Example]:
    """One example for each number in the fine-tuning language, in an order that mixes sizes."""
    return _examples([(FINETUNE_LANGUAGE, number) for number in numbers], seed)


def train_tokenizer(examples: Sequence[Example], path: Path) -> Path:
    """Train the quickstart's sentencepiece BPE model on ``examples`` and write it to ``path``, atomically.

    Bytes are the fall-back, so every text can be spelled, also in letters that the examples lack. Digits are split, so
    that a number is read digit by digit. The file holds no path and no time: it depends on the examples alone.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("examples is empty: a tokenizer needs text to learn from")
    import sentencepiece  # imported here: only making the tokenizer needs it

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([example.input + example.output for example in examples]),
        model_writer=model,
        model_type="bpe",
        vocab_size=TOKENIZER_VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        # Prompt and answer are tokenized apart and decoded alone: no blank may be added, dropped or merged.
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return write_atomically(path, model.getvalue())


def write_quickstart_data(folder: Path, seed: int = 1234) -> dict[str, Path]:
    """Write every file of the quickstart's data into ``folder`` and return their paths by name.

    Names: ``pretrain_train``, ``pretrain_validation``, ``finetune_train``, ``finetune_validation``, ``finetune_test``
    (JSONL) and ``tokenizer`` (a sentencepiece model, trained on ``pretrain_train`` alone). Each file is replaced
    whole, so that a reader, or a second process writing the same, never meets half of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = split_numbers(seed)
    examples = {
        "pretrain_train": pretrain_examples(splits.train, seed),
        "pretrain_validation": pretrain_examples(splits.validation, seed),
        "finetune_train": finetune_examples(splits.train, seed),
        "finetune_validation": finetune_examples(splits.validation, seed),
        "finetune_test": finetune_examples(splits.test, seed),
    }
    paths = {name: write_atomically(folder / f"{name}.jsonl", _jsonl(lines)) for name, lines in examples.items()}
    paths["tokenizer"] = train_tokenizer(examples["pretrain_train"], folder / "tokenizer.model")
    return paths


def _digest(*parts: object) -> bytes:
    """A value to sort by that depends on nothing but the parts: no library's random generator, no hash seed."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


def _examples(pairs: list[tuple[str, int]], seed: int) -> list[Example]:
    """The examples of (language, number) pairs, mixed: a reader that does not shuffle still gets mixed batches."""
    mixed = sorted(pairs, key=lambda pair: _digest(seed, *pair))
    return [Example(input=f"{lang} {number}:", output=number_in_words(number, lang)) for lang, number in mixed]


def _jsonl(examples: list[Example]) -> bytes:
    def lines() -> Iterator[str]:
        for example in examples:
            yield json.dumps({"input": example.input, "output": example.output}, ensure_ascii=False) + "\n"

    return "".join(lines()).encode("utf-8")
