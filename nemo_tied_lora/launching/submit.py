# SPDX-License-Identifier: Apache-2.0
"""A launch from its arguments: composed, checked against the cluster and the files, then submitted or run here."""

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
from nemo_tied_lora.launching.run_record import write_record
from nemo_tied_lora.launching.slurm_script import Job, render
from nemo_tied_lora.launching.sweep import Point, index_file, points, split_sweep
from nemo_tied_lora.launching.torchrun import start_ranks
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.base_config import adapter_section, base_model_config
from nemo_tied_lora.planning.compose import compose_config, plain
from nemo_tied_lora.planning.layout_fits_cluster import seconds_to_save
from nemo_tied_lora.planning.parallel_layout import Layout, check
from nemo_tied_lora.planning.preflight import check_finetuning

__all__ = ["SCRIPT", "Launch", "prepare", "print_launch", "run_here", "submit"]

_MODULE = "nemo_tied_lora.commands.finetune"
# What a base's own file always says; the rest of an architecture is guessed from defaults where it does not.
_COMPARED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
SCRIPT = "job.sbatch"
"""The rendered script's name in the run's folder."""


@dataclass(frozen=True)
class Launch:
    """A job, the runs it starts, and each run's composed configuration."""

    job: Job
    runs: Sequence[Point]
    configs: Sequence[DictConfig]

    @property
    def folders(self) -> list[str]:
        """Each run's folder."""
        return [self.job.folder] if self.job.index is None else [f"{self.job.folder}/{run.name}" for run in self.runs]

    @property
    def files(self) -> dict[str, str]:
        """The files that a submission writes, by path."""
        index = self.job.index
        script = {f"{self.job.folder}/{SCRIPT}": render(self.job)}
        return script if index is None else {**script, index: index_file(self.job.folder, self.runs)}


def prepare(settings: Mapping[str, Any], arguments: Sequence[str], config_dir: str | None = None) -> Launch:
    """Composes and checks everything that this machine can see.

    Args:
        settings: `configs/launch.yaml`, composed.
        arguments: the overrides of `tied-lora finetune`, sweeps among them.

    Raises:
        ConfigError: all problems together.
    """
    cluster = Cluster.from_mapping(settings["cluster"])
    fixed, swept = split_sweep(arguments)
    runs = points(swept)
    first = plain(compose_config("finetune", [*fixed, *runs[0].overrides], config_dir))
    nodes = cluster.nodes or first["trainer"]["num_nodes"]
    ranks = cluster.gpus_per_node or first["trainer"]["devices"]
    sizes = [f"trainer.num_nodes={nodes}", f"trainer.devices={ranks}"]
    folder = str(first["exp_manager"]["explicit_log_dir"] or Path(first["exp_manager"]["exp_dir"], str(first["name"])))
    if not re.fullmatch(r"[\w./+@-]+", folder):
        raise ConfigError([f"exp_manager.explicit_log_dir={folder!r}: letters, digits and ./_+-@ only"])
    problems = Problems(_launch_problems(fixed, swept, folder, nodes, cluster))
    configs = []
    for run in runs:
        place = (
            f"exp_manager.explicit_log_dir={folder}/{run.name}" if swept else f"exp_manager.explicit_log_dir={folder}"
        )
        configs.append(compose_config("finetune", [*fixed, *run.overrides, *sizes, place], config_dir))
        found = list(_run_problems(plain(configs[-1]), cluster.container, settings.get("model")))
        found += _save_problems(plain(configs[-1]), cluster)
        problems += [f"{run.name}: {problem}" if swept else problem for problem in found]
    problems.raise_if_any()
    job = Job(
        name=str(first["name"]),
        folder=folder,
        arguments=[*([] if config_dir is None else [f"--config-dir={Path(config_dir).resolve()}"]), *fixed],
        cluster=replace(cluster, python=cluster.python or ("python" if cluster.container.image else sys.executable)),
        nodes=nodes,
        ranks_per_node=ranks,
        num_runs=len(runs) if swept else None,
    )
    return Launch(job, runs, configs)


def print_launch(launch: Launch) -> None:
    """What `submit`, or `run_here`, would do: every command, and every file that goes to SLURM, whole."""
    job = launch.job
    if job.cluster.kind == "slurm":
        print(f"# {shlex.join(_command(launch))}")
        for path, content in launch.files.items():
            print(f"# ----- {path}\n{content}", end="")
        return
    for name, value in job.cluster.exported.items():
        print(f"export {name}={shlex.quote(value)}")
    for folder, run in zip(launch.folders, launch.runs, strict=True):
        words = ["torchrun", "--standalone", "--nproc-per-node", str(job.ranks_per_node)]
        print(shlex.join([*words, "-m", _MODULE, *_local_arguments(job, folder, run)]))


def submit(launch: Launch) -> str:
    """Writes the script and each run's record, and hands the script to sbatch; returns the job's number.

    Raises:
        ConfigError: sbatch is not here, or refuses.
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
    """Each run in turn, on this machine's ranks; the first exit code that is not 0, or 0."""
    job, worst = launch.job, 0
    os.environ.update(job.cluster.exported)
    if job.index is not None:
        write_atomically(Path(job.index), launch.files[job.index].encode())
    for number, (folder, run) in enumerate(zip(launch.folders, launch.runs, strict=True)):
        _write_record(launch, number)
        code = start_ranks(_MODULE, _local_arguments(job, folder, run), job.ranks_per_node)
        if code:
            print(f"tied-lora launch: {folder}: exit code {code}", file=sys.stderr)
        worst = worst or code
    return worst


def _write_record(launch: Launch, number: int) -> None:
    """The resolved configuration of a run, and this side's versions and commit, in the run's folder."""
    overrides = [*launch.job.arguments, *launch.runs[number].overrides]
    write_record(Path(launch.folders[number]), launch.configs[number], overrides)


def _launch_problems(
    fixed: Sequence[str], swept: Sequence[Sequence[str]], folder: str, nodes: int, cluster: Cluster
) -> Iterator[str]:
    """What is wrong with the launch itself, whatever the runs are."""
    keys = {override.partition("=")[0].lstrip("+~") for override in [*fixed, *(values[0] for values in swept)]}
    for key, ours in (("trainer.num_nodes", "cluster.nodes"), ("trainer.devices", "cluster.gpus_per_node")):
        if key in keys:
            yield f"{key}: follows from the allocation; set {ours}"
    if swept and keys & {"output", "exp_manager.explicit_log_dir"} & {v[0].partition("=")[0] for v in swept}:
        yield "output, exp_manager.explicit_log_dir: each run of a sweep gets a folder of its own; leave them single"
    elif swept and "output" in keys:
        yield "output: all runs of a sweep would write it; leave it out: each gets adapter.nemo in its own folder"
    if cluster.kind == "local" and nodes > 1:
        yield f"trainer.num_nodes={nodes}: cluster=local is one machine; choose a smaller layout, or cluster=slurm"
    if cluster.container.host_path(folder) != folder:
        yield (
            f"exp_manager.explicit_log_dir={folder}: the job writes there from inside the container and from outside; "
            "name an absolute path that cluster.container.mounts shows at the same place"
        )


def _run_problems(values: dict[str, Any], container: Container, expected: Mapping[str, Any] | None) -> Iterator[str]:
    """What `tied-lora finetune` would refuse, as far as it can be seen from here, and a base of other sizes."""
    unseen = _to_host(values["model"], container)
    problems = Problems()
    problems.attempt(check_finetuning, values)
    yield from (problem for problem in problems if not any(path in problem for path in unseen))
    base = values["model"].get("restore_from_path")
    if not expected or base in unseen:
        return
    want = Architecture.from_model_config(expected)
    try:
        got = Architecture.from_model_config(base_model_config(base))
    except ConfigError:
        return  # said above
    for name in _COMPARED:
        ours, its = getattr(want, name), getattr(got, name)
        if ours != its:
            yield f"model.restore_from_path={base}: {name} is {its}, and model= says {ours}; change one of them"


def _save_problems(values: dict[str, Any], cluster: Cluster) -> Iterator[str]:
    """The warning before the time limit against the time of a save, where the run is sound by itself."""
    _to_host(values["model"], cluster.container)
    try:
        arch = Architecture.from_model_config(base_model_config(values["model"].get("restore_from_path")))
        layout, config = Layout.from_config(values), adapter_section(values["model"]["peft"])
    except ConfigError:
        return  # said elsewhere, or out of sight
    needed = None if check(arch, layout, config) else seconds_to_save(values, arch, layout, config)
    if cluster.kind == "slurm" and needed is not None and needed > cluster.save_seconds:
        yield (
            f"cluster.save_seconds={cluster.save_seconds}: so long before the time limit the ranks are told to save, which "
            f"takes about {needed:.0f} s; raise it"
        )


def _to_host(model: dict[str, Any], container: Container) -> set[str]:
    """Replaces the container's paths by this machine's; returns those that no mount shows, which nobody can check."""
    unseen = set()

    def host(path: str | None) -> str | None:
        if path is None:
            return None
        outside = container.host_path(str(path))
        if outside is None:
            unseen.add(str(path))
        return outside or path

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
