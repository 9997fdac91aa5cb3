# SPDX-License-Identifier: Apache-2.0
"""Runs a command on several ranks: checks its configuration, then starts the ranks or runs as one of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig

from nemo_tied_lora.commands.hydra_flags import parser, print_config, print_notes, yaml_sources
from nemo_tied_lora.errors import ConfigError, Problems, report
from nemo_tied_lora.launching.local_ranks import start_ranks
from nemo_tied_lora.launching.task_ranks import adopt, others_say_it
from nemo_tied_lora.planning.composing.compose import compose_with_notes, plain
from nemo_tied_lora.planning.data.data_files import checked_already, mark_checked
from nemo_tied_lora.planning.layout_fits_cluster import launcher_problems
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.planning.rank_variables import is_rank
from nemo_tied_lora.resilience.folder_claim import check_unclaimed
from nemo_tied_lora.resilience.rank import STOPPED, Rank, run_as_rank
from nemo_tied_lora.resilience.restarts import finished_already, own_folder
from nemo_tied_lora.resilience.stop_signals import STOP_SIGNALS

__all__ = ["STOPPED", "run_command"]

_STOPPED_EARLY = tuple(128 + number for number in STOP_SIGNALS)


def run_command(
    command: str,
    argv: list[str],
    *,
    summary: str,
    examples: str,
    groups: tuple[str, ...],
    check: Callable[[Mapping[str, Any]], Sequence[str] | None],
    run: Callable[[DictConfig, Rank], Any],
    check_files: Callable[[Mapping[str, Any]], None] | None = None,
    make_files: Callable[[Mapping[str, Any]], None] | None = None,
) -> int:
    """Composes and checks the configuration before torch is imported, then runs the command on every rank.

    Args:
        command: the name of the command and of its YAML.
        groups: the config groups that --help lists.
        check: raises ConfigError if the configuration cannot run. Returns lines that rank 0 prints at the start.
        run: one rank's work on the composed configuration.
        check_files: raises ConfigError if a line of data is wrong. One process calls it: the one that starts the ranks,
            or else rank 0.
        make_files: makes the files that `check_files` then reads, if they are not there. The same process calls it, once
            nothing else is wrong.

    Returns:
        0 for success, 2 if the configuration is refused, 3 if a guard stopped the run, `preemption.exit_code` if a
        signal stopped it, else the exit code of the first rank that failed.
    """
    options = parser(command, summary, examples, groups).parse_intermixed_args(argv)
    problems = Problems()
    cfg, notes = problems.attempt(_compose, command, options) or (None, [])
    print_notes(command, notes)
    if cfg is not None and options.cfg:
        return 0 if problems.attempt(_print, cfg, options) else report(command, ConfigError(problems))
    values = (None if cfg is None else problems.attempt(plain, cfg)) or {}
    try:
        adopt()
    except ConfigError as error:
        return 2 if others_say_it(error) else report(command, error)
    lines = (problems.attempt(check, values) if values else None) or ()
    if values:
        problems += _launcher_problems(values)
    if is_rank():
        work = partial(_run_rank, cfg, run)
        steps = [step for step in (make_files, check_files) if step is not None]
        read = None if not steps or checked_already(values) else partial(_all, steps, values)
        return run_as_rank(command, values, problems, work, read, lines)
    if values and make_files is not None and not problems:
        problems.attempt(make_files, values)
    if values and check_files is not None:
        problems.attempt(check_files, values)
    if problems:
        return report(command, ConfigError(problems))
    finished = finished_already(values)
    if finished is not None:
        print(f"tied-lora {command}: {finished}")
        return 0
    folder = own_folder(values)
    if folder is not None:
        problems.attempt(check_unclaimed, folder)
    if problems:
        return report(command, ConfigError(problems))
    layout = Layout.from_config(values)
    if layout.num_nodes > 1:
        problem = "trainer.num_nodes: several nodes need a launcher; start one process per rank with srun or torchrun"
        return report(command, ConfigError([problem]))
    mark_checked(values)
    code = start_ranks("nemo_tied_lora.commands.main", [command, *argv], layout.devices)
    # A rank that a stop signal ended before it could answer: nothing was to be saved, and the same command starts it again.
    return values["preemption"]["exit_code"] if code in _STOPPED_EARLY and "preemption" in values else code


def _all(steps: Sequence[Callable[[Mapping[str, Any]], None]], values: Mapping[str, Any]) -> None:
    for step in steps:
        step(values)


def _launcher_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields in what the configured ranks differ from those that a launcher has started: the run would hang."""
    try:
        layout = Layout.from_config(values)
    except ConfigError:
        return  # reported by the command's check
    yield from launcher_problems(layout)


def _compose(command: str, options: argparse.Namespace) -> tuple[DictConfig, list[str]]:
    return compose_with_notes(command, options.overrides, yaml_sources(command, options))


def _print(cfg: DictConfig, options: argparse.Namespace) -> bool:
    print_config(cfg, options)
    return True


def _run_rank(cfg: DictConfig | None, run: Callable[[DictConfig, Rank], Any], rank: Rank) -> Any:
    """Prepares this machine's platform and runs `run` on the configuration that was checked."""
    assert cfg is not None  # a rank with problems does not get here
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    return run(cfg, rank)
