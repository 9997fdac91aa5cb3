# SPDX-License-Identifier: Apache-2.0
"""The data of `task=NAME` in a training command: checks the section `task`, and makes its files.

`tasks/` imports numpy, which the list of commands does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_task", "make_task_files"]


def check_task(values: Mapping[str, Any]) -> None:
    """Checks the section `task`, if there is one. Opens no file.

    Raises:
        ConfigError: with all problems.
    """
    if values.get("task") is not None:
        from nemo_tied_lora.tasks.task import Task

        Task.from_config(values["task"])


def make_task_files(values: Mapping[str, Any]) -> None:
    """Prepares the files of the section `task`, if there is one.

    Raises:
        ConfigError: with all problems.
    """
    if values.get("task") is not None:
        from nemo_tied_lora.tasks.prepare import prepare
        from nemo_tied_lora.tasks.task import Task

        prepare(Task.from_config(values["task"]))
