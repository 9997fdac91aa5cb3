# SPDX-License-Identifier: Apache-2.0
"""A task's YAML is checked as a whole: keys, templates, metrics that fit, sources. Pure Python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.composing.yaml_sources import YamlSources
from nemo_tied_lora.planning.config_folder import config_folder
from nemo_tied_lora.tasks.task import Task

SHIPPED = sorted(path.stem for path in (config_folder() / "task").glob("*.yaml") if path.stem != "base")


def section(**changes: Any) -> dict[str, Any]:
    """The section of a right task, with changes; None removes a key."""
    task = {
        "name": "mine",
        "folder": "tasks/mine",
        "source": {"files": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}},
        "prompt": "{question}",
        "answer": "{answer}",
        "metrics": ["exact_match"],
    }
    return {key: value for key, value in (task | changes).items() if value is not None}


def problems(**changes: Any) -> list[str]:
    try:
        Task.from_config(section(**changes))
    except ConfigError as error:
        return list(error.problems)
    return []


def test_a_right_task_has_no_problem_and_keeps_its_values() -> None:
    task = Task.from_config(section(generation={"max_new_tokens": 7, "stop": ["\n"]}, limits={"test": 3}))
    assert (task.name, task.max_new_tokens, task.stop, task.metrics) == ("mine", 7, ("\n",), ("exact_match",))
    assert dict(task.limits) == {"train": None, "validation": None, "test": 3}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_task_is_right_and_says_what_its_data_are(name: str) -> None:
    cfg = plain(compose_config("finetune", [f"task={name}"]))
    task = Task.from_config(cfg["task"])
    assert task.name == name
    assert task.family
    assert task.licence
    assert task.weakness
    assert cfg["model"]["data"]["train_ds"]["file_names"] == [f"runs/tasks/{name}/train.jsonl"]
    assert cfg["model"]["data"]["train_ds"]["max_seq_length"] == task.max_seq_length
    assert cfg["model"]["data"]["validation_ds"]["prompt_template"] == "{input}" + task.separator + "{output}"


@pytest.mark.parametrize("defaults", ["", "defaults: [_self_]", "defaults: [_self_, base]"])
def test_a_yaml_that_does_not_build_on_base_is_told_so(defaults: str, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    text = f"# @package _global_\n{defaults}\ntask: {{name: mine, prompt: '{{question}}', answer: '{{answer}}'}}\n"
    (tmp_path / "task" / "mine.yaml").write_text(text)
    cfg = plain(compose_config("finetune", ["task=mine"], YamlSources(config_dir=tmp_path)))
    with pytest.raises(ConfigError, match=r"^task: what all .*: the task's YAML needs defaults: \[base, _self_\]"):
        Task.from_config(cfg["task"])


def test_the_shared_yaml_lists_every_key() -> None:
    cfg = plain(compose_config("finetune", ["task=base", "task.name=x"]))["task"]
    known = problems(nothing=1)[0].split("choose from ")[1].split(", ")
    assert sorted(cfg) == sorted(known)
    known = problems(source={"nothing": 1})[0].split("choose from ")[1].split(", ")
    assert sorted(cfg["source"]) == sorted(known)


def test_all_problems_come_together() -> None:
    found = problems(name=None, prompt=None, answer=None, metrics=None, source=None)
    assert [line.partition(":")[0] for line in found] == [
        *("task", "task.name", "task.prompt", "task.answer", "task.metrics", "task.source")
    ]


CHOICE = {"answer": None, "endings": "endings", "label": "label", "metrics": ["accuracy"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "x"}, "task.promt: not a key of task; choose from "),
        ({"prompt": "{question"}, "task.prompt='{question': a brace without a field"),
        ({"answer": "yes"}, "task.answer='yes': names no field of the records"),
        ({"prompt": 3}, "task.prompt=3: must be a text with fields"),
        ({"name": "a/b"}, "task.name='a/b': letters, digits"),
        ({"name": ".."}, r"task.name='..': letters, digits"),
        ({"separator": "\n"}, r"task.separator='\\n': must be a blank, ' ', or nothing, ''"),
        (
            {"marker": "####"},
            "task.metrics: exact_match compares the whole answer, but of references only what follows",
        ),
        ({"metrics": ["acuracy"]}, "task.metrics: acuracy: unknown; choose from exact_match, "),
        ({"metrics": "f1"}, "task.metrics='f1': must be a list"),
        ({"metrics": ["f1", "f1"]}, "task.metrics: f1 is there 2 times"),
        ({"metrics": ["accuracy"]}, "task.metrics: accuracy compares endings, and the task has none"),
        (CHOICE | {"metrics": ["rouge_l"]}, "task.metrics: rouge_l compares generated texts, and a choice task"),
        (CHOICE | {"label": None}, "task.label: missing; task.endings is set"),
        (CHOICE | {"endings": ["1"]}, r"task.endings=\['1'\]: must be at least 2 different texts"),
        (CHOICE | {"endings": ["1", "1 "]}, r"task.endings=.*: must be at least 2 different texts"),
        (CHOICE | {"endings": [1, 2]}, r"task.endings=\[1, 2\]: must be at least 2 .*; quote numbers"),
        (CHOICE | {"endings": 3}, "task.endings=3: must be the name of a field"),
        (CHOICE | {"answer": "{answer}"}, "task.answer='{answer}': leave it out"),
        ({"group": "{kind}"}, "task.group='{kind}': must be a field's name, without braces"),
        ({"limits": {"test": 0}}, "task.limits.test=0: must be a whole number of at least 1"),
        ({"limits": {"tests": 1}}, "task.limits.tests: not a key"),
        ({"generation": {"max_new_tokens": 0}}, "task.generation.max_new_tokens=0: must be"),
        ({"generation": {"stop": [""]}}, "task.generation.stop=.*: must be a list of texts"),
        ({"max_seq_length": 1}, "task.max_seq_length=1: must be a whole number of at least 2"),
        ({"source": {}}, "task.source: names no source; set one of files: "),
        ({"source": {"hub": "a", "packaged": "b"}}, "task.source: packaged and hub are set; set one"),
        ({"source": {"files": {"train": "a"}}}, "task.source.files.test: missing; name a JSONL file"),
        (
            {"source": {"files": {"train": "a", "test": "b"}}},
            "task.limits.validation: missing; validation items are held out",
        ),
        ({"source": {"hub": "a", "splits": {"train": None}}}, "task.source.splits.train=null: must name"),
        ({"source": {"hub": "a", "splits": {"test": "train"}}}, "task.source.splits: train is there twice"),
        (
            {"source": {"files": {"train": "a", "test": "b"}, "splits": {"test": {"new": "test"}}}},
            "task.source.splits=.*: leave it out: with files, each file is a split",
        ),
        ({"source": {"hub": "a", "folder": "b"}}, "task.source.folder=b: only a builder's task reads it"),
        ({"source": "squad"}, "task.source='squad': must be a section of keys"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(changes: dict[str, Any], message: str) -> None:
    found = problems(**changes)
    assert [line for line in found if re.match(message.replace("{", r"\{"), line)], found
