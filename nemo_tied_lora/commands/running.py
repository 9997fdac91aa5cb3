# SPDX-License-Identifier: Apache-2.0
"""What commands that run on ranks share: check, start the ranks, and be one of them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_tied_lora.commands.composing import compose_config, parse_overrides, parser, plain, report
from nemo_tied_lora.commands.config_folder import config_folder
from nemo_tied_lora.commands.ranks import command_module, is_rank, start_ranks
from nemo_tied_lora.config import ConfigError
from nemo_tied_lora.guards import TrainingStopped
from nemo_tied_lora.layout import Layout

__all__ = ["STOPPED", "run_command"]

STOPPED = 3
"""The exit code of a run that one of its guards has stopped."""


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
        0, 2 where the configuration is refused, 3 where a guard stopped the run, else the failed rank's exit code.
    """
    options = parser(command, summary, examples, groups).parse_intermixed_args(argv)
    try:
        cfg = compose_config(command, options.overrides, options.config_dir)
        if options.cfg:
            print(OmegaConf.to_yaml(cfg, resolve=options.resolve), end="")
            return 0
        values = plain(cfg)
        check(values)
        layout = Layout.from_config(values)
        _check_launcher(layout)
    except ConfigError as error:
        return report(command, error) if not is_rank() or _is_first_rank() else 2
    if is_rank():
        return _run_rank(command, options.overrides, options.config_dir, run, verbose=bool(values["verbose"]))
    if layout.num_nodes > 1:
        problem = "trainer.num_nodes: several nodes need a launcher; start one process a rank with torchrun"
        return report(command, ConfigError([problem]))
    return start_ranks(command_module(command), argv, layout.devices)


def _check_launcher(layout: Layout) -> None:
    """A launcher that starts another number of ranks than the configuration names would end in a hang or a traceback."""
    if is_rank() and int(os.environ["WORLD_SIZE"]) != layout.world_size:
        started = os.environ["WORLD_SIZE"]
        problem = (
            f"trainer.num_nodes x trainer.devices = {layout.world_size}, but the launcher started {started} ranks"
        )
        raise ConfigError([f"{problem}; make them agree"])


def _run_rank(
    command: str, overrides: list[str], config_dir: str | None, run: Callable[[DictConfig], Any], *, verbose: bool
) -> int:
    if not verbose:
        _quiet()
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    from nemo.core.config import hydra_runner
    from nemo.utils import logging as nemo_logging

    if not verbose:
        nemo_logging.remove_stream_handlers()  # its log files in the run's folder still hold everything

    failure: list[ConfigError | TrainingStopped] = []

    def guarded(cfg: DictConfig) -> None:
        try:
            run(cfg)
        except (ConfigError, TrainingStopped) as error:
            failure.append(error)

    more = [] if config_dir is None else ["--config-dir", config_dir]
    sys.argv = [f"tied-lora {command}", *parse_overrides(command, overrides)[0], *more]
    hydra_runner(config_path=str(config_folder()), config_name=command)(guarded)()
    # Said before the others are met again: a launcher may end this rank as soon as another has gone.
    code = _report_failure(command, failure[0]) if failure else 0
    _leave_process_groups()
    return code


def _report_failure(command: str, failure: ConfigError | TrainingStopped) -> int:
    """Rank 0 says it once, for every rank has the same; returns the exit code."""
    if isinstance(failure, ConfigError):
        return report(command, failure) if _is_first_rank() else 2
    if _is_first_rank():
        print(f"tied-lora {command}: {failure}", file=sys.stderr, flush=True)
    return STOPPED


def _leave_process_groups() -> None:
    """A rank that exits with its groups' threads running may be aborted, after its work is done."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _quiet() -> None:
    """Only what a person asked to see, errors, and the progress bar: before the noisy packages are imported."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "datasets", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _is_first_rank() -> bool:
    return os.environ.get("RANK") == "0"
