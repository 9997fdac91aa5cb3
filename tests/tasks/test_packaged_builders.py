# SPDX-License-Identifier: Apache-2.0
"""The builders of the packaged data, on small inputs, and what the packaged data hold. Pure Python."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.tasks.answer_texts import maths_exact_match
from nemo_tied_lora.tasks.builders.gsm_symbolic import build
from nemo_tied_lora.tasks.builders.wordnet_senses import Synset, read_synsets, senses
from nemo_tied_lora.tasks.prepare import prepare
from nemo_tied_lora.tasks.sources import packaged_folder, packaged_names
from nemo_tied_lora.tasks.task import Task


def packaged(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(packaged_folder() / name, "rt", encoding="utf-8")]


def test_each_packaged_file_has_its_licence_and_a_row_that_counts_its_records() -> None:
    page = (packaged_folder() / "README.md").read_text()
    for name in packaged_names():
        assert (packaged_folder() / name.replace(".jsonl.gz", ".LICENSE")).stat().st_size > 1000
        counts = Counter(record["split"] for record in packaged(name))
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert all(f"{count:,} {split}" in row for split, count in counts.items())


def test_no_word_is_in_two_splits_of_the_packaged_senses() -> None:
    splits = defaultdict(set)
    for record in packaged("nli_wordnet_senses.jsonl.gz"):
        splits[record["word"].lower()].add(record["split"])
    assert {len(found) for found in splits.values()} == {1}


def test_new_templates_of_the_packaged_mathematics_are_in_no_other_split() -> None:
    records = packaged("math_gsm_symbolic.jsonl.gz")
    new = {record["template"] for record in records if record["split"] == "test_new_templates"}
    assert len(new) == 17
    assert not new & {record["template"] for record in records if record["split"] != "test_new_templates"}
    assert all(maths_exact_match(record["cot"], [record["answer"]]) for record in records), "66.0 is 66"


LINES = """  1 This software and database is being provided to you
00001740 03 n 02 entity 0 being(a) 0 001 ~ 00001930 n 0000 | a thing that is; "he was an entity of his own"; "be it"
00002000 03 s 01 small_fry 0 000 | young fish
"""


def test_a_data_file_of_wordnet_gives_words_gloss_and_examples() -> None:
    first, second = read_synsets(LINES, "adj")
    assert first == Synset(
        "n-00001740", "adj", ("entity", "being"), "a thing that is", ("he was an entity of his own", "be it")
    )
    assert (second.key, second.words, second.examples) == ("a-00002000", ("small fry",), ())


def test_a_question_shows_the_right_gloss_among_four_of_the_same_word() -> None:
    words = [f"w{letter}ord" for letter in "abcdefghijklmnopqrst"]
    synsets = [
        Synset(
            f"n-{word}{sense}",
            "noun",
            (word,),
            f"sense {sense} of {word}",
            (f"this is the {word} of them", "too short"),
        )
        for word in words
        for sense in range(5)
    ]
    found = list(senses(synsets))
    assert len(found) == 100
    for record in found:
        assert len(set(record["endings"])) == 4
        assert record["endings"][record["label"]].replace("sense ", "").split(" of ")[0] == record["synset"][-1]
        assert all(record["word"] in ending for ending in record["endings"])
    assert len({(record["word"], record["split"]) for record in found}) == len(words)
    assert list(senses(synsets)) == found


def test_templates_that_are_held_out_and_draws_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a package of the same form, whose template 0 has few questions and template 1 none with a solution."""
    place = tmp_path / "reasoning_gym" / "arithmetic" / "gsm_symbolic"
    place.mkdir(parents=True)
    for folder in (place, place.parent, place.parent.parent):
        (folder / "__init__.py").touch()
    (place / "gsm_symbolic.py").write_text(f"tasks_ok = {list(range(30))}\n")
    body = """
def make(number):
    def generate(draw, difficulty):
        n = draw.randint(0, 3 if number == 0 else 10**6)
        if n % 3 == 1:
            raise ValueError("not a whole number")
        return {"question": f"{number}: {n}?", "answer": n, "metadata": {} if number == 1 else {"answer_cot": f"#### {n}"}}
    return generate
"""
    for part, numbers in (("00_49", range(50)), ("50_99", range(50, 100))):
        lines = "\n".join(f"generate_{number} = make({number})" for number in numbers)
        (place / f"generators_{part}.py").write_text(body + lines)
    (tmp_path / "reasoning_gym-1.dist-info").mkdir()
    (tmp_path / "reasoning_gym-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: reasoning-gym\nVersion: 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    records, origin = build({}, tmp_path)
    for name in [name for name in sys.modules if name.startswith("reasoning_gym")]:
        del sys.modules[name]
    assert origin == {"reasoning-gym": "1"}
    assert len({record["question"] for record in records}) == len(records)
    counts = Counter((record["split"], record["template"]) for record in records)
    new = {template for split, template in counts if split == "test_new_templates"}
    assert not {template for split, template in counts if split == "train"} & new
    assert len(new | {0, 1}) >= 17
    assert {counts["train", template] for template in range(2, 30) if template not in new} == {60}


def test_without_reasoning_gym_the_builder_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    changes = ["task.source.packaged=null", "task.source.builder=gsm_symbolic", f"task.folder={tmp_path / 'out'}"]
    values = plain(compose_config("finetune", ["task=math_gsm_symbolic", *changes]))["task"]
    with pytest.raises(
        ConfigError,
        match=r"^task.source.builder=gsm_symbolic: needs reasoning-gym .*pip install reasoning-gym==0.1.25",
    ):
        prepare(Task.from_config(values))
