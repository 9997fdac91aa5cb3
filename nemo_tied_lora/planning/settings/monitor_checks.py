# SPDX-License-Identifier: Apache-2.0
"""Checks which number the checkpoints and early stopping watch: it must be logged, and is better in one direction.

Lightning looks for the number after the first validation, and fails then. With the wrong direction it keeps the worst
checkpoint, so the direction is put right. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_tied_lora.errors import is_number, is_whole_number

__all__ = ["logged_names", "monitor_problems", "right_modes"]

_OF_TRAINING = (
    *("reduced_train_loss", "lr", "grad_norm", "global_step", "consumed_samples", "loss_scale", "global_batch_size"),
    *("step_seconds", "tokens_per_second", "train_step_timing in s", "epoch", "step", "max_memory_reserved"),
    *("max_memory_allocated", "seq_length_padded", "tokens_avg"),
)
_LOWER_IS_BETTER = ("loss",)
_HIGHER_IS_BETTER = ("exact_string_match", "rouge", "token_f1")
_CHECKPOINTS, _STOPPING = "exp_manager.checkpoint_callback_params", "exp_manager.early_stopping_callback_params"
_TRIGGERS = ("every_n_train_steps", "every_n_epochs", "train_time_interval")


def monitor_problems(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Yields one line per problem of the two sections of `exp_manager`, if their callbacks are switched on."""
    manager = cfg.get("exp_manager") or {}
    names = logged_names((cfg["model"].get("data") or {}).get("validation_ds") or {})
    params = manager.get("checkpoint_callback_params") or {}
    if manager.get("create_checkpoint_callback", True):
        yield from _watched(_CHECKPOINTS, params.get("monitor", "val_loss"), params.get("mode", "min"), names)
        best = params.get("save_top_k", 3)
        if not is_whole_number(best, -1):
            yield f"{_CHECKPOINTS}.save_top_k={best!r}: must be a whole number of at least -1; -1: all"
        used = [name for name in _TRIGGERS[:2] if params.get(name) not in (None, 0)]
        for name in used:
            if not is_whole_number(params[name]):
                yield f"{_CHECKPOINTS}.{name}={params[name]!r}: must be a whole number of at least 0"
        if params.get(_TRIGGERS[2]) is not None:
            why = "NeMo cannot take it from a configuration"
            yield f"{_CHECKPOINTS}.{_TRIGGERS[2]}={params[_TRIGGERS[2]]}: {why}; set every_n_train_steps instead"
        if len(used) > 1:
            yield f"{_CHECKPOINTS}: {', '.join(used)}: Lightning takes only one of them; set the others to null"
    stopping = manager.get("early_stopping_callback_params") or {}
    if manager.get("create_early_stopping_callback"):
        yield from _watched(_STOPPING, stopping.get("monitor", "val_loss"), stopping.get("mode", "min"), names)
        if not is_whole_number(stopping.get("patience", 10), 1):
            yield f"{_STOPPING}.patience={stopping['patience']!r}: must be a whole number of at least 1, of validations"
        if not (is_number(stopping.get("min_delta", 0.001)) and stopping.get("min_delta", 0.001) >= 0):
            yield f"{_STOPPING}.min_delta={stopping['min_delta']!r}: must be a number of at least 0"


def right_modes(cfg: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields (key, min or max, a line that says so) for each stated mode that takes the worst for the best."""
    manager = cfg.get("exp_manager") or {}
    for section, switch in (
        (_CHECKPOINTS, "create_checkpoint_callback"),
        (_STOPPING, "create_early_stopping_callback"),
    ):
        params = manager.get(section.partition(".")[2]) or {}
        monitor, mode = params.get("monitor", "val_loss"), params.get("mode", "min")
        best = _better(str(monitor))
        if manager.get(switch) and best is not None and mode in ("min", "max") and mode != best:
            why = f"{monitor} is better when it is {'lower' if best == 'min' else 'higher'}"
            yield f"{section}.mode", best, f"{section}.mode={mode}: taken as {best}, because {why}"


def logged_names(validation: Mapping[str, Any]) -> list[str]:
    """The numbers that a run logs: those of its validation first.

    Args:
        validation: the section `model.data.validation_ds`.
    """
    section, own = validation.get("metric"), validation.get("names")
    metric = section.get("name") if isinstance(section, Mapping) else "exact_string_match"
    files = validation.get("file_names")
    sets = [own] if isinstance(own, str) else own if isinstance(own, list) else None
    if sets is None:
        sets = [f"dataloader{number}" for number in range(len(files) if isinstance(files, list) else 1)]
    kinds = ["loss"] if metric == "loss" else ["loss", str(metric)]
    single = ["validation_loss", "val_loss", *(f"validation_{kind}" for kind in kinds[1:])]
    several = [f"validation_{kind}_{name}" for kind in kinds for name in sets]
    scores = [f"validation_rouge_{name}_{score}" for name in sets for score in _ROUGE] if metric == "rouge" else []
    return [*single, *several, *scores, *_OF_TRAINING]


_ROUGE = [f"rouge{kind}_{part}" for kind in ("1", "2", "L", "Lsum") for part in ("fmeasure", "precision", "recall")]


def _watched(section: str, monitor: Any, mode: Any, names: list[str]) -> Iterator[str]:
    if monitor not in names:
        yield f"{section}.monitor={monitor}: this run logs no such number; choose one of {', '.join(names[:4])}, ..."
    if mode not in ("min", "max"):
        yield f"{section}.mode={mode}: unknown; choose one of min, max"


def _better(monitor: str) -> str | None:
    """min or max; None if neither is known to be better."""
    if monitor == "reduced_train_loss" or monitor == "val_loss":
        return "min"
    kind = monitor.removeprefix("validation_") if monitor.startswith("validation_") else ""
    if kind.startswith(_LOWER_IS_BETTER):
        return "min"
    return "max" if kind.startswith(_HIGHER_IS_BETTER) else None
