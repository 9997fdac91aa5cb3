# SPDX-License-Identifier: Apache-2.0
"""The configuration against the allocation: data against layout, ranks against SLURM's tasks, room and time to save.

Neither torch nor NeMo is imported. All of it is looked at before the model is.
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
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.adapter_cost import Precision, rank_share
from nemo_tied_lora.planning.architecture import Architecture, selected_linears
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.planning.run_settings import run_folder

__all__ = [
    "checkpoint_bytes",
    "folder_problems",
    "room_problems",
    "seconds_to_save",
    "slurm_problems",
    "time_problems",
]


# What a shared file system takes from one job without effort, and what a save costs beside writing.
_SAVED_BYTES_PER_SECOND = 200 * 2**20
_SAVE_OVERHEAD_S = 30
_LOGS_BYTES = 64 * 2**20
_SQUEUE_TIMEOUT_S = 10


def slurm_problems(layout: Layout, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """The configured ranks against the job step that runs this rank; nothing outside a step of SLURM's."""
    nodes, tasks = (_number(environment.get(f"SLURM_STEP_NUM_{name}")) for name in ("NODES", "TASKS"))
    if "RANK" not in environment or nodes is None or tasks is None:
        return
    if nodes != layout.num_nodes:
        yield f"trainer.num_nodes={layout.num_nodes}: SLURM runs this on {nodes} nodes; set it to {nodes}"
    if tasks not in (layout.world_size, nodes):  # a task a rank, or torchrun as the one task of each node
        yield (
            f"trainer.num_nodes={layout.num_nodes} x trainer.devices={layout.devices}: {layout.world_size} ranks, but "
            f"srun started {tasks} tasks; one task a rank: --ntasks={layout.world_size}"
        )
    each = _tasks_on_nodes(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if tasks == layout.world_size and len(set(each)) > 1:
        yield f"SLURM_STEP_TASKS_PER_NODE={each}: nodes hold different numbers of ranks; --ntasks-per-node={layout.devices}"
    gpus = _number(environment.get("SLURM_GPUS_ON_NODE"))
    if gpus is not None and gpus < layout.devices:
        yield f"trainer.devices={layout.devices}: SLURM gave this node {gpus} GPUs; --gpus-per-node={layout.devices}"


def checkpoint_bytes(arch: Architecture, layout: Layout, config: TiedLoraConfig | None, precision: Precision) -> int:
    """An upper bound of one checkpoint, all ranks together: weights, master weights and moments of what is trained.

    Args:
        config: None: every parameter of the base is trained. Then 0 where the vocabulary's size is not known.
    """
    per_element = precision.weights + precision.master + precision.moments
    if config is None:
        return (arch.num_parameters or 0) * per_element
    share = rank_share(arch, layout, config)
    held = share.held * precision.weights + share.trained * (precision.master + precision.moments)
    return held * layout.tp_size * layout.pp_size


def folder_problems(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Whether the run's folder is there or can be made, and be written to."""
    folder = run_folder(cfg)
    place = None if folder is None else _nearest_there(folder)
    if place is not None and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        yield f"exp_manager: {folder}: {place} is no folder that can be written to; write elsewhere (exp_manager.exp_dir=)"


def room_problems(
    cfg: Mapping[str, Any], arch: Architecture, layout: Layout, config: TiedLoraConfig | None
) -> Iterator[str]:
    """Free room where the run writes, against all the checkpoints that it keeps, one in the making, and the `.nemo`."""
    folder = run_folder(cfg)
    precision = _precision(cfg)
    if folder is None or precision is None:
        return
    one = checkpoint_bytes(arch, layout, config, precision)
    kept = _checkpoints_kept(cfg) + 1
    result = one if config is None else largest_file(config, selected_linears(arch, config), precision.weights)
    needed = kept * one + result + _LOGS_BYTES
    free = shutil.disk_usage(_nearest_there(folder)).free
    if free < needed:
        yield (
            f"exp_manager: {folder}: {_size(free)} free, but {kept} checkpoints of {_size(one)} and the .nemo need "
            f"{_size(needed)}; free room, write elsewhere (exp_manager.exp_dir=), or keep fewer (save_top_k)"
        )


def time_problems(
    cfg: Mapping[str, Any], arch: Architecture, layout: Layout, config: TiedLoraConfig | None
) -> Iterator[str]:
    """The job's remaining time against the time that one save takes, roughly."""
    needed, left = seconds_to_save(cfg, arch, layout, config), _seconds_left(os.environ)
    if needed is not None and left is not None and left < needed:
        yield (
            f"SLURM's time limit: {left:.0f} s are left, but one save takes about {needed:.0f} s, so that nothing could "
            "be kept; ask for more with --time"
        )


def _nearest_there(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    place = path.resolve()
    while not os.path.exists(place):  # Path.exists() raises where a folder on the way cannot be entered
        place = place.parent
    return place


def seconds_to_save(
    cfg: Mapping[str, Any], arch: Architecture, layout: Layout, config: TiedLoraConfig | None
) -> float | None:
    """Of one checkpoint, roughly; None where the precision is not one."""
    precision = _precision(cfg)
    if precision is None:
        return None
    return _SAVE_OVERHEAD_S + checkpoint_bytes(arch, layout, config, precision) / _SAVED_BYTES_PER_SECOND


def _tasks_on_nodes(text: str) -> list[int]:
    """SLURM's "2(x3),1": 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _precision(cfg: Mapping[str, Any]) -> Precision | None:
    try:
        return Precision.from_names(cfg["trainer"].get("precision"), bool(cfg["model"].get("megatron_amp_O2")))
    except ConfigError:
        return None  # said elsewhere


def _checkpoints_kept(cfg: Mapping[str, Any]) -> int:
    """The best ones and the last."""
    manager = cfg.get("exp_manager") or {}
    if not manager.get("create_checkpoint_callback"):
        return 0
    best = (manager.get("checkpoint_callback_params") or {}).get("save_top_k", 1)
    if best == -1:  # all
        steps, every = cfg["trainer"].get("max_steps"), cfg["trainer"].get("val_check_interval")
        best = steps // every if isinstance(steps, int) and isinstance(every, int) and steps > 0 and every > 0 else 1
    return int(best) + 1


def _seconds_left(environment: Mapping[str, str]) -> float | None:
    """Until SLURM ends the job. squeue is asked where the environment does not say, by one rank: there may be thousands."""
    end = _number(environment.get("SLURM_JOB_END_TIME"))
    if end is not None:
        return end - time.time()
    job = environment.get("SLURM_JOB_ID")
    if job is None or environment.get("RANK", "0") != "0" or shutil.which("squeue") is None:
        return None
    try:
        asked = ["squeue", "--noheader", f"--jobs={job}", "--format=%L"]
        said = subprocess.run(asked, capture_output=True, text=True, timeout=_SQUEUE_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return _seconds(said.strip())


def _seconds(text: str) -> float | None:
    """SLURM's [days-][[hours:]minutes:]seconds; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)", text)
    if match is None:
        return None
    days, first, second, last = (int(part or 0) for part in match.groups())
    hours, minutes = (first, second) if match[3] is not None else (0, first)
    return ((days * 24 + hours) * 60 + minutes) * 60 + last


def _size(num_bytes: float) -> str:
    power = next((power for power in range(4) if num_bytes < 1024 ** (power + 1)), 4)
    return f"{num_bytes / 1024**power:.1f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
