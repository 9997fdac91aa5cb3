# SPDX-License-Identifier: Apache-2.0
"""Pure maths: the quickstart's files, splits and tokenizer, without a model."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_tied_lora.commands.demo import tasks

JSONL_FILES = ("pretrain_train", "pretrain_validation", "finetune_train", "finetune_validation", "finetune_test")
TRAINING_FILES = ("pretrain_train", "finetune_train")
HELD_OUT_FILES = ("pretrain_validation", "finetune_validation", "finetune_test")
LONGEST_EXAMPLE = 32  # tokens: twice 16, to which NeMo's SFT dataset pads

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tasks.write_quickstart_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def rows(paths: dict[str, Path]) -> dict[str, Rows]:
    return {name: [json.loads(line) for line in paths[name].read_text("utf-8").splitlines()] for name in JSONL_FILES}


def number_of(row: dict[str, str]) -> int:
    return int(row["input"].split(" ")[1].rstrip(":"))


def language_of(row: dict[str, str]) -> str:
    return row["input"].split(" ")[0]


def leaked_numbers(rows: dict[str, Rows]) -> set[int]:
    """The numbers that are both in a training file and in a held-out file, of any task and language."""
    trained = {number_of(row) for name in TRAINING_FILES for row in rows[name]}
    held_out = {number_of(row) for name in HELD_OUT_FILES for row in rows[name]}
    return trained & held_out


def test_no_held_out_number_is_in_any_training_file(rows: dict[str, Rows]) -> None:
    assert leaked_numbers(rows) == set()


def test_the_leak_check_finds_one_planted_number(rows: dict[str, Rows]) -> None:
    planted = number_of(rows["finetune_test"][0])
    leaking = {**rows, "pretrain_train": [*rows["pretrain_train"], {"input": f"sv {planted}:", "output": ""}]}
    assert leaked_numbers(leaking) == {planted}


def test_validation_and_test_numbers_are_disjoint(rows: dict[str, Rows]) -> None:
    validation = {number_of(row) for row in rows["finetune_validation"]}
    assert validation.isdisjoint(number_of(row) for row in rows["finetune_test"])


@pytest.mark.parametrize("seed", [0, 1, 1234, 2**40])
def test_the_splits_are_a_partition_of_all_numbers_for_every_seed(seed: int) -> None:
    splits = tasks.split_numbers(seed)
    assert (len(splits.validation), len(splits.test)) == (100, 200)
    assert sorted(splits.train + splits.validation + splits.test) == list(tasks.NUMBERS)


def test_the_split_follows_the_documented_order() -> None:
    order = sorted(range(1, 2000), key=lambda number: hashlib.sha256(f"7:{number}".encode()).digest())
    splits = tasks.split_numbers(7, validation=3, test=5)
    assert (set(splits.test), set(splits.validation)) == (set(order[:5]), set(order[5:8]))


def test_another_seed_holds_out_other_numbers() -> None:
    assert tasks.split_numbers(1).test != tasks.split_numbers(2).test


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (0, 200, "validation=0"),
        (100, -1, "test=-1"),
        (0, 0, "validation=0.*test=0"),
        (1000, 999, "no number to train on"),
    ],
)
def test_a_split_that_cannot_work_is_refused_by_name(validation: int, test: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.split_numbers(validation=validation, test=test)


def test_every_number_and_language_occurs_once(rows: dict[str, Rows]) -> None:
    splits = tasks.split_numbers()
    wanted = {
        "pretrain_train": {(lang, n) for lang in tasks.BASE_LANGUAGES for n in splits.train},
        "pretrain_validation": {(lang, n) for lang in tasks.BASE_LANGUAGES for n in splits.validation},
        "finetune_train": {("de", n) for n in splits.train},
        "finetune_validation": {("de", n) for n in splits.validation},
        "finetune_test": {("de", n) for n in splits.test},
    }
    for name, pairs in wanted.items():
        found = [(language_of(row), number_of(row)) for row in rows[name]]
        assert sorted(found) == sorted(pairs), name


def test_the_base_never_sees_german(rows: dict[str, Rows]) -> None:
    base = rows["pretrain_train"] + rows["pretrain_validation"]
    assert {language_of(row) for row in base} == set(tasks.BASE_LANGUAGES)
    german = {tasks.number_in_words(number, tasks.FINETUNE_LANGUAGE) for number in tasks.NUMBERS}
    # Three whole answers are the same in Dutch and German, but nothing longer is.
    assert german & {row["output"] for row in base} <= {"acht", "elf", "vier"}
    for word in ("hundert", "tausend", "zwanzig", "eins", "fünf", "ß"):
        assert not any(word in row["output"] for row in base), word


def test_the_answers_are_in_the_right_language() -> None:
    assert {lang: tasks.number_in_words(1234, lang) for lang in (*tasks.BASE_LANGUAGES, "de")} == {
        "en": "one thousand two hundred thirty-four",
        "fr": "mille deux cent trente-quatre",
        "es": "mil doscientos treinta y cuatro",
        "it": "milleduecentotrentaquattro",
        "pt": "mil duzentos e trinta e quatro",
        "nl": "duizendtweehonderdvierendertig",
        "sv": "etttusen tvåhundratrettiofyra",
        "tr": "binikiyüzotuzdört",
        "de": "eintausendzweihundertvierunddreißig",
    }


def test_no_two_numbers_have_the_same_words() -> None:
    for language in (*tasks.BASE_LANGUAGES, tasks.FINETUNE_LANGUAGE):
        words = {tasks.number_in_words(number, language) for number in tasks.NUMBERS}
        assert len(words) == len(tasks.NUMBERS), language


def test_an_unknown_language_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"language='xx'.*en, fr.*de"):
        tasks.number_in_words(1, "xx")


def test_lines_have_only_nemos_fields_and_no_blanks_that_nemo_strips(rows: dict[str, Rows]) -> None:
    for row in (row for name in JSONL_FILES for row in rows[name]):
        assert set(row) == {"input", "output"}
        assert all(row.values())
        assert row == {key: text.strip() for key, text in row.items()}


def test_files_are_byte_identical_in_another_folder_and_process(paths: dict[str, Path], tmp_path: Path) -> None:
    program = "import sys, pathlib; from nemo_tied_lora.commands.demo.tasks import write_quickstart_data as write\n"
    program += "write(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "again")], check=True, env=environment, timeout=120)
    for path in paths.values():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_the_seed_reaches_every_jsonl_file(paths: dict[str, Path], tmp_path: Path) -> None:
    other = tasks.write_quickstart_data(tmp_path, seed=7)
    for name in JSONL_FILES:
        assert paths[name].read_bytes() != other[name].read_bytes(), name


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tasks.train_tokenizer(tasks.pretrain_examples(range(1, 300)), tmp_path / "tokenizer.model")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tasks.train_tokenizer(tasks.pretrain_examples(range(300, 700)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_tokenizer_needs_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="examples is empty"):
        tasks.train_tokenizer([], tmp_path / "tokenizer.model")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_spells_every_example_within_the_padded_length(
    paths: dict[str, Path], rows: dict[str, Rows]
) -> None:
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_file=str(paths["tokenizer"]))
    assert tokenizer.vocab_size() == tasks.TOKENIZER_VOCAB_SIZE
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, 3)
    for row in (row for name in JSONL_FILES for row in rows[name]):
        prompt, answer = tokenizer.encode(row["input"]), tokenizer.encode(row["output"])
        assert tokenizer.unk_id() not in prompt + answer
        assert (tokenizer.decode(prompt), tokenizer.decode(answer)) == (row["input"], row["output"])
        assert len(prompt) + len(answer) <= LONGEST_EXAMPLE


@pytest.mark.parametrize("text", ["Straße", "äöüÄÖÜß", "naïve œuvre", "数字 12", "  two  blanks "])
def test_the_tokenizer_spells_letters_it_was_not_trained_on(paths: dict[str, Path], text: str) -> None:
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_file=str(paths["tokenizer"]))
    assert tokenizer.decode(tokenizer.encode(text)) == text
