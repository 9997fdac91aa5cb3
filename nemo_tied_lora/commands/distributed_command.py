# SPDX-License-Identifier: Apache-2.0
"""Runs a command on several ranks: checks its configuration, then starts the ranks or runs as one of them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_tied_lora.commands.local_command import parser
from nemo_tied_lora.errors import ConfigError, Problems, report
from nemo_tied_lora.launching.torchrun import is_rank, start_ranks
from nemo_tied_lora.planning.compose import compose_config, parse_overrides, plain
from nemo_tied_lora.planning.config_folder import config_folder
from nemo_tied_lora.planning.data_files import checked_already, mark_checked
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.resilience.rank import STOPPED, Rank, run_as_rank
from nemo_tied_lora.resilience.restarts import finished_already, preempted_code

__all__ = ["STOPPED", "run_command"]


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
        signal stopped it, else the exit code of the rank that failed.
    """
    options = parser(command, summary, examples, groups).parse_intermixed_args(argv)
    problems = Problems()
    cfg = problems.attempt(compose_config, command, options.overrides, options.config_dir)
    if cfg is not None and options.cfg:
        print(OmegaConf.to_yaml(cfg, resolve=options.resolve), end="")
        return 0
    values = (None if cfg is None else problems.attempt(plain, cfg)) or {}
    lines = (problems.attempt(_check, check, values) if values else None) or ()
    if is_rank():
        work = partial(
            _run_rank, command, options.overrides, options.config_dir, run, verbose=values.get("verbose", True)
        )
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
    return code and preempted_code(values, code)


def _check(
    check: Callable[[Mapping[str, Any]], Sequence[str] | None], values: Mapping[str, Any]
) -> Sequence[str] | None:
    """Runs the command's check. On a rank, also refuses another number of ranks than configured: the run would hang."""
    lines = check(values)
    layout = Layout.from_config(values)
    if is_rank() and int(os.environ["WORLD_SIZE"]) != layout.world_size:
        started = os.environ["WORLD_SIZE"]
        problem = (
            f"trainer.num_nodes x trainer.devices = {layout.world_size}, but the launcher started {started} ranks"
        )
        raise ConfigError([f"{problem}; make them agree"])
    return lines


def _run_rank(
    command: str,
    overrides: list[str],
    config_dir: str | None,
    run: Callable[[DictConfig, Rank], Any],
    rank: Rank,
    *,
    verbose: bool,
) -> Any:
    """Runs `run` under NeMo's `hydra_runner`; returns what it returns and raises what it raises."""
    if not verbose:
        _quiet()
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    from nemo.core.config import hydra_runner
    from nemo.utils import logging as nemo_logging

    if not verbose:
        nemo_logging.remove_stream_handlers()  # the log files in the run's folder still get every message

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


def _quiet() -> None:
    """Hides warnings and messages of noisy packages. Errors and the progress bar stay. Call it before their import."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "datasets", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
