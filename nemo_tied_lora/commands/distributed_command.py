# SPDX-License-Identifier: Apache-2.0
"""What commands that run on ranks share: check, start the ranks, and be one of them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_tied_lora.commands.local_command import parser
from nemo_tied_lora.commands.registry import command_module
from nemo_tied_lora.errors import ConfigError, Problems, report
from nemo_tied_lora.launching.torchrun import is_rank, start_ranks
from nemo_tied_lora.planning.compose import compose_config, parse_overrides, plain
from nemo_tied_lora.planning.config_folder import config_folder
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.resilience.rank import STOPPED, finished_already, preempted_code, run_as_rank

__all__ = ["STOPPED", "run_command"]


def run_command(
    command: str,
    argv: list[str],
    *,
    summary: str,
    examples: str,
    groups: tuple[str, ...],
    check: Callable[[Mapping[str, Any]], None],
    run: Callable[[DictConfig], Any],
) -> int:
    """Composes and checks the config, here, before torch is imported; then runs on every rank.

    Args:
        command: the command's name, and its YAML's.
        groups: the config groups that --help lists.
        check: raises ConfigError.
        run: one rank's work; it is given the config by NeMo's `hydra_runner`.

    Returns:
        0, 2 where the configuration is refused, 3 where a guard stopped the run, `preemption.exit_code` where it was
        asked to stop, else the failed rank's exit code.
    """
    options = parser(command, summary, examples, groups).parse_intermixed_args(argv)
    problems = Problems()
    cfg = problems.attempt(compose_config, command, options.overrides, options.config_dir)
    if cfg is not None and options.cfg:
        print(OmegaConf.to_yaml(cfg, resolve=options.resolve), end="")
        return 0
    values = (None if cfg is None else problems.attempt(plain, cfg)) or {}
    if values:
        problems.attempt(_check, check, values)
    if is_rank():
        work = partial(
            _run_rank, command, options.overrides, options.config_dir, run, verbose=values.get("verbose", True)
        )
        return run_as_rank(command, values, problems, work)
    if problems:
        return report(command, ConfigError(problems))
    said = finished_already(values)
    if said is not None:
        print(f"tied-lora {command}: {said}")
        return 0
    layout = Layout.from_config(values)
    if layout.num_nodes > 1:
        problem = "trainer.num_nodes: several nodes need a launcher; start one process a rank with torchrun"
        return report(command, ConfigError([problem]))
    code = start_ranks(command_module(command), argv, layout.devices)
    return code and preempted_code(values, code)


def _check(check: Callable[[Mapping[str, Any]], None], values: Mapping[str, Any]) -> None:
    """Runs the command's check. On a rank, also refuses a launcher that started another number of ranks."""
    check(values)
    layout = Layout.from_config(values)
    if is_rank() and int(os.environ["WORLD_SIZE"]) != layout.world_size:
        started = os.environ["WORLD_SIZE"]
        problem = (
            f"trainer.num_nodes x trainer.devices = {layout.world_size}, but the launcher started {started} ranks"
        )
        raise ConfigError([f"{problem}; make them agree"])


def _run_rank(
    command: str, overrides: list[str], config_dir: str | None, run: Callable[[DictConfig], Any], *, verbose: bool
) -> Any:
    """What `run` returns, or raises."""
    if not verbose:
        _quiet()
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    from nemo.core.config import hydra_runner
    from nemo.utils import logging as nemo_logging

    if not verbose:
        nemo_logging.remove_stream_handlers()  # its log files in the run's folder still hold everything

    results: list[Any] = []
    failures: list[Exception] = []

    def guarded(cfg: DictConfig) -> None:
        try:
            results.append(run(cfg))
        except Exception as error:  # Hydra would print it and exit
            failures.append(error)

    more = [] if config_dir is None else ["--config-dir", config_dir]
    sys.argv = [f"tied-lora {command}", *parse_overrides(command, overrides)[0], *more]
    hydra_runner(config_path=str(config_folder()), config_name=command)(guarded)()
    if failures:
        raise failures[0]
    return results[0]


def _quiet() -> None:
    """Only what a person asked to see, errors, and the progress bar: before the noisy packages are imported."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "datasets", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
