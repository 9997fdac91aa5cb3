# SPDX-License-Identifier: Apache-2.0
"""Chooses the reader of a task's source."""

from __future__ import annotations

from nemo_tied_lora.tasks.built import Built, in_folder
from nemo_tied_lora.tasks.hub import Hub
from nemo_tied_lora.tasks.sources import JsonlFiles, Packaged, Reader
from nemo_tied_lora.tasks.task import Task

__all__ = ["open_source"]


def open_source(task: Task) -> Reader:
    """The reader of the task's source.

    Raises:
        ConfigError: there is no such packaged file, builder or file in the folder.
    """
    source = task.source
    if source.files is not None:
        return JsonlFiles(source)
    if source.packaged is not None:
        return Packaged(source)
    if source.hub is not None:
        return Hub(source)
    return Built(task) if source.folder is None else in_folder(task)
