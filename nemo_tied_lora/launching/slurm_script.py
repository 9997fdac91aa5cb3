# SPDX-License-Identifier: Apache-2.0
"""Renders the SLURM script of a run or a sweep: sbatch's options, the settings, and `slurm_job.sh`, which never changes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.launching.cluster_config import Cluster

__all__ = ["Job", "render"]

_HEAD = """\
#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
"""
_OURS = """\
# Runs tied-lora finetune on SLURM, one task per rank. You may change sbatch's options and the settings, down to the line
# "The rest"; or let `tied-lora launch` write them. To add keys to the configuration: sbatch SCRIPT key=value ...
"""
_ANOTHER = """\
# Runs a training script on SLURM, one task per rank. Change sbatch's options and the settings, down to the line "The rest".
# To add arguments: sbatch SCRIPT key=value ...
# The script is called on every rank with --folder FOLDER, and before that on one task with --check FOLDER too: it then checks its
# arguments for WORLD_SIZE ranks, and writes its record there. Exit code 2 refuses, 0 means done. After any other code the job
# runs again, if ranks have started. Relative paths begin where you call sbatch; with container_image, paths are those inside.
"""
_END_OF_HEAD = """\
# Near its time limit, the job saves, requeues itself, and resumes. It also requeues itself after a failure.
# Secrets come only from the environment of the shell that calls sbatch.
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submission to SLURM."""

    name: str
    folder: str
    """The run's folder. A sweep's folder contains one folder per run."""
    arguments: Sequence[str]
    """Hydra overrides of `tied-lora finetune`. In a sweep, those that all runs share."""
    cluster: Cluster
    nodes: int
    ranks_per_node: int
    num_runs: int | None = None
    """Number of runs of a sweep. None: a single run."""
    script: str | None = None
    """A training script of another framework, which `arguments` are for. None: `tied-lora finetune`."""

    def __post_init__(self) -> None:
        Problems(
            f"{key}={value!r}: quotes, backslashes and line breaks cannot stand in an #SBATCH line; remove them"
            for key, value in _words(self)
            if re.search(r"[\"'\\\n`$]", str(value))
        ).raise_if_any()

    @property
    def index(self) -> str | None:
        """A sweep's index file. One line per run: its folder and its overrides, separated by tabs. None: no sweep."""
        return None if self.num_runs is None else f"{self.folder}/sweep.tsv"

    @property
    def log(self) -> str:
        """The log of the script itself. The ranks' logs are in folders beside it."""
        return self.cluster.log or f"{self.folder}/logs/{'%j' if self.num_runs is None else '%A_%a'}.log"


def render(job: Job) -> str:
    """Returns the script. It quotes all values of the user, except cluster.setup, which is shell code."""
    directives = "\n".join(f"#SBATCH --{option}" for option in _directives(job))
    body = resources.files("nemo_tied_lora.launching").joinpath("slurm_job.sh").read_text(encoding="utf-8")
    body = body.removeprefix("# shellcheck shell=bash\n")
    head = f"{_HEAD}{_OURS if job.script is None else _ANOTHER}{_END_OF_HEAD}"
    return f"{head}{directives}\nset -euo pipefail\n\n{_settings(job)}\n{body}"


def _words(job: Job) -> Iterator[tuple[str, object]]:
    """Yields the user's values in sbatch's options, with their keys."""
    yield "name", job.name
    names = ("partition", "account", "qos", "reservation", "constraint", "memory", "log")
    yield from ((f"cluster.{name}", getattr(job.cluster, name)) for name in names)
    for name, value in (job.cluster.sbatch or {}).items():
        yield f"cluster.sbatch.{name}", f"{name}{value}"


def _directives(job: Job) -> Iterator[str]:
    cluster = job.cluster
    yield f"job-name={_word(job.name)}"
    yield f"nodes={job.nodes}"
    yield f"ntasks-per-node={job.ranks_per_node}"
    if cluster.gpu_request is not None:
        yield f"{cluster.gpu_request}={'gpu:' if cluster.gpu_request == 'gres' else ''}{job.ranks_per_node}"
    values = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "reservation": cluster.reservation,
        "constraint": cluster.constraint,
        "time": cluster.time,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.memory,
        **(cluster.sbatch or {}),
    }
    yield from (f"{option}={_word(str(value))}" for option, value in values.items() if value is not None)
    if cluster.exclusive:
        yield "exclusive"
    if job.num_runs is not None:
        yield f"array=0-{job.num_runs - 1}%{cluster.at_once}"
    # The signal goes to the ranks. With B:TERM it would go to the script. The ranks save, then the script decides.
    yield f"signal=TERM@{cluster.save_seconds}"
    yield "requeue"
    yield "open-mode=append"
    yield f"output={_word(job.log)}"


def _settings(job: Job) -> str:
    cluster, container = job.cluster, job.cluster.container
    lines = [f"folder={_quoted(job.folder)}", f"index={_quoted(job.index)}", f"script={_quoted(job.script)}"]
    lines += ["arguments=(", *(f"    {_quoted(argument)}" for argument in job.arguments), ")"]
    lines += [f"python={_quoted(cluster.python)}", f"max_requeues={cluster.max_requeues}"]
    lines += [f"container_image={_quoted(container.image)}", f"container_mounts={_quoted(','.join(container.mounts))}"]
    lines += [f"container_workdir={_quoted(container.workdir)}"]
    lines += [f"srun_options=({' '.join(_quoted(option) for option in cluster.srun)})"]
    lines += [f"export {name}={_quoted(value)}" for name, value in cluster.exported.items()]
    lines += [f"exported={_quoted(','.join(cluster.exported))}"]
    return "\n".join([*lines, *cluster.setup]) + "\n"


def _quoted(value: str | None) -> str:
    return shlex.quote(value) if value else "''"


def _word(value: str) -> str:
    """Quotes a value with blanks, at which sbatch splits its lines. `Job` refuses quotes in values."""
    return f'"{value}"' if re.search(r"[\s#]", value) else value
