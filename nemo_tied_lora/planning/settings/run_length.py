# SPDX-License-Identifier: Apache-2.0
"""Gives values that contradict the length of a run the meaning that was intended, and says so in a line for each.

NeMo repeats the data until it lasts for `trainer.max_steps` steps, plus 0.5% for the mixing of several files, and calls
that one epoch. So a run of NeMo's fine-tuning is one epoch, whatever the number of examples is. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_tied_lora.errors import is_whole_number
from nemo_tied_lora.planning.settings.lr_schedule import unread_keys
from nemo_tied_lora.planning.settings.monitor_checks import right_modes

__all__ = ["REMOVED", "Adjusted", "adjusted_run", "as_whole_number", "steps_of_epoch", "with_values"]


REMOVED = object()
"""In place of a value: the run's configuration has no such key."""


@dataclass
class Adjusted:
    """What a run changes in its configuration."""

    values: dict[str, Any] = field(default_factory=dict)
    """Dotted key to the value that is used."""
    lines: list[str] = field(default_factory=list)
    """What to print at the start, one line for each change that a user should know of."""

    def set(self, key: str, value: Any, line: str | None = None) -> None:
        """Uses another value for a key."""
        self.values[key] = value
        self.lines += [] if line is None else [line]


def adjusted_run(cfg: Mapping[str, Any]) -> Adjusted:
    """Returns what a training run changes. Leaves wrong values alone: the checks before the run report them.

    Args:
        cfg: the configuration of finetune or pretrain, as plain values. It is not changed.
    """
    found, trainer = Adjusted(), cfg.get("trainer") or {}
    steps = as_whole_number(trainer.get("max_steps"))
    if steps is not None and steps >= 1:
        if not is_whole_number(trainer["max_steps"]):
            found.set("trainer.max_steps", steps)
        _adjust_validation(trainer, steps, found)
        every = trainer.get("log_every_n_steps")
        if is_whole_number(every) and every > steps:
            line = (
                f"trainer.log_every_n_steps={every}: more than trainer.max_steps={steps}; logs once, at the last step"
            )
            found.set("trainer.log_every_n_steps", steps, line)
        _adjust_epochs(trainer, steps, found)
    _adjust_optimizer((cfg.get("model") or {}).get("optim"), found)
    _adjust_trainers_own(trainer, cfg.get("exp_manager") or {}, found)
    _adjust_checkpoints(cfg, found)
    return found


def steps_of_epoch(trainer: Mapping[str, Any], steps: int) -> int:
    """The number of steps after which Lightning begins another epoch; `steps` if the run is one epoch."""
    limit = trainer.get("limit_train_batches")
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        return steps
    if isinstance(limit, float) and limit <= 1:
        return min(steps, int(limit * steps)) if limit < 1 else steps
    return min(steps, int(limit))


def as_whole_number(value: object) -> int | None:
    """Returns 1000 for 1000, 1000.0, 1e3 and "1000"; None for what is not a whole number."""
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.isascii() and text.removeprefix("-").isdigit() else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if value == value and abs(value) < 1 << 53 and value == int(value) else None


def with_values(cfg: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the configuration with other values for some dotted keys. Copies only the sections it changes."""
    result = dict(cfg)
    for key, value in values.items():
        section, *names = result, *key.split(".")
        for name in names[:-1]:
            section[name] = dict(section.get(name) or {})
            section = section[name]
        if value is REMOVED:
            section.pop(names[-1], None)
        else:
            section[names[-1]] = value
    return result


def _adjust_validation(trainer: Mapping[str, Any], steps: int, found: Adjusted) -> None:
    """Validates at least once, in a run of one epoch. Lightning stops with a ValueError, or never validates."""
    key, every = "trainer.val_check_interval", trainer.get("val_check_interval", 1.0)
    if steps_of_epoch(trainer, steps) < steps:
        return
    off = trainer.get("limit_val_batches") in (0, 0.0) and trainer.get("limit_val_batches") is not False
    once = "validates once, after the last step"
    whole = None if isinstance(every, float) and every <= 1 else as_whole_number(every)
    if every is None or (isinstance(every, float) and every == 1):
        # Lightning's epoch can be longer than the run, and would then end without a validation.
        found.set(key, steps, None if off or every is None else f"{key}={every}: {once}, of trainer.max_steps={steps}")
    elif isinstance(every, float) and 0 < every < 1:
        part = max(1, int(every * steps))
        found.set(key, part, None if off else f"{key}={every}: a share of the run; validates every {part} steps")
    elif whole is not None and whole > steps:
        found.set(key, steps, None if off else f"{key}={every}: more than trainer.max_steps={steps}; {once}")
    elif whole is not None and whole >= 1 and not is_whole_number(every):
        found.set(key, whole)


def _adjust_epochs(trainer: Mapping[str, Any], steps: int, found: Adjusted) -> None:
    """Keeps exp_manager from comparing a null `check_val_every_n_epoch` with the number of epochs: a TypeError."""
    epochs, per_epoch = trainer.get("max_epochs"), steps_of_epoch(trainer, steps)
    if trainer.get("check_val_every_n_epoch", 1) is None and is_whole_number(epochs) and per_epoch * epochs >= steps:
        found.set("trainer.max_epochs", -1)


def _adjust_trainers_own(trainer: Mapping[str, Any], manager: Mapping[str, Any], found: Adjusted) -> None:
    """Switches off what exp_manager makes itself; it would stop with a LoggerMisconfigurationError."""
    loggers = any(value is True for key, value in manager.items() if key.startswith("create_") and "logger" in key)
    for key, made in (("logger", loggers), ("enable_checkpointing", manager.get("create_checkpoint_callback", True))):
        if trainer.get(key) is True and made:
            found.set(
                f"trainer.{key}", False, f"trainer.{key}=true: taken as false, because exp_manager makes its own"
            )


def _adjust_checkpoints(cfg: Mapping[str, Any], found: Adjusted) -> None:
    """Saves the last checkpoint without validations too, and keeps one rule for when to save: Lightning takes no two."""
    trainer, manager = cfg.get("trainer") or {}, cfg.get("exp_manager") or {}
    key, params = "exp_manager.checkpoint_callback_params", manager.get("checkpoint_callback_params") or {}
    rules = [params.get(name) for name in ("every_n_train_steps", "train_time_interval")]
    for mode_key, mode, line in right_modes(cfg):
        found.set(mode_key, mode, line)
    if not manager.get("create_checkpoint_callback", True):
        return
    if any(rules) and "every_n_epochs" not in params:
        found.set(f"{key}.every_n_epochs", None)  # NeMo's default is 1
    steps = as_whole_number(trainer.get("max_steps"))
    if steps is not None and steps >= 1 and params.get("save_last", True):
        _adjust_when_to_save(key, params, -(-steps // max(1, steps_of_epoch(trainer, steps))), steps, found)
    every = found.values.get("trainer.val_check_interval", trainer.get("val_check_interval"))
    if trainer.get("limit_val_batches") == 0 and not any(rules) and is_whole_number(every):
        found.set(f"{key}.every_n_epochs", None)
        line = f"trainer.limit_val_batches=0: no validation; the last checkpoint is written every {every} steps"
        lost = (
            "no best one, and no early stopping"
            if manager.get("create_early_stopping_callback")
            else "and no best one"
        )
        found.set(f"{key}.every_n_train_steps", every, f"{line}, {lost}")


def _adjust_when_to_save(key: str, params: Mapping[str, Any], epochs: int, steps: int, found: Adjusted) -> None:
    """Saves at least once before the end. Lightning counts the epochs, and NeMo's run is one epoch."""
    wanted = params.get("every_n_epochs")
    if is_whole_number(wanted) and wanted > epochs:
        line = f"{key}.every_n_epochs={wanted}: more than the run's epochs, {epochs}; saves after every validation"
        found.set(f"{key}.every_n_epochs", 1, line)
    wanted = params.get("every_n_train_steps")
    if is_whole_number(wanted) and wanted > steps:
        found.lines.append(
            f"{key}.every_n_train_steps={wanted}: more than trainer.max_steps={steps}; saves once, at the end"
        )


def _adjust_optimizer(optim: Any, found: Adjusted) -> None:
    """Leaves out keys of the shipped optimizer and schedule that another one does not have, if they ask for nothing."""
    if not isinstance(optim, Mapping):
        return
    if optim.get("name") == "sgd" and "betas" in optim:
        found.set("model.optim.betas", REMOVED, "model.optim.betas: not used, because sgd has none")
    if isinstance(optim.get("sched"), Mapping):
        sched = optim["sched"]
        for name in ("warmup_steps", "constant_steps", "hold_steps", "max_steps"):
            whole = as_whole_number(sched.get(name))
            if whole is not None and not isinstance(sched[name], int):  # 1e3, or a text
                found.set(f"model.optim.sched.{name}", whole)
        unread = [name for name in unread_keys(sched) if sched[name] in (None, 0)]
        for name in [*unread, *(["min_lr"] if "min_lr" in sched and sched["min_lr"] is None else [])]:
            found.set(f"model.optim.sched.{name}", REMOVED)
