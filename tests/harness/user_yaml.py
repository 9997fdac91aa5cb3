# SPDX-License-Identifier: Apache-2.0
"""Writes a user's YAML and composes it as --config-path and --config-name do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_with_notes, plain
from nemo_tied_lora.planning.composing.yaml_sources import YamlSources

__all__ = ["composed", "refused", "write"]


def write(folder: Path, values: Any, name: str = "mine.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return folder / name


def composed(file: Path, *lines: str, command: str = "finetune") -> tuple[dict[str, Any], list[str]]:
    cfg, notes = compose_with_notes(command, lines, YamlSources(own=file))
    return plain(cfg), notes


def refused(file: Path, *lines: str, command: str = "finetune") -> list[str]:
    with pytest.raises(ConfigError) as error:
        composed(file, *lines, command=command)
    assert all("\n" not in problem for problem in error.value.problems)
    return list(error.value.problems)
