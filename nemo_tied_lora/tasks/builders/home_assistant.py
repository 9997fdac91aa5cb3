# SPDX-License-Identifier: Apache-2.0
"""Texts of Home Assistant's user interface with their translations, Apache-2.0. The German ones are in this package."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.progress import Progress

__all__ = ["OPTIONS", "build", "option_problems", "pairs"]

OPTIONS = ("language", "release")
"""`language`: as in "de". `release`: of the package homeassistant."""

_FILE = re.compile(r"homeassistant/components/(\w+)/translations/en\.json")
_MARKUP = re.compile(r"[{}\[\]<>*`_|#\n]|http")
_WORDS, _CHARACTERS, _RATIO = (4, 24), 140, (0.5, 2.2)
_TEST, _VALIDATION = 12, 4
"""Per cent of the integrations: the texts of one integration stay together."""


def option_problems(key: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the values of the options."""
    for name in OPTIONS:
        if not isinstance(options[name], str) or not re.fullmatch(r"[\w.-]+", options[name]):
            yield f"{key}.{name}={options[name]!r}: must be a text, as 'de' or '2024.12.5'"


def build(options: Mapping[str, Any], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(records, what they were made of). pip downloads the package, 39 MB, and installs nothing.

    Args:
        options: see `OPTIONS`.
        folder: a new folder, for the download.

    Raises:
        ConfigError: pip cannot download the package.
    """
    package = f"homeassistant=={options['release']}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # The release asks for a newer Python than this one may be. Nothing of it is run.
    command += ["--only-binary", ":all:", "--python-version", "3.13", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "no file came")
        raise ConfigError([f"pip cannot download {package}: {reason.removeprefix('ERROR: ')}"])
    with zipfile.ZipFile(wheels[0]) as wheel:
        records = list(pairs(wheel, str(options["language"])))
    checksum = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    return records, {"homeassistant": options["release"], "sha256": checksum}


def pairs(wheel: zipfile.ZipFile, language: str) -> Iterator[dict[str, Any]]:
    """Yields each English text of 4 to 24 words without markup, once, with its translation."""
    names = set(wheel.namelist())
    seen = set()
    for name in Progress(sorted(names), desc="texts", unit="file"):
        found = _FILE.fullmatch(name)
        other_name = name.replace("/en.json", f"/{language}.json")
        if found is None or other_name not in names:
            continue
        others = dict(_texts(json.loads(wheel.read(other_name))))
        for path, text in _texts(json.loads(wheel.read(name))):
            english, other = text.strip(), others.get(path, "").strip()
            key = re.sub(r"\W+", " ", english.lower()).strip()
            if other and english != other and key not in seen and _is_plain(english, other):
                seen.add(key)
                yield {"split": _split(found[1]), "integration": found[1], "en": english, language: other}


def _texts(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _texts(value, (*path, key))
        elif isinstance(value, str):
            yield (*path, key), value


def _is_plain(english: str, other: str) -> bool:
    return (
        _WORDS[0] <= len(english.split()) <= _WORDS[1]
        and len(english) <= _CHARACTERS
        and not _MARKUP.search(english + other)
        and _RATIO[0] <= len(other) / len(english) <= _RATIO[1]
    )


def _split(integration: str) -> str:
    share = int(hashlib.sha256(integration.encode()).hexdigest(), 16) % 100
    return "test" if share < _TEST else "validation" if share < _TEST + _VALIDATION else "train"
