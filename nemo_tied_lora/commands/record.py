# SPDX-License-Identifier: Apache-2.0
"""`python -m nemo_tied_lora.commands.record FOLDER key=value ...`: records a SLURM job's run before its ranks start.

Writes the resolved config.yaml and versions.json, and refuses what `tied-lora finetune` refuses, wrong lines of data too
(exit code 2). The job script runs it once, on one task of the allocation. Imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_tied_lora.commands.hydra_flags import parser, yaml_sources
from nemo_tied_lora.commands.program import run_program
from nemo_tied_lora.commands.task_data import check_task, make_task_files
from nemo_tied_lora.errors import ConfigError, Problems, report
from nemo_tied_lora.launching.run_record import write_record
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.data.data_files import check_training_files
from nemo_tied_lora.planning.preflight import check_finetuning

__all__ = ["main"]


_SUMMARY = "check a run's configuration and write its record"


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 2 if the configuration is refused."""
    folder, *rest = arguments
    options = parser("finetune", _SUMMARY, "", ()).parse_intermixed_args(rest)
    try:
        cfg = compose_config("finetune", options.overrides, yaml_sources("finetune", options))
        write_record(Path(folder), cfg, rest)
        values, problems = plain(cfg), Problems()
        problems.attempt(check_task, values)
        problems.attempt(check_finetuning, values)
        if not problems:
            problems.attempt(make_task_files, values)
        problems.attempt(check_training_files, values)
        problems.raise_if_any()
    except ConfigError as error:
        return report("finetune", error)
    return 0


if __name__ == "__main__":
    run_program(main, sys.argv[1:], "finetune")
