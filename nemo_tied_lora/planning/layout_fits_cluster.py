# SPDX-License-Identifier: Apache-2.0
"""Checks that a run fits the machines: ranks and SLURM's tasks, free disk space, time to save.

Imports neither torch nor NeMo: these checks run before a model is built. Each `..._problems` yields one line per problem.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.checkpoint.nemo_adapter_packing import largest_file
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, is_whole_number
from nemo_tied_lora.planning.adapter_cost import Precision, rank_share
from nemo_tied_lora.planning.architecture import Architecture, selected_linears
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.planning.rank_variables import is_rank, tasks_on_nodes
from nemo_tied_lora.planning.settings.run_settings import run_folder

__all__ = [
    "checkpoint_bytes",
    "disk_problems",
    "folder_problems",
    "launcher_problems",
    "seconds_to_save",
    "time_problems",
]


# Assumed: what a shared file system writes easily for one job, and what a save costs besides writing.
_SAVED_BYTES_PER_SECOND = 200 * 2**20
_SAVE_OVERHEAD_S = 30
_LOGS_BYTES = 64 * 2**20
_SQUEUE_TIMEOUT_S = 10


def launcher_problems(layout: Layout, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Compares the configured ranks with those that a launcher has started, if this process is one of them."""
    if not is_rank(environment):
        return
    nodes, tasks = (_number(environment.get(f"SLURM_STEP_NUM_{name}")) for name in ("NODES", "TASKS"))
    started = _number(environment["WORLD_SIZE"])
    if started != layout.world_size:
        where = f" on {nodes} nodes" if nodes and nodes > 1 else ""
        fits = started and nodes and started % nodes == 0
        sizes = f"set trainer.num_nodes={nodes} trainer.devices={started // nodes}" if fits else "make them agree"  # type: ignore[operator]
        yield (
            f"trainer.num_nodes={layout.num_nodes} x trainer.devices={layout.devices} = {layout.world_size}, but the launcher "
            f"started {started} ranks{where}; {sizes}, or start {layout.world_size}"
        )
        return
    if nodes is None or tasks is None:
        return
    if nodes != layout.num_nodes:
        yield f"trainer.num_nodes={layout.num_nodes}: SLURM runs this on {nodes} nodes; set it to {nodes}"
    each = tasks_on_nodes(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if tasks == layout.world_size and len(set(each)) > 1:
        yield f"SLURM_STEP_TASKS_PER_NODE={each}: nodes hold different numbers of ranks; --ntasks-per-node={layout.devices}"
    gpus = _number(environment.get("SLURM_GPUS_ON_NODE"))
    if gpus is not None and gpus < layout.devices:
        yield f"trainer.devices={layout.devices}: SLURM gave this node {gpus} GPUs; --gpus-per-node={layout.devices}"


def checkpoint_bytes(arch: Architecture, layout: Layout, config: TiedLoraConfig | None, precision: Precision) -> int:
    """Returns an upper bound for one checkpoint of all ranks: weights, and master weights and moments of trained factors.

    Args:
        config: None: every parameter of the base is trained. The bound is then 0 if the vocabulary's size is unknown.
    """
    per_element = precision.weights + precision.master + precision.moments
    if config is None:
        return (arch.num_parameters or 0) * per_element
    precision, share = precision.of_adapter(config), rank_share(arch, layout, config)
    held = share.held * precision.weights + share.trained * (precision.master + precision.moments)
    return held * layout.tp_size * layout.pp_size


def folder_problems(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Checks that the folders that a run writes to, or the nearest existing ones above them, are writable."""
    folder = run_folder(cfg)
    if folder is not None and (place := _not_writable(folder)) is not None:
        yield f"exp_manager: {folder}: {place} is not a writable folder; write elsewhere (exp_manager.exp_dir=)"
    for key, written in _data_folders(cfg):
        if (place := _not_writable(written)) is not None:
            yield f"{key}: {place} is not a writable folder; write elsewhere"


def _data_folders(cfg: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yields (key, folder) of the indices and the predictions of the data."""
    data = (cfg.get("model") or {}).get("data") or {}
    for name, section in data.items() if isinstance(data, Mapping) else ():
        if not isinstance(section, Mapping) or not section.get("file_names"):
            continue
        if isinstance(index := section.get("index_mapping_dir"), str):
            yield f"model.data.{name}.index_mapping_dir={index}", Path(index)
        prefix = section.get("output_file_path_prefix")
        if isinstance(prefix, str) and section.get("write_predictions_to_file"):
            yield f"model.data.{name}.output_file_path_prefix={prefix}", Path(prefix).parent


def _not_writable(folder: Path) -> Path | None:
    """Returns the place that keeps a folder from being made or written, if there is one."""
    place = _nearest_existing(folder)
    return None if place.is_dir() and os.access(place, os.W_OK | os.X_OK) else place


def disk_problems(
    cfg: Mapping[str, Any], arch: Architecture, layout: Layout, config: TiedLoraConfig | None
) -> Iterator[str]:
    """Compares the free disk space with all kept checkpoints, one more that is being written, and the `.nemo`."""
    folder = run_folder(cfg)
    precision = _precision(cfg)
    if folder is None or precision is None:
        return
    one = checkpoint_bytes(arch, layout, config, precision)
    kept = _checkpoints_kept(cfg) + 1
    result = one
    if config is not None:
        result = largest_file(config, selected_linears(arch, config), precision.of_adapter(config).weights)
    needed = kept * one + result + _LOGS_BYTES
    free = shutil.disk_usage(_nearest_existing(folder)).free
    if free < needed:
        yield (
            f"exp_manager: {folder}: {_size(free)} free, but {kept} checkpoints of {_size(one)} and the .nemo need "
            f"{_size(needed)}; free some space, write elsewhere (exp_manager.exp_dir=), or keep fewer (save_top_k)"
        )


def time_problems(
    cfg: Mapping[str, Any], arch: Architecture, layout: Layout, config: TiedLoraConfig | None
) -> Iterator[str]:
    """Compares the job's remaining time with an estimate of one save."""
    needed, left = seconds_to_save(cfg, arch, layout, config), _seconds_left(os.environ)
    if needed is not None and left is not None and left < needed:
        yield (
            f"SLURM's time limit: {left:.0f} s are left, but one save takes about {needed:.0f} s, so nothing could be "
            "saved; ask for more with --time"
        )


def _nearest_existing(path: Path) -> Path:
    """Returns the path, or the nearest existing folder above it."""
    place = path.resolve()
    while not os.path.exists(place):  # Path.exists() raises if a folder on the way cannot be entered
        place = place.parent
    return place


def seconds_to_save(
    cfg: Mapping[str, Any], arch: Architecture, layout: Layout, config: TiedLoraConfig | None
) -> float | None:
    """Estimates the seconds that one checkpoint takes. None if the precision is not valid."""
    precision = _precision(cfg)
    if precision is None:
        return None
    return _SAVE_OVERHEAD_S + checkpoint_bytes(arch, layout, config, precision) / _SAVED_BYTES_PER_SECOND


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _precision(cfg: Mapping[str, Any]) -> Precision | None:
    try:
        return Precision.from_names(cfg["trainer"].get("precision"), bool(cfg["model"].get("megatron_amp_O2")))
    except ConfigError:
        return None  # reported by `preflight`


def _checkpoints_kept(cfg: Mapping[str, Any]) -> int:
    """Returns how many checkpoints a run keeps: the best ones and the last."""
    manager = cfg.get("exp_manager") or {}
    if not manager.get("create_checkpoint_callback"):
        return 0
    best = (manager.get("checkpoint_callback_params") or {}).get("save_top_k", 1)
    if best == -1:  # all
        steps, every = cfg["trainer"].get("max_steps"), cfg["trainer"].get("val_check_interval")
        best = steps // every if isinstance(steps, int) and isinstance(every, int) and steps > 0 and every > 0 else 1
    return (best if is_whole_number(best, 0) else 1) + 1


def _seconds_left(environment: Mapping[str, str]) -> float | None:
    """Returns the seconds until SLURM ends the job, from the environment or, on rank 0 alone, from squeue. None: unknown."""
    end = _number(environment.get("SLURM_JOB_END_TIME"))
    if end is not None:
        return end - time.time()
    job = environment.get("SLURM_JOB_ID")
    if job is None or environment.get("RANK", "0") != "0" or shutil.which("squeue") is None:
        return None
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%L"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return _seconds(output.strip())


def _seconds(text: str) -> float | None:
    """Parses SLURM's [days-][[hours:]minutes:]seconds. None for other texts, such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)", text)
    if match is None:
        return None
    days, first, second, last = (int(part or 0) for part in match.groups())
    hours, minutes = (first, second) if match[3] is not None else (0, first)
    return ((days * 24 + hours) * 60 + minutes) * 60 + last


def _size(num_bytes: float) -> str:
    power = next((power for power in range(4) if num_bytes < 1024 ** (power + 1)), 4)
    return f"{num_bytes / 1024**power:.1f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
