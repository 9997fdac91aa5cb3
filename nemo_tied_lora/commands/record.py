# SPDX-License-Identifier: Apache-2.0
"""`python -m nemo_tied_lora.commands.record FOLDER key=value ...`: a job's first step, on one task of the allocation.

Refuses what `tied-lora finetune` would refuse (exit code 2), and writes what the run will be: config.yaml, resolved,
and versions.json. Torch is not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_tied_lora.commands.local_command import parser
from nemo_tied_lora.errors import ConfigError, report
from nemo_tied_lora.launching.run_record import write_record
from nemo_tied_lora.planning.compose import compose_config, plain
from nemo_tied_lora.planning.preflight import check_finetuning

__all__ = ["main"]


_SUMMARY = "check a run's configuration and write its record"


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 2 where the configuration is refused."""
    folder, *rest = arguments
    options = parser("finetune", _SUMMARY, "", ()).parse_intermixed_args(rest)
    try:
        cfg = compose_config("finetune", options.overrides, options.config_dir)
        write_record(Path(folder), cfg, rest)
        check_finetuning(plain(cfg))
    except ConfigError as error:
        return report("finetune", error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
