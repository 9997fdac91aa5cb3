# SPDX-License-Identifier: Apache-2.0
"""Runs a command on several ranks: checks its configuration, then starts the ranks or runs as one of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_tied_lora.commands.local_command import parser
from nemo_tied_lora.errors import ConfigError, Problems, report
from nemo_tied_lora.launching.local_ranks import start_ranks
from nemo_tied_lora.launching.task_ranks import adopt
from nemo_tied_lora.planning.compose import compose_config, parse_overrides, plain
from nemo_tied_lora.planning.config_folder import config_folder
from nemo_tied_lora.planning.data_files import checked_already, mark_checked
from nemo_tied_lora.planning.layout_fits_cluster import launcher_problems
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.planning.rank_variables import is_first, is_rank
from nemo_tied_lora.resilience.rank import STOPPED, Rank, run_as_rank
from nemo_tied_lora.resilience.restarts import finished_already
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
) -> int:
    """Composes and checks the configuration before torch is imported, then runs the command on every rank.

    Args:
        command: the name of the command and of its YAML.
        groups: the config groups that --help lists.
        check: raises ConfigError if the configuration cannot run. Returns lines that rank 0 prints at the start.
        run: one rank's work. NeMo's `hydra_runner` passes the configuration.
        check_files: raises ConfigError if a line of data is wrong. One process calls it: the one that starts the ranks,
            or else rank 0.

    Returns:
        0 for success, 2 if the configuration is refused, 3 if a guard stopped the run, `preemption.exit_code` if a
        signal stopped it, else the exit code of the first rank that failed.
    """
    options = parser(command, summary, examples, groups).parse_intermixed_args(argv)
    problems = Problems()
    cfg = problems.attempt(compose_config, command, options.overrides, options.config_dir)
    if cfg is not None and options.cfg:
        print(OmegaConf.to_yaml(cfg, resolve=options.resolve), end="")
        return 0
    values = (None if cfg is None else problems.attempt(plain, cfg)) or {}
    try:
        adopt()
    except ConfigError as error:
        return report(command, error) if is_first() else 2
    lines = (problems.attempt(check, values) if values else None) or ()
    if values:
        problems += _launcher_problems(values)
    if is_rank():
        work = partial(_run_rank, command, options.overrides, options.config_dir, run)
        read = None if check_files is None or checked_already(values) else partial(check_files, values)
        return run_as_rank(command, values, problems, work, read, lines)
    if values and check_files is not None:
        problems.attempt(check_files, values)
    if problems:
        return report(command, ConfigError(problems))
    finished = finished_already(values)
    if finished is not None:
        print(f"tied-lora {command}: {finished}")
        return 0
    layout = Layout.from_config(values)
    if layout.num_nodes > 1:
        problem = "trainer.num_nodes: several nodes need a launcher; start one process per rank with torchrun"
        return report(command, ConfigError([problem]))
    mark_checked(values)
    code = start_ranks("nemo_tied_lora.commands.main", [command, *argv], layout.devices)
    # A rank that a stop signal ended before it could answer: nothing was to be saved, and the same command starts it again.
    return values["preemption"]["exit_code"] if code in _STOPPED_EARLY and "preemption" in values else code


def _launcher_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields in what the configured ranks differ from those that a launcher has started: the run would hang."""
    try:
        layout = Layout.from_config(values)
    except ConfigError:
        return  # reported by the command's check
    yield from launcher_problems(layout)


def _run_rank(
    command: str,
    overrides: list[str],
    config_dir: str | None,
    run: Callable[[DictConfig, Rank], Any],
    rank: Rank,
) -> Any:
    """Runs `run` under NeMo's `hydra_runner`; returns what it returns and raises what it raises."""
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    from nemo.core.config import hydra_runner

    results: list[Any] = []
    failures: list[Exception] = []

    def guarded(cfg: DictConfig) -> None:
        try:
            results.append(run(cfg, rank))
        except Exception as error:  # Hydra would print it and exit
            failures.append(error)

    more = [] if config_dir is None else ["--config-dir", config_dir]
    sys.argv = [f"tied-lora {command}", *parse_overrides(command, overrides)[0], *more]
    hydra_runner(config_path=str(config_folder()), config_name=command)(guarded)()
    if failures:
        raise failures[0]
    return results[0]
