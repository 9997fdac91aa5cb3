# SPDX-License-Identifier: Apache-2.0
"""The builder of the user interface's texts, on a small wheel, and what the packaged file holds. Pure Python."""

from __future__ import annotations

import gzip
import json
import subprocess
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.tasks.builders import home_assistant
from nemo_tied_lora.tasks.sources import packaged_folder

OPTIONS = {"language": "de", "release": "1.0"}


def wheel(folder: Path, **integrations: tuple[dict[str, Any], dict[str, Any] | None]) -> Path:
    """A wheel of integrations: English texts, and German ones or none."""
    path = folder / "homeassistant-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, texts in integrations.items():
            for language, values in zip(("en", "de"), texts, strict=True):
                if values is not None:
                    place = f"homeassistant/components/{name}/translations/{language}.json"
                    archive.writestr(place, json.dumps(values))
    return path


def pairs(path: Path) -> list[tuple[str, str]]:
    with zipfile.ZipFile(path) as archive:
        return [(record["en"], record["de"]) for record in home_assistant.pairs(archive, "de")]


def test_texts_are_paired_by_their_keys_at_any_depth(tmp_path: Path) -> None:
    english = {
        "a": {"b": "The device is already configured "},
        "title": "The pump is running now",
        "c": "Only in English here",
    }
    german = {"title": "Die Pumpe läuft gerade", "a": {"b": "Das Gerät ist bereits konfiguriert"}}
    assert pairs(wheel(tmp_path, pump=(english, german), fan=({"x": "No German file is here"}, None))) == [
        ("The device is already configured", "Das Gerät ist bereits konfiguriert"),
        ("The pump is running now", "Die Pumpe läuft gerade"),
    ]


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("Too few words", "Zu wenige Wörter hier"),
        ("The state of {entity} has changed", "Der Zustand von {entity} hat sich geändert"),
        ("The translation is the same", "The translation is the same"),
        ("A text that is cut off at the end", "Kurz"),
        ("Get the [key] from the page", "Den [key] von der Seite holen"),
    ],
)
def test_short_texts_placeholders_and_copies_are_left_out(tmp_path: Path, english: str, german: str) -> None:
    assert pairs(wheel(tmp_path, one=({"a": english}, {"a": german}))) == []


def test_a_text_of_several_integrations_is_there_once(tmp_path: Path) -> None:
    one, other = {"a": "The device is offline."}, {"a": "The device is OFFLINE"}
    german = {"a": "Das Gerät ist offline"}
    assert len(pairs(wheel(tmp_path, one=(one, german), two=(other, german)))) == 1


def test_no_integration_is_in_two_splits_of_the_packaged_file() -> None:
    splits = defaultdict(set)
    data = (packaged_folder() / "translate_home_assistant_en_de.jsonl.gz").read_bytes()
    for record in map(json.loads, gzip.decompress(data).splitlines()):
        splits[record["integration"]].add(record["split"])
        assert record["split"] == home_assistant._split(record["integration"])
    assert {len(found) for found in splits.values()} == {1}


def test_pip_downloads_the_release_and_its_refusal_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if command[-1].endswith("==1.0"):
            wheel(
                Path(command[command.index("--dest") + 1]),
                one=({"a": "The fan is on now"}, {"a": "Der Lüfter ist an"}),
            )
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\n")

    monkeypatch.setattr(home_assistant.subprocess, "run", pip)
    records, origin = home_assistant.build(OPTIONS, tmp_path)
    assert [record["de"] for record in records] == ["Der Lüfter ist an"]
    assert origin["homeassistant"] == "1.0"
    assert "--no-deps" in commands[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^pip cannot download homeassistant==2.0: No matching distribution found$"):
        home_assistant.build(OPTIONS | {"release": "2.0"}, tmp_path / "empty")


def test_options_are_checked() -> None:
    found = list(home_assistant.option_problems("k", {"language": None, "release": 2024.12}))
    assert [line.partition("=")[0] for line in found] == ["k.language", "k.release"]
