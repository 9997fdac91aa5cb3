# SPDX-License-Identifier: Apache-2.0
"""The paper's five data sets: small folders in the form of the hub, read by the code that reads the hub. Pure Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.tasks.prepare import Prepared, prepare
from nemo_tied_lora.tasks.task import Task


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


def task(name: str, *overrides: str) -> Task:
    """The shipped task, on the folder `hub`; 2 items are held out where the set has no validation split."""
    values = plain(compose_config("finetune", [f"task={name}", "task.source.hub=hub", *overrides]))["task"]
    values["limits"]["validation"] = values["limits"]["validation"] and 2
    return Task.from_config(values)


def written(name: str, records: list[dict[str, Any]]) -> None:
    path = Path("hub", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = datasets.Dataset.from_list(records)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)


def first(prepared: Prepared, split: str = "test") -> dict[str, Any]:
    item = next(prepared.items(split))
    return {key: value for key, value in item.items() if key != "id"}


def test_squads_answers_are_several_references() -> None:
    records = [
        {
            "id": f"a{n}",
            "title": "T",
            "context": f"Some {n}.",
            "question": "What?",
            "answers": {"text": ["Some", "it"], "answer_start": [0, 1]},
        }
        for n in range(8)
    ]
    written("plain_text/train-00000-of-00001.parquet", records[:5])
    written("plain_text/validation-00000-of-00001.parquet", records[5:])
    found = prepare(task("squad"))
    assert found.counts == {"train": 3, "validation": 2, "test": 3}
    assert first(found) == {
        "input": "Some 5.\nQuestion: What?\nAnswer:",
        "output": " Some",
        "references": ["Some", "it"],
    }
    assert [item["id"] for item in found.items("test")] == ["a5", "a6", "a7"]
    assert found.record["origin"]["train"]["records"] == 5


def test_dialogsum_is_csv_with_line_ends_in_its_fields() -> None:
    for split in ("train", "validation", "test"):
        written(
            f"{split}.csv",
            [{"id": split, "dialogue": f"#Person1#: {split}\n#Person2#: Oh.", "summary": "One.", "topic": "x"}],
        )
    found = first(prepare(task("dialogsum")))
    assert found == {"input": "#Person1#: test\n#Person2#: Oh.\nSummary:", "output": " One.", "references": ["One."]}


def test_hellaswags_label_is_a_text_and_its_context_comes_with_the_activity() -> None:
    for split, start in (("train", 0), ("validation", 4)):
        rows = [
            {
                "ind": n,
                "activity_label": "Fishing",
                "ctx": f"He {n}",
                "endings": ["sits.", "flies.", "sings.", "sinks."],
                "label": "2",
            }
            for n in range(start, start + 4)
        ]
        written(f"default/{split}/0000.parquet", rows)
    item = first(prepare(task("hellaswag")))
    assert (item["input"], item["label"], item["output"]) == ("Fishing: He 4", 2, " sings.")
    assert item["endings"] == [" sits.", " flies.", " sings.", " sinks."]


def test_hellaswags_unlabelled_test_set_is_refused_by_its_label() -> None:
    for split in ("train", "validation", "test"):
        label = "" if split == "test" else "0"
        rows = [
            {"activity_label": "A", "ctx": f"{split} {n}", "endings": ["b", "c"], "label": label} for n in range(3)
        ]
        written(f"default/{split}/0000.parquet", rows)
    with pytest.raises(
        ConfigError, match=r"hub: test, record 0, and in the same way 2 more: task.label: \"label\" is ''"
    ):
        prepare(task("hellaswag", "task.source.splits.test=test"))


def test_iwslt_nests_its_languages() -> None:
    for split in ("train", "validation", "test"):
        written(
            f"iwslt2017-en-de/{split}/0000.parquet", [{"translation": {"en": f"A {split}.", "de": f"Ein {split}."}}]
        )
    found = first(prepare(task("iwslt2017_en_de")))
    assert found == {"input": "English: A test.\nGerman:", "output": " Ein test.", "references": ["Ein test."]}


def test_gsm8ks_configuration_is_chosen_by_its_card_and_its_answer_follows_the_marker() -> None:
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            rows = [{"question": f"{config} {split} {n}?", "answer": f"1+{n}\n#### 1,00{n}"} for n in range(4)]
            written(f"{config}/{split}-00000-of-00001.parquet", rows)
    files = [{"split": split, "path": f"%s/{split}-*"} for split in ("train", "test")]
    configs = [
        {"config_name": name, "data_files": json.loads(json.dumps(files).replace("%s", name))}
        for name in ("main", "socratic")
    ]
    Path("hub/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    found = prepare(task("gsm8k"))
    assert found.counts == {"train": 2, "validation": 2, "test": 4}
    assert first(found) == {
        "input": "Question: main test 0?\nAnswer:",
        "output": " 1+0\n#### 1,000",
        "references": ["1,000"],
    }


def test_a_split_that_the_set_lacks_is_named_with_those_that_it_has() -> None:
    written("plain_text/train-00000-of-00001.parquet", [{"id": "1", "context": "c"}])
    with pytest.raises(
        ConfigError, match=r"hub: has no split validation; its splits are train: set task.source.splits"
    ):
        prepare(task("squad"))


def test_what_cannot_be_loaded_is_one_line(folder: Path) -> None:
    (folder / "hub").mkdir()
    with pytest.raises(ConfigError, match=r"^task.source.hub=hub: is an empty folder$"):
        prepare(task("squad"))
    (folder / "hub" / "train.parquet").write_text("not parquet")
    with pytest.raises(ConfigError, match=r"^task.source.hub=hub: cannot be loaded \(\w+: .*name a local copy"):
        prepare(task("squad"))


def test_code_in_a_folder_does_not_run(folder: Path) -> None:
    written("train.parquet", [{"id": "1"}])
    (folder / "hub" / "hub.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        prepare(task("squad"))
    assert not (folder / "ran").exists()
