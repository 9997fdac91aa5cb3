# SPDX-License-Identifier: Apache-2.0
"""Composes the Hydra configuration of a command line and runs the command in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.hydra_flags import parser, print_config, print_notes, yaml_sources
from nemo_tied_lora.errors import ConfigError, Problems, report
from nemo_tied_lora.launching.task_ranks import find_tasks
from nemo_tied_lora.planning.composing.compose import compose_with_notes, plain
from nemo_tied_lora.planning.rank_variables import is_rank

__all__ = ["check_output", "check_paths", "run_composed"]

_READERS = ("plan", "show", "report", "status")
"""Commands that may run several times at once."""


def run_composed(
    command: str,
    argv: Sequence[str],
    work: Callable[[dict[str, Any]], int],
    *,
    summary: str,
    examples: str,
    groups: Sequence[str] = (),
) -> int:
    """Composes `configs/COMMAND.yaml` and passes its plain values to `work`.

    Returns:
        0 if --cfg only prints the configuration; 2, with every problem on stderr, if composing or `work` raises
        ConfigError; else what `work` returns.
    """
    options = parser(command, summary, examples, groups).parse_intermixed_args(argv)
    try:
        cfg, notes = compose_with_notes(command, options.overrides, yaml_sources(command, options))
        print_notes(command, notes)
        if options.cfg:
            print_config(cfg, options)
            return 0
        if command not in _READERS:
            _check_alone()
        return work(plain(cfg))
    except ConfigError as error:
        return report(command, error)


def _check_alone() -> None:
    """Raises ConfigError if a launcher has started several processes: each would do the whole work and write the same files."""
    tasks = find_tasks()
    count, launcher = (tasks.count, tasks.launcher) if tasks is not None else (os.environ.get("WORLD_SIZE", "1"), "")
    if tasks is not None or (is_rank() and count != "1"):
        raise ConfigError(
            [
                f"{launcher or 'a launcher'} started {count} processes, and each would do all of this; start one (srun --ntasks=1)"
            ]
        )


def check_paths(cfg: Mapping[str, Any], *keys: str) -> None:
    """Checks that these keys hold paths: Hydra reads a folder named 7 or nan as a number.

    Raises:
        ConfigError: all that do not.
    """
    wrong = [key for key in keys if cfg[key] is not None and not isinstance(cfg[key], str)]
    Problems(
        f"{key}={cfg[key]}: is read as {type(cfg[key]).__name__}, not as a path; write {key}=./{cfg[key]}"
        for key in wrong
    ).raise_if_any()


def check_output(problems: Problems, output: object, inputs: Iterable[object]) -> None:
    """Appends a problem if `output` is not the path of a `.nemo` file, is a folder, or is one of the inputs."""
    path = Path(str(output))
    if output is None or path.suffix != ".nemo":
        problems.append(f"output={output}: must be the path of a .nemo file")
    elif path.is_dir():
        problems.append(f"output={output}: is a folder")
    elif path.resolve() in [Path(str(other)).resolve() for other in inputs if other is not None]:
        problems.append(f"output={output}: is an input; name another")
