# SPDX-License-Identifier: Apache-2.0
"""Makes the quickstart's data: numbers written out in words as NeMo's JSONL, and a tokenizer for them.

One example is one number in one language. num2words gives the answer:

    {"input": "fr 1234:", "output": "mille deux cent trente-quatre"}

- ``pretrain``: the languages of ``BASE_LANGUAGES``. The base model is trained on them.
- ``finetune``: ``FINETUNE_LANGUAGE``, which the base has never seen.

The split rule: sha256("seed:number") orders the numbers from 1 to 1999. Test, validation and train are slices of this
order. The rule ignores the language, so a held-out number is in no training file of any language.

NeMo strips blanks from both fields, so no answer begins with one. The prompt template is ``"{input}{output}"``.
The data depends only on the seed: the same seed gives the same bytes on every machine, without a download.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
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
"""The base's languages, as num2words' codes. Dutch puts ones before tens, as German does; Swedish and Turkish have
umlauts. Each of them writes every number below 2000 in at most 40 bytes."""

FINETUNE_LANGUAGE = "de"
"""The language for fine-tuning, which the base does not see, as num2words' code."""

NUMBERS = range(1, 2000)
"""The numbers of every task. 0 is left out: its word is in no other number, so a model could only memorize it."""

TOKENIZER_VOCAB_SIZE = 448
"""4 special pieces, 256 bytes, the base's characters, then merges. Few merges spell the new language in short pieces,
which fine-tunes better; there are enough that each prompt with its answer fits into 32 tokens."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One line of a JSONL file. NeMo's SFT dataset reads these field names."""

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

    English loses num2words' commas and "and": "one thousand two hundred thirty-four". So it is as short as the other
    languages, and short examples make short batches.

    Raises:
        ValueError: the language is neither in ``BASE_LANGUAGES`` nor ``FINETUNE_LANGUAGE``.
    """
    from num2words import num2words  # optional: only making the data needs it

    known = (*BASE_LANGUAGES, FINETUNE_LANGUAGE)
    if language not in known:
        raise ValueError(
            f"language={language!r} is not one of the quickstart's languages; choose from {', '.join(known)}"
        )
    words: str = num2words(number, lang=language)
    return words.replace(",", "").replace(" and ", " ") if language == "en" else words


def split_numbers(seed: int = 1234, *, validation: int = 100, test: int = 200) -> NumberSplits:
    """Splits ``NUMBERS`` by the split rule of this module.

    Args:
        seed: another seed gives another order of the numbers.
        validation: the number of numbers held out for validation.
        test: the number of numbers held out for the final exact match.

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
    """One example per number and base language, in an order that mixes languages and sizes."""
    return _examples([(language, number) for number in numbers for language in BASE_LANGUAGES], seed)


def finetune_examples(numbers: Iterable[int], seed: int = 1234) -> list[Example]:
    """One example per number in the fine-tuning language, in an order that mixes sizes."""
    return _examples([(FINETUNE_LANGUAGE, number) for number in numbers], seed)


def train_tokenizer(examples: Sequence[Example], path: Path) -> Path:
    """Trains the quickstart's sentencepiece BPE model on ``examples`` and writes it to ``path``, atomically.

    Letters that the examples lack are encoded as bytes. Each digit is a token. The file holds no path and no time: it
    depends only on the examples.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("examples is empty: a tokenizer needs text to learn from")
    import sentencepiece  # optional: only making the tokenizer needs it

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([example.input + example.output for example in examples]),
        model_writer=model,
        model_type="bpe",
        vocab_size=TOKENIZER_VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        # NeMo tokenizes prompt and answer separately, so the tokenizer must not add, drop or merge blanks.
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
    """Writes the quickstart's data into ``folder`` and returns the paths by name.

    Names: ``pretrain_train``, ``pretrain_validation``, ``finetune_train``, ``finetune_validation``, ``finetune_test``
    (JSONL) and ``tokenizer`` (a sentencepiece model, trained on ``pretrain_train`` alone). Each file is replaced
    atomically, so a second process that writes the same file does no harm.
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
    """A sort key that depends only on the parts, not on a random generator or Python's hash seed."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


def _examples(pairs: list[tuple[str, int]], seed: int) -> list[Example]:
    """The examples of (language, number) pairs, in mixed order for readers that do not shuffle."""
    mixed = sorted(pairs, key=lambda pair: _digest(seed, *pair))
    return [Example(input=f"{lang} {number}:", output=number_in_words(number, lang)) for lang, number in mixed]


def _jsonl(examples: list[Example]) -> bytes:
    return "".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples).encode("utf-8")
