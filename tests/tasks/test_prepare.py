# SPDX-License-Identifier: Apache-2.0
"""Records become prompts and answers, each split for itself, once; what does not fit is named with its line. Pure Python."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.tasks import prepare as prepare_module
from nemo_tied_lora.tasks.prepare import Prepared, prepare
from nemo_tied_lora.tasks.task import Task
from tests.harness.paths import ROOT

FILES = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
MATHS = {"marker": "####", "metrics": ["maths_exact_match"]}
CHOICE = {"answer": None, "endings": "endings", "label": "label", "metrics": ["accuracy"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with 20, 5 and 6 records."""
    monkeypatch.chdir(tmp_path)
    for start, (name, count) in enumerate({"train": 20, "validation": 5, "test": 6}.items()):
        write(name, [{"q": f"{name} {start}.{n}?", "a": str(n)} for n in range(count)])
    return tmp_path


def write(name: str, records: list[Any]) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    Path(f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))


def task(**changes: Any) -> Task:
    values: dict[str, Any] = {"name": "mine", "folder": "out", "source": {"files": FILES}, "prompt": "Q: {q}\nA:"}
    values |= {"answer": "{a}", "metrics": ["f1"]}
    return Task.from_config({key: value for key, value in (values | changes).items() if value is not None})


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(task(**changes))
    return "\n".join(caught.value.problems)


def texts(prepared: Prepared, split: str, key: str = "input") -> list[Any]:
    return [item[key] for item in prepared.items(split)]


def test_a_line_holds_prompt_answer_and_references(capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepare(task())
    assert prepared.counts == {"train": 20, "validation": 5, "test": 6}
    first = next(prepared.items("train"))
    assert len(first.pop("id")) == 16
    assert first == {"input": "Q: train 0.0?\nA:", "output": " 0", "references": ["0"]}
    assert "task mine: 20 train, 5 validation, 6 test items in out" in capsys.readouterr().err
    record = json.loads(Path("out/task.json").read_text())
    assert record["splits"]["test"]["items"] == 6
    assert record["made_of"]["source"]["train"][0]["file"] == "train.jsonl"


def test_files_are_used_again_until_settings_source_or_content_change(capsys: pytest.CaptureFixture[str]) -> None:
    first = prepare(task()).checksum
    made = Path("out/train.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert prepare(task(max_seq_length=99, metrics=["bleu"])).checksum == first, "these do not change the items"
    assert (Path("out/train.jsonl").stat().st_mtime_ns, capsys.readouterr().err) == (made, "")
    assert prepare(task(prompt="{q}", limits={"test": 1})).checksum != first
    assert "task mine: task.prompt, task.limits changed; makes the files in out again" in capsys.readouterr().err
    assert prepare(task()).checksum == first
    write("test", [{"q": "new?", "a": "1"}])
    assert prepare(task()).counts["test"] == 1
    assert "the source's files changed" in capsys.readouterr().err
    Path("out/train.jsonl").write_text("damaged\n")
    assert len(list(prepare(task()).items("train"))) == 20


_USER = """
import sys
from nemo_tied_lora.tasks.locked import use
use(__import__("pathlib").Path("out"))
print("uses", flush=True)
sys.stdin.read()
"""


def test_files_that_another_process_uses_are_not_replaced() -> None:
    prepare(task())
    with subprocess.Popen([sys.executable, "-c", _USER], text=True, stdin=PIPE, stdout=PIPE, env=_env()) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "uses\n"
        said = refused(limits={"test": 3})
        what = "another run uses its files, which were made with other settings (task.limits)"
        assert said == f"task.folder=out: {what}; wait for it, or name another folder"
        assert prepare(task()).counts["test"] == 6  # the same settings: both use them
        Path("out", "test.jsonl").unlink()
        assert prepare(task()).counts["test"] == 6  # and both would make the same
        user.kill()
    assert prepare(task(limits={"test": 3})).counts["test"] == 3  # this process alone may change its mind
    assert prepare(task(limits={"test": 4})).counts["test"] == 4


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_nested_fields_lists_and_numbers_make_texts() -> None:
    record = {"title": {"en": "two"}, "answers": {"text": ["zwei", " beide ", "zwei"]}, "n": 1e3, "a.b": "dot"}
    write("test", [record])
    write("validation", [record | {"a.b": "other"}])
    write("train", ['{"title": {"en": "x"}, "answers": {"text": ["y"]}, "n": 1e3, "a.b": ""}'])
    found = prepare(task(prompt="{title.en} {n} {a.b}", answer="{answers.text.0}", references="answers.text"))
    assert next(found.items("test"))["input"] == "two 1000.0 dot"
    assert texts(found, "test", "references") == [["zwei", "beide"]]
    assert texts(found, "train") == ["x 1e3"], "numbers stay as written, and blanks at the end go, as in NeMo"


def test_a_choice_item_holds_its_endings_and_learns_the_right_one() -> None:
    for name in FILES:
        write(name, [{"q": name, "endings": ["no", " yes", "well"], "label": "1"}])
    item = next(prepare(task(**CHOICE)).items("test"))
    assert (item["endings"], item["label"], item["output"]) == ([" no", " yes", " well"], 1, " yes")


def test_endings_can_be_the_same_texts_for_every_item() -> None:
    for name in FILES:
        write(name, [{"q": name, "label": 1}])
    item = next(prepare(task(**CHOICE | {"endings": ["1", "2"]})).items("test"))
    assert (item["endings"], item["label"], item["output"]) == ([" 1", " 2"], 1, " 2")


def test_references_of_maths_are_what_follows_the_marker() -> None:
    for name in FILES:
        write(name, [{"q": name, "a": "2 + 2 = 4\n#### 4"}])
    found = prepare(task(**MATHS, separator=""))
    assert texts(found, "test", "references") == [["4"]]
    assert texts(found, "test", "output") == ["2 + 2 = 4\n#### 4"]


def test_groups_come_from_a_field_or_from_the_sources_splits() -> None:
    assert prepare(task(group="a")).record["splits"]["test"]["groups"] == {str(n): 1 for n in range(6)}
    packaged = {
        "packaged": "math_gsm_symbolic.jsonl.gz",
        "splits": {"test": {"old": "test", "new": "test_new_templates"}},
    }
    found = prepare(task(source=packaged, prompt="{question}", answer="{cot}", limits={"train": 5}))
    assert found.record["splits"]["test"]["groups"] == {"new": 204, "old": 816}
    assert found.counts == {"train": 5, "validation": 272, "test": 1020}


def test_limits_choose_by_id_whatever_the_order_and_grow_by_adding() -> None:
    few = texts(prepare(task(limits={"train": 7})), "train")
    lines = Path("train.jsonl").read_text().splitlines()
    write("train", lines[::-1])
    assert sorted(texts(prepare(task(limits={"train": 7})), "train")) == sorted(few)
    assert few != [f"Q: train 0.{n}?\nA:" for n in range(7)], "not simply the first"
    assert set(few) < set(texts(prepare(task(limits={"train": 12})), "train"))


def test_a_split_that_the_source_lacks_is_held_out_of_train() -> None:
    files = {"train": "train.jsonl", "test": ["test.jsonl", "validation.jsonl"]}
    found = prepare(task(source={"files": files}, limits={"validation": 4}))
    assert found.counts == {"train": 16, "validation": 4, "test": 11}
    assert not set(texts(found, "train")) & set(texts(found, "validation"))


def test_what_train_shares_with_test_is_left_out_of_train_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("train.jsonl").open("a") as file:
        file.write('{"q": "test 2.3?", "a": "another answer"}\n{"q": "validation 1.0?", "a": "0"}\n')
    with Path("validation.jsonl").open("a") as file:
        file.write('{"q": "test 2.4?", "a": "4"}\n{"q": "validation 1.0?", "a": "0"}\n')
    found = prepare(task(limits={"test": 1}))
    assert (found.counts["train"], found.counts["validation"]) == (20, 5), "test's limit does not decide it"
    said = capsys.readouterr().err
    assert "2 train items have a prompt that is in validation or test too; they are left out of train" in said
    assert "1 validation items have a prompt that is in test too" in said
    assert "1 validation items repeat another one" in said


def test_a_gzip_file_reads_like_a_plain_one(folder: Path) -> None:
    before = prepare(task()).checksum
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(Path("train.jsonl").read_bytes()))
    assert prepare(task(source={"files": FILES | {"train": "train.jsonl.gz"}})).checksum == before
    (folder / "cut.jsonl.gz").write_bytes((folder / "train.jsonl.gz").read_bytes()[:60])
    assert "cut.jsonl.gz: cannot be read" in refused(source={"files": FILES | {"train": "cut.jsonl.gz"}})


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        ({"question": "x", "a": "1"}, {}, 'test.jsonl: line 2: task.prompt: no field "q"; its fields are question, a'),
        (
            {"q": "x", "a": ["1"]},
            {},
            'task.answer: "a" is a list: must be a text or a number; name one of its elements, such as a.',
        ),
        ({"q": "x", "a": None}, {}, 'task.answer: "a" is null: must be a text or a number'),
        ({"q": "x", "a": " "}, {}, "task.answer: makes an empty answer"),
        ({"q": "x", "a": {"b": "c"}}, {"answer": "{a.d}"}, 'task.answer: no field "a.d"; the fields of "a" are b'),
        ({"q": "x", "a": "1"}, {"answer": "{a.d}"}, 'no field "a.d"; "a" is a text'),
        (
            {"q": "x", "a": ["y"]},
            {"answer": "{a.7}"},
            'no field "a.7"; "a" is a list of 1: elements are numbered from 0',
        ),
        ({"q": "x", "a": "1"}, MATHS | {"references": "r"}, 'task.references: no field "r"'),
        (
            {"q": "x", "a": "#### "},
            MATHS,
            "task.references: makes no reference: nothing comes after '####'",
        ),
        ({"q": "x", "a": "\ud83d"}, {}, "holds half of a surrogate pair"),
        *(
            ({"q": "x", "a": "1", "k": "\ud83d"}, {key: "k"}, "line 2: holds half of a surrogate pair")
            for key in ("group", "references")
        ),
        ({"q": "x", "a": "1", "k": "\ud83d"}, {"id": "k"}, "task.id: holds half of a surrogate pair"),
        (
            {"q": "y", "a": "#### 1", "k": 1},
            {"references": "k", "group": "k"},
            "line 2: prompt and answer are those of test.jsonl: line 1, but not the references and group; leave one out",
        ),
        ("[1]", {}, "test.jsonl: line 2: is not a JSON object"),
        ('{"q": ', {}, "test.jsonl: line 2: is not JSON: "),
        ({"q": "x", "a": "1"}, {"id": "key"}, 'task.id: no field "key"'),
        (
            {"q": "test 2.0?", "a": "1", "k": 0},
            {"id": "k"},
            "line 2: \"k\" is '0', as in test.jsonl: line 1: ids must differ",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_named_with_its_line(record: Any, changes: dict[str, Any], message: str) -> None:
    write("test", [{"q": "y", "a": "#### 1", "k": 0}, record])
    for name in ("train", "validation"):
        write(name, [{"q": name, "a": "#### 1", "k": 0}])
    assert message in refused(**changes)


@pytest.mark.parametrize(
    ("endings", "label", "message"),
    [
        (["a", "b"], 2, "task.label: \"label\" is '2': must be a whole number from 0 to 1"),
        (["a", "b"], -1, "must be a whole number from 0 to 1"),
        (["a", "b"], "", "must be a whole number from 0 to 1"),
        (["a"], 0, 'task.endings: "endings" must be a list of at least 2 texts'),
        ("ab", 0, 'task.endings: "endings" must be a list of at least 2 texts'),
        (["a", " "], 0, 'task.endings: "endings" holds an empty text'),
        (["a", None], 0, 'task.endings: "endings.1" is null'),
    ],
)
def test_a_wrong_choice_is_named(endings: Any, label: Any, message: str) -> None:
    for name in FILES:
        write(name, [{"q": name, "endings": endings, "label": label}])
    assert message in refused(**CHOICE)


def test_the_same_mistake_in_many_records_is_one_line() -> None:
    found = refused(prompt="{question}").splitlines()
    assert found == [
        'task mine: train.jsonl: line 1, and in the same way 30 more: task.prompt: no field "question"; its fields are q, a'
    ]


def test_records_that_differ_in_their_id_alone_are_one_item(capsys: pytest.CaptureFixture[str]) -> None:
    write("test", [{"q": "x", "a": "1", "k": key} for key in "abc"])
    for name in ("train", "validation"):
        write(name, [{"q": name, "a": "1", "k": name}])
    assert texts(prepare(task(id="k")), "test", "id") == ["a"]
    assert "2 test items repeat another one" in capsys.readouterr().err


def test_the_remedy_for_an_empty_split_is_a_key_that_exists(folder: Path) -> None:
    held_out = refused(source={"files": {key: FILES[key] for key in ("train", "test")}}, limits={"validation": 50})
    assert held_out.endswith(
        "no train item; give it records, or lower task.limits.validation=50, which are held out of it"
    )
    (folder / "validation.jsonl").write_text("\n")
    assert "hold some out of train: task.source.files.validation=null task.limits.validation=100" in refused()
    assert (
        prepare(task(source={"files": FILES | {"validation": None}}, limits={"validation": 5})).counts["train"] == 15
    )


def test_an_empty_split_is_refused(folder: Path) -> None:
    (folder / "test.jsonl").write_text("\n")
    assert refused() == "task mine: no test item; give it records"
    write("test", [{"q": "train 0.0?", "a": "0"}])
    write("train", [{"q": "train 0.0?", "a": "0"}])
    assert refused() == "task mine: no train item: all 1 have a prompt that another split has too; give it records"


def test_a_source_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    assert "task.source.files.train: train.jsonl: no such file" in refused()
    assert "task.source.packaged=x: no such file; choose from math_gsm_symbolic.jsonl.gz" in refused(
        source={"packaged": "x"}
    )
    packaged = {"packaged": "nli_wordnet_senses.jsonl.gz", "splits": {"test": "tests"}}
    assert "has no split tests; its splits are train, " in refused(source=packaged, prompt="{word}", answer="{word}")


def test_another_programs_files_are_not_replaced(folder: Path) -> None:
    (folder / "out").mkdir()
    shutil.copy("train.jsonl", "out/train.jsonl")
    assert "task.folder=out: holds train.jsonl without a task.json" in refused()


def test_no_room_and_an_unwritable_folder_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    assert (
        refused(folder="file/out") == "task.folder=file/out: cannot be written: Not a directory; name another folder"
    )
    usage = shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined]
    with monkeypatch.context() as full_disk:
        full_disk.setattr(prepare_module.shutil, "disk_usage", lambda path: usage)
        assert "task.folder=out: no room on disk: 2,963 bytes are needed, and 0 are free" in refused()
    assert not Path("out/task.json").exists()

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare_module, "write_atomically", full)
    assert refused() == "task.folder=out: cannot be written: No space left on device; name another folder"
