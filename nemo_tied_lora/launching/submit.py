# SPDX-License-Identifier: Apache-2.0
"""Prepares a launch from its arguments, checks it, and submits it to SLURM or runs it on this machine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.files import write_atomically
from nemo_tied_lora.launching.cluster_config import Cluster, Container
from nemo_tied_lora.launching.local_ranks import start_ranks
from nemo_tied_lora.launching.run_record import write_record
from nemo_tied_lora.launching.slurm_script import Job, render
from nemo_tied_lora.launching.sweep import Point, index_file, points, split_sweep
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.base_config import adapter_section, base_model_config
from nemo_tied_lora.planning.composing.compose import compose_config, compose_with_notes, plain
from nemo_tied_lora.planning.composing.yaml_sources import YamlSources
from nemo_tied_lora.planning.layout_fits_cluster import seconds_to_save
from nemo_tied_lora.planning.parallel_layout import Layout, check
from nemo_tied_lora.planning.preflight import check_finetuning

__all__ = ["SCRIPT", "Launch", "prepare", "print_launch", "run_here", "submit"]

_MODULE = "nemo_tied_lora.commands.finetune"
# Keys that every base's file has. Other keys may be missing there, and their defaults prove nothing.
_COMPARED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
SCRIPT = "job.sbatch"
"""The rendered script's name in the run's folder."""


@dataclass(frozen=True)
class Launch:
    """A job, the runs it starts, and each run's composed configuration."""

    job: Job
    runs: Sequence[Point]
    configs: Sequence[DictConfig]
    notes: Sequence[str] = ()
    """What was translated in the overrides or the user's YAML, one line each."""

    @property
    def folders(self) -> list[str]:
        """Each run's folder."""
        return [self.job.folder] if self.job.index is None else [f"{self.job.folder}/{run.name}" for run in self.runs]

    @property
    def files(self) -> dict[str, str]:
        """Path to content of the files that a submission writes."""
        index = self.job.index
        script = {f"{self.job.folder}/{SCRIPT}": render(self.job)}
        return script if index is None else {**script, index: index_file(self.job.folder, self.runs)}


def prepare(settings: Mapping[str, Any], arguments: Sequence[str], sources: YamlSources | None = None) -> Launch:
    """Composes the configurations, and checks everything that this machine can see.

    Args:
        settings: `configs/launch.yaml`, composed.
        arguments: the overrides of `tied-lora finetune`, with or without sweeps.
        sources: the YAMLs beside the shipped ones. The job names them by absolute paths.

    Raises:
        ConfigError: all problems together.
    """
    cluster = Cluster.from_mapping(settings["cluster"])
    fixed, swept = split_sweep(arguments)
    runs = points(swept)
    sources = sources or YamlSources()
    cfg, notes = compose_with_notes("finetune", [*fixed, *runs[0].overrides], sources)
    first = plain(cfg)
    nodes = cluster.nodes or first["trainer"]["num_nodes"]
    ranks = cluster.gpus_per_node or first["trainer"]["devices"]
    sizes = [f"trainer.num_nodes={nodes}", f"trainer.devices={ranks}"]
    manager = first["exp_manager"]
    folder = str(manager["explicit_log_dir"] or Path(manager["exp_dir"] or "nemo_experiments", str(first["name"])))
    if not re.fullmatch(r"[\w./+@-]+", folder):
        raise ConfigError([f"exp_manager.explicit_log_dir={folder!r}: letters, digits and ./_+-@ only"])
    problems = Problems(_launch_problems(fixed, swept, folder, nodes, cluster))
    problems += _yaml_problems(sources, first, cluster.container, swept=bool(swept))
    configs = []
    for run in runs:
        place = (
            f"exp_manager.explicit_log_dir={folder}/{run.name}" if swept else f"exp_manager.explicit_log_dir={folder}"
        )
        configs.append(compose_config("finetune", [*fixed, *run.overrides, *sizes, place], sources))
        found = list(_run_problems(plain(configs[-1]), cluster, settings.get("model")))
        found += _save_problems(plain(configs[-1]), cluster)
        problems += [f"{run.name}: {problem}" if swept else problem for problem in found]
    problems.raise_if_any()
    job = Job(
        name=str(first["name"]),
        folder=folder,
        arguments=[*sources.flags(), *fixed],
        cluster=replace(cluster, python=cluster.python or ("python" if cluster.container.image else sys.executable)),
        nodes=nodes,
        ranks_per_node=ranks,
        num_runs=len(runs) if swept else None,
    )
    return Launch(job, runs, configs, notes)


def print_launch(launch: Launch) -> None:
    """Prints what `submit` or `run_here` would do: each command, and the content of each file for SLURM."""
    job = launch.job
    if job.cluster.kind == "slurm":
        print(f"# {shlex.join(_command(launch))}")
        for path, content in launch.files.items():
            print(f"# ----- {path}\n{content}", end="")
        return
    for name, value in job.cluster.exported.items():
        print(f"export {name}={shlex.quote(value)}")
    for folder, run in zip(launch.folders, launch.runs, strict=True):
        print(shlex.join(["tied-lora", "finetune", *_local_arguments(job, folder, run)]))


def submit(launch: Launch) -> str:
    """Writes the script and each run's record, and submits the script. Returns the job's number.

    Raises:
        ConfigError: sbatch is not installed here, or refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(["sbatch: not found; launch where jobs are submitted to SLURM, or use cluster=local"])
    Path(launch.job.log).parent.mkdir(parents=True, exist_ok=True)
    for path, content in launch.files.items():
        write_atomically(Path(path), content.encode())
    for number in range(len(launch.runs)):
        _write_record(launch, number)
    done = subprocess.run(_command(launch), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError([line for line in done.stderr.splitlines() if line.strip()] or ["sbatch: failed"])
    return done.stdout.strip().partition(";")[0]


def run_here(launch: Launch) -> int:
    """Runs one run after another on this machine. Returns the first exit code that is not 0, or 0."""
    job, first_failure = launch.job, 0
    os.environ.update(job.cluster.exported)
    if job.index is not None:
        write_atomically(Path(job.index), launch.files[job.index].encode())
    for number, (folder, run) in enumerate(zip(launch.folders, launch.runs, strict=True)):
        _write_record(launch, number)
        code = start_ranks(_MODULE, _local_arguments(job, folder, run), job.ranks_per_node)
        if code:
            print(f"tied-lora launch: {folder}: exit code {code}", file=sys.stderr)
        first_failure = first_failure or code
    return first_failure


def _write_record(launch: Launch, number: int) -> None:
    """Writes a run's resolved configuration, and this machine's versions and commit, into the run's folder."""
    overrides = [*launch.job.arguments, *launch.runs[number].overrides]
    write_record(Path(launch.folders[number]), launch.configs[number], overrides)


def _launch_problems(
    fixed: Sequence[str], swept: Sequence[Sequence[str]], folder: str, nodes: int, cluster: Cluster
) -> Iterator[str]:
    """Yields the problems of the launch itself, not of its runs."""
    keys = {override.partition("=")[0].lstrip("+~") for override in [*fixed, *(values[0] for values in swept)]}
    for key, ours in (("trainer.num_nodes", "cluster.nodes"), ("trainer.devices", "cluster.gpus_per_node")):
        if key in keys:
            yield f"{key}: follows from the allocation; set {ours}"
    if swept and keys & {"output", "exp_manager.explicit_log_dir"} & {v[0].partition("=")[0] for v in swept}:
        yield "output, exp_manager.explicit_log_dir: each run of a sweep gets its own folder; give one value"
    elif swept and "output" in keys:
        yield "output: all runs of a sweep would write it; leave it out: each gets adapter.nemo in its own folder"
    if cluster.kind == "local" and nodes > 1:
        yield f"trainer.num_nodes={nodes}: cluster=local is one machine; choose a smaller layout, or cluster=slurm"
    if cluster.container.host_path(folder) != folder:
        yield (
            f"exp_manager.explicit_log_dir={folder}: the job writes there from inside the container and from outside; "
            "name an absolute path that cluster.container.mounts shows at the same place"
        )


def _yaml_problems(
    sources: YamlSources, first: Mapping[str, Any], container: Container, *, swept: bool
) -> Iterator[str]:
    """Yields what does not fit of the user's YAMLs: the job reads them by the same path, inside its container if it has one."""
    folders = {"--config-dir": sources.config_dir, "--config-path": sources.own and sources.own.parent}
    for flag, folder in folders.items():
        if folder is not None and container.host_path(str(folder)) != str(folder):
            fix = "name a folder that cluster.container.mounts shows at the same place"
            yield f"{flag}={folder}: the job reads it inside the container; {fix}"
    if swept and sources.own is not None and first.get("output") is not None:
        yield f"{sources.own}: output={first.get('output')}: all runs of a sweep would write it; remove it from the file"


def _run_problems(values: dict[str, Any], cluster: Cluster, expected: Mapping[str, Any] | None) -> Iterator[str]:
    """Yields what `tied-lora finetune` would refuse, if this machine can see it, and differences between base and `model=`."""
    unseen = _to_host(values, cluster.container)
    problems = Problems()
    problems.attempt(check_finetuning, values, runs_here=cluster.kind == "local")
    yield from (problem for problem in problems if not any(path in problem for path in unseen))
    base = values["model"].get("restore_from_path")
    if not expected or base in unseen:
        return
    want = Architecture.from_model_config(expected)
    try:
        got = Architecture.from_model_config(base_model_config(base))
    except ConfigError:
        return  # reported above
    for name in _COMPARED:
        ours, its = getattr(want, name), getattr(got, name)
        if ours != its:
            yield f"model.restore_from_path={base}: {name} is {its}, but {ours} in model=; change one of them"


def _save_problems(values: dict[str, Any], cluster: Cluster) -> Iterator[str]:
    """Compares the warning time before the time limit with the time of a save, if the run has no other problems."""
    _to_host(values, cluster.container)
    try:
        arch = Architecture.from_model_config(base_model_config(values["model"].get("restore_from_path")))
        layout, config = Layout.from_config(values), adapter_section(values["model"]["peft"])
    except ConfigError:
        return  # reported by `_run_problems`, or not visible from here
    needed = None if check(arch, layout, config) else seconds_to_save(values, arch, layout, config)
    if cluster.kind == "slurm" and needed is not None and needed > cluster.save_seconds:
        yield (
            f"cluster.save_seconds={cluster.save_seconds}: the ranks start to save so many seconds before the time limit, and "
            f"a save takes about {needed:.0f} s; raise it"
        )


def _to_host(values: dict[str, Any], container: Container) -> set[str]:
    """Replaces the container's paths by this machine's. Returns those outside every mount, which cannot be checked here."""
    unseen = set()

    def host(path: str | None) -> str | None:
        if path is None:
            return None
        outside = container.host_path(str(path))
        if outside is None:
            unseen.add(str(path))
        return outside or path

    model, task = values["model"], values.get("task")
    if isinstance(task, dict):
        task["folder"] = host(task.get("folder"))
    model["restore_from_path"] = host(model.get("restore_from_path"))
    model["peft"]["restore_from_path"] = host(model["peft"].get("restore_from_path"))
    for name in ("train_ds", "validation_ds", "test_ds"):
        section = model["data"][name]
        if isinstance(section.get("file_names"), list):
            section["file_names"] = [host(file) for file in section["file_names"]]
    return unseen


def _local_arguments(job: Job, folder: str, run: Point) -> list[str]:
    sizes = ["trainer.num_nodes=1", f"trainer.devices={job.ranks_per_node}"]
    return [*job.arguments, *run.overrides, *sizes, f"exp_manager.explicit_log_dir={folder}"]


def _command(launch: Launch) -> list[str]:
    return ["sbatch", "--parsable", f"{launch.job.folder}/{SCRIPT}"]
