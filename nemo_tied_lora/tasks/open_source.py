# SPDX-License-Identifier: Apache-2.0
"""Chooses the reader of a task's source."""

from __future__ import annotations

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.tasks.sources import JsonlFiles, Packaged, Reader
from nemo_tied_lora.tasks.task import Task

__all__ = ["open_source"]


def open_source(task: Task) -> Reader:
    """The reader of the task's source.

    Raises:
        ConfigError: there is no such packaged file, builder, ...
    """
    source = task.source
    if source.files is not None:
        return JsonlFiles(source)
    if source.packaged is not None:
        return Packaged(source)
    raise ConfigError([f"task.source: {task.name}: this kind of source is not there yet"])
