# SPDX-License-Identifier: Apache-2.0
"""Composes the Hydra configuration of a command line and runs the command in this process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_tied_lora.errors import ConfigError, Problems, report
from nemo_tied_lora.launching.task_ranks import find_tasks
from nemo_tied_lora.planning.compose import compose_config, plain
from nemo_tied_lora.planning.config_folder import config_folder
from nemo_tied_lora.planning.rank_variables import is_first, is_rank

__all__ = ["check_output", "parser", "run_composed"]

_READERS = ("plan", "show", "report", "status")
"""Commands that may run several times at once."""


def parser(command: str, summary: str, examples: str, groups: Iterable[str]) -> argparse.ArgumentParser:
    """The options of every Hydra command; --help shows examples and the shipped choices of each config group."""
    folder = config_folder()
    choices = [
        f"  {group}=  {', '.join(sorted(path.stem for path in (folder / group).glob('*.yaml')))}" for group in groups
    ]
    listed = ["groups:", *choices, ""] if choices else []
    result = argparse.ArgumentParser(
        prog=f"tied-lora {command}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="\n".join([f"examples:\n{examples}", *listed, "--cfg job shows every key and its value."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    result.add_argument("--config-dir", "-cd", metavar="DIR", help="also search this folder for YAMLs")
    result.add_argument("--cfg", "-c", choices=["job"], help="print the composed config and stop")
    result.add_argument("--resolve", action="store_true", help="with --cfg: resolve interpolations")
    return result


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
        cfg = compose_config(command, options.overrides, options.config_dir)
        if options.cfg:
            print(OmegaConf.to_yaml(cfg, resolve=options.resolve), end="")
            return 0
        if command not in _READERS:
            _check_alone()
        return work(plain(cfg))
    except ConfigError as error:
        return report(command, error) if is_first() else 2


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


def check_output(problems: Problems, output: object, inputs: Iterable[object]) -> None:
    """Appends a problem if `output` is not the path of a `.nemo` file, is a folder, or is one of the inputs."""
    path = Path(str(output))
    if output is None or path.suffix != ".nemo":
        problems.append(f"output={output}: must be the path of a .nemo file")
    elif path.is_dir():
        problems.append(f"output={output}: is a folder")
    elif path.resolve() in [Path(str(other)).resolve() for other in inputs if other is not None]:
        problems.append(f"output={output}: is an input; name another")
