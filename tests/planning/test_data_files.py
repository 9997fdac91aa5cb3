# SPDX-License-Identifier: Apache-2.0
"""All data files of a run are checked before it starts, once, and large ones only if they have changed. Pure Python."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.data import data_checks, data_files, data_verdicts, packed_files
from nemo_tied_lora.planning.data.data_checks import data_problems
from nemo_tied_lora.planning.data.data_files import check_prompts_file, check_training_files
from nemo_tied_lora.planning.data.packed_files import packed_problem
from nemo_tied_lora.planning.settings.text_checks import text_problems

GOOD = '{"input": "a", "output": "b"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files of every section. It is the user's home too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TIED_LORA_CHECKED_DATA", raising=False)
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(GOOD * 4)
    return tmp_path


def run(*overrides: str) -> dict[str, Any]:
    """The configuration of a run on these files."""
    files = [f"model.data.{name}_ds.file_names=[{name}.jsonl]" for name in ("train", "validation", "test")]
    return plain(compose_config("finetune", [*files, *overrides]))


def problems(*overrides: str) -> list[str]:
    """All problems of the data of a run: of its configuration and of its files."""
    found = list(data_problems(cfg := run(*overrides)))
    try:
        check_training_files(cfg)
    except ConfigError as error:
        found += error.problems
    return found


def test_right_files_have_no_problems_and_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert problems() == []
    assert capsys.readouterr() == ("", "")


def test_the_problems_of_all_files_are_reported_together_with_file_and_line(folder: Path) -> None:
    (folder / "train.jsonl").write_text(GOOD + "{}\n" + GOOD + '{"input": null, "output": "b"}\n')
    (folder / "validation.jsonl").write_bytes(b"\xff\xfe" + GOOD.encode("utf-16-le"))
    (folder / "test.jsonl").write_text(GOOD + "\n" + '{"inp')
    assert [problem.split(": ")[:3] for problem in problems()] == [
        ["model.data.train_ds.file_names", "train.jsonl", "line 2"],
        ["model.data.train_ds.file_names", "train.jsonl", "line 4"],
        ["model.data.validation_ds.file_names", "validation.jsonl", "is UTF-16 text, not UTF-8; convert it"],
        ["model.data.test_ds.file_names", "test.jsonl", "line 3"],
    ]


def test_notes_are_printed_once_for_each_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train.jsonl").write_text("\ufeff" + GOOD + "\n\n" + '{"input": 1, "output": "b"}\n')
    assert (
        problems("model.data.validation_ds.file_names=[train.jsonl]", "model.data.validation_ds.metric.name=loss")
        == []
    )
    assert capsys.readouterr().err.splitlines() == [
        "train.jsonl: begins with a byte order mark, which is skipped",
        "train.jsonl: 2 blank lines skipped",
        "train.jsonl: 1 of 2 examples with a number that is taken as its text",
    ]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ("[missing.jsonl]", "missing.jsonl: no such file"),
        ("['~/train.jsonl']", "a shell has not replaced ~"),
        ("[.]", "is a folder; name the files in it"),
        ("[pipe]", "is not a regular file"),
        ("train.jsonl", "must be a list of JSONL files"),
        ("[]", "must be a list of JSONL files"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(folder: Path, files: str, says: str) -> None:
    os.mkfifo(folder / "pipe")
    found = problems(
        f"model.data.train_ds.file_names={files}", "model.data.train_ds.concat_sampling_probabilities=[1.0]"
    )
    assert len(found) == 1
    assert says in found[0]


def test_a_file_without_permission_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def refuse(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == "train.jsonl":
            raise PermissionError(13, "Permission denied")
        return original(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert problems() == ["model.data.train_ds.file_names: train.jsonl: cannot be read: Permission denied"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "model.data.train_ds.label_key=answer",
            "model.data.train_ds.prompt_template='{input} {output}': must end in",
        ),
        ("model.data.train_ds.truncation_field=question", "model.data.train_ds.truncation_field='question': question"),
        ('model.data.train_ds.prompt_template="{input {output}"', "a brace without a field"),
    ],
)
def test_keys_that_do_not_fit_the_template_are_reported_once(override: str, says: str) -> None:
    found = problems(override)
    assert len(found) == 1
    assert says in found[0]


def test_null_truncates_the_whole_example() -> None:
    cfg = run("model.data.train_ds.truncation_field=null")
    assert [*text_problems("finetune", cfg), *data_problems(cfg)] == []


def test_an_answer_may_be_missing_only_where_predictions_are_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "test.jsonl").write_text('{"input": "a"}\n' * 3)
    assert ["line 1, and in the same way each of the other 2: has no" in p for p in problems()] == [True]
    assert problems("model.data.test_ds.write_predictions_to_file=true") == []
    assert '3 of 3 examples without "output"' in capsys.readouterr().err


def test_an_empty_prompt_is_refused_where_answers_are_generated_from_it(folder: Path) -> None:
    (folder / "validation.jsonl").write_text(GOOD + '{"input": "", "output": "b"}\n')
    (folder / "train.jsonl").write_text('{"input": "", "output": "b"}\n')
    assert [p.split("; ")[0] for p in problems()] == [
        "model.data.validation_ds.file_names: validation.jsonl: line 2: has an empty prompt, from which validation "
        "cannot generate"
    ]
    assert problems("model.data.validation_ds.metric.name=loss") == []
    assert problems("model.data.validation_ds.add_bos=true") == []


def test_prompts_are_checked_line_by_line(folder: Path) -> None:
    (folder / "questions.jsonl").write_text('{"q": "a"}\n\n{"x": "b"}\n{"q": null}\n{"q": 3}\n{"q": ""}\n')
    cfg = {"prompts_file": "questions.jsonl", "prompt_template": "Q: {q}"}
    with pytest.raises(ConfigError) as refused:
        check_prompts_file(cfg)
    assert [p.split(": ")[2] for p in refused.value.problems] == ["line 3", "line 4"]


# The rest: what is read when.


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that gets the name of each file that is read."""
    names: list[str] = []
    original = data_files.check_file

    def count(path: Path, form: Any) -> Any:
        names.append(path.name)
        return original(path, form)

    monkeypatch.setattr(data_files, "check_file", count)
    return names


def test_a_large_file_is_read_again_only_if_it_or_the_template_has_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_verdicts, "_LEAST_BYTES", 200)
    train = folder / "train.jsonl"
    train.write_text(GOOD * 20 + "\n")
    os.utime(train, (1, 1))
    names = reads(monkeypatch)
    for _ in range(2):
        assert problems() == []
        assert capsys.readouterr().err == "train.jsonl: 1 blank line skipped\n"
    assert names.count("train.jsonl") == 1
    assert names.count("test.jsonl") == 2  # small
    os.utime(train, (2, 2))
    problems()
    problems("model.data.train_ds.truncation_field=null", "model.data.train_ds.prompt_template='{input}: {output}'")
    train.write_text(GOOD * 20 + "{}\n")
    os.utime(train, (2, 2))
    assert problems()
    assert problems()  # what is wrong is not remembered
    assert names.count("train.jsonl") == 5


def test_a_file_that_has_just_changed_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_verdicts, "_LEAST_BYTES", 1)
    problems()
    assert not (folder / "cache").exists()


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.setattr(data_verdicts, "_LEAST_BYTES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    os.utime(folder / "train.jsonl", (1, 1))
    assert problems() == []


def test_ranks_skip_what_the_process_that_started_them_has_read(folder: Path) -> None:
    cfg = run()
    assert not data_files.checked_already(cfg)
    data_files.mark_checked(cfg)
    assert data_files.checked_already(cfg)
    os.utime(folder / "train.jsonl", (1, 1))
    assert not data_files.checked_already(cfg)
    data_files.mark_checked(cfg)
    assert not data_files.checked_already(run("model.data.validation_ds.metric.name=loss"))


# NeMo's other forms of data.


def npy(content: object, descr: str = "|O", shape: tuple[int, ...] = (1,)) -> bytes:
    """A .npy file of version 1.0 with an object array, as numpy writes it."""
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickle.dumps(content)


PACKED = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "seq_start_id": [0]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (npy([PACKED]), None),
        (npy([{k: PACKED[k] for k in ("input_ids", "loss_mask")}]), "without seq_start_id"),
        (npy([PACKED])[:-40], "cut off or damaged"),
        (npy([], shape=(0,)), "no packed sequence"),
        (npy([PACKED], descr="<i8", shape=(3, 2)), "an array of '<i8'"),
        (b"\x93NUMPY\x01\x00\xff", "damaged NumPy header"),
        (GOOD.encode(), "is not a NumPy file"),
        (b"", "is not a NumPy file"),
    ],
    ids=["right", "a key missing", "cut", "empty", "numbers", "header", "JSONL", "zero bytes"],
)
def test_packed_sequences_are_recognized_without_unpickling(tmp_path: Path, content: bytes, says: str | None) -> None:
    path = tmp_path / "packed.npy"
    path.write_bytes(content)
    found = packed_problem(path)
    assert found is None if says is None else found is not None and says in found


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "packed.npy").write_bytes(npy([Bomb()]))
    assert "without" in str(packed_problem(tmp_path / "packed.npy"))
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "ran").exists()


def test_packed_sequences_need_transformer_engine_and_single_sequences(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "packed.npy").write_bytes(npy([PACKED]))
    packed = ["model.data.train_ds.packed_sequence=true", "model.data.train_ds.file_names=[packed.npy]"]
    monkeypatch.setattr(data_checks.importlib.util, "find_spec", lambda name: None)
    refused = problems(*packed, "model.micro_batch_size=1")
    assert len(refused) == 1
    assert "needs the attention of Transformer Engine" in refused[0]
    monkeypatch.setattr(data_checks.importlib.util, "find_spec", lambda name: name)
    assert problems(*packed, "model.micro_batch_size=1") == []
    assert ["micro_batch_size=2: must be 1" in p for p in problems(*packed, "model.micro_batch_size=2")] == [True]
    (folder / "packed.npy").write_text(GOOD)
    assert ["is not a NumPy file" in p for p in problems(*packed, "model.micro_batch_size=1")] == [True]


def test_conversations_are_checked_as_conversations(folder: Path) -> None:
    turns = [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b"}]
    line = json.dumps({"system": "", "conversations": turns, "mask": "User"}) + "\n"
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").write_text(line * 2)
    assert problems("model.data.chat=true") == []
    assert [p for p in problems() if "train on them with model.data.chat=true" in p]
    (folder / "train.jsonl").write_text(line + GOOD)
    assert ["line 2: has no " in p for p in problems("model.data.chat=true")] == [True]


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ("{turn_start: x}", "lacks system_turn_start, label_start, end_of_turn, end_of_name"),
        ("{turn_start: '', system_turn_start: a, label_start: b, end_of_turn: c, end_of_name: d}", "not empty"),
        (
            "{turn_start: e, system_turn_start: a, label_start: b, end_of_turn: c, end_of_name: d, x: y}",
            ".x: not a key",
        ),
        ("5", "must be a section"),
    ],
)
def test_wrong_tokens_of_a_conversation_are_named(tokens: str, says: str) -> None:
    found = list(data_problems(run("model.data.chat=true", f"model.data.chat_prompt_tokens={tokens}")))
    assert len(found) == 1
    assert says in found[0]


def test_the_search_for_a_packed_sequences_keys_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_files, "_MOST_OPCODES", 100)
    path = tmp_path / "packed.npy"
    path.write_bytes(npy([{**PACKED, "input_ids": list(range(1000))}]))
    assert "without" in str(packed_problem(path))
