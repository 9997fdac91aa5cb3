# SPDX-License-Identifier: Apache-2.0
"""Checks the numbers of a training run's steps, epochs, validations and rates against each other. Needs no torch.

What has a sensible meaning is adjusted by `run_length`, and `run_lines` says so. The rest is refused here, before the
base is loaded: Lightning and NeMo would fail after that, or would silently do something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_tied_lora.errors import Problems, is_number, is_whole_number
from nemo_tied_lora.planning.settings.lr_schedule import (
    optimizer_problems,
    schedule_lines,
    schedule_problems,
)
from nemo_tied_lora.planning.settings.run_length import adjusted_run, as_whole_number, steps_of_epoch, with_values

__all__ = ["run_lines", "run_problems"]

# Lightning's DD:HH:MM:SS.
_TIME = re.compile(r"\d+:\d\d:\d\d:\d\d")
_NEVER = "to validate never, set trainer.limit_val_batches=0"


def run_problems(cfg: Mapping[str, Any]) -> Problems:
    """Checks the sections `trainer` and `model.optim` of finetune or pretrain."""
    cfg = with_values(cfg, adjusted_run(cfg).values)
    trainer, optim = cfg["trainer"], cfg["model"].get("optim")
    problems = Problems([*_length_problems(trainer), *_validation_problems(trainer), *_trainer_problems(trainer)])
    problems += _time_problems("exp_manager.max_time_per_run", (cfg.get("exp_manager") or {}).get("max_time_per_run"))
    if isinstance(optim, Mapping):
        steps = trainer.get("max_steps")
        problems += [*optimizer_problems(optim), *schedule_problems(optim, steps if is_whole_number(steps) else None)]
    return problems


def run_lines(cfg: Mapping[str, Any]) -> list[str]:
    """What a run adjusts, and what it does with its numbers that a user may not expect. `cfg` has no problems."""
    adjusted = adjusted_run(cfg)
    cfg = with_values(cfg, adjusted.values)
    trainer, lines = cfg["trainer"], adjusted.lines
    steps, epochs = trainer["max_steps"], trainer.get("max_epochs")
    per_epoch = steps_of_epoch(trainer, steps)
    if is_whole_number(epochs) and per_epoch * epochs < steps:
        lines.append(
            f"trainer.max_epochs={epochs}: the run ends after {per_epoch * epochs} of trainer.max_steps={steps} steps"
        )
    elif is_whole_number(epochs) and epochs not in (1, 9999) and per_epoch == steps:
        lines.append(
            f"trainer.max_epochs={epochs}: has no effect; NeMo's epoch is the whole run of trainer.max_steps={steps}"
        )
    return [*lines, *schedule_lines(cfg["model"].get("optim") or {}, steps)]


def _length_problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    steps, least = trainer.get("max_steps"), trainer.get("min_steps")
    if not is_whole_number(steps):
        why = "NeMo's data and learning rate need the number of steps"
        yield f"trainer.max_steps={_shown(steps)}: must be a whole number of at least 1; {why}"
    epochs = trainer.get("max_epochs")
    if epochs is not None and not (is_whole_number(epochs) or (is_whole_number(epochs, -1) and epochs == -1)):
        yield f"trainer.max_epochs={epochs!r}: must be a whole number of at least 1; -1 or null: no limit"
    if least is not None and not is_whole_number(least, 0):
        yield f"trainer.min_steps={least!r}: must be a whole number of at least 0"
    elif least is not None and is_whole_number(steps) and least > steps:
        yield f"trainer.min_steps={least}: more than trainer.max_steps={steps}; lower it"
    if not isinstance(trainer.get("max_time"), Mapping):  # Lightning also takes {hours: 4}
        yield from _time_problems("trainer.max_time", trainer.get("max_time"))


def _time_problems(key: str, time: object) -> Iterator[str]:
    """Checks a limit of time. Without quotes, YAML reads 4:00:00 as a number of seconds."""
    if time is not None and not (
        isinstance(time, str) and _TIME.fullmatch(time.strip()) and re.search(r"[1-9]", time)
    ):
        yield f"{key}={time!r}: must be days:hours:minutes:seconds, more than 0, as '00:04:00:00' (in a YAML with the quotes)"


def _validation_problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Checks when the run validates."""
    every, steps = trainer.get("val_check_interval", 1.0), trainer.get("max_steps")
    share = isinstance(every, float) and 0 < every <= 1
    number = as_whole_number(every)
    if every is not None and not share and (number is None or number < 1):
        yield (
            f"trainer.val_check_interval={every!r}: must be a whole number of steps of at least 1, or a share of the run "
            f"above 0 and up to 1.0; {_NEVER}"
        )
    epochs = trainer.get("check_val_every_n_epoch", 1)
    if epochs is not None and not is_whole_number(epochs):
        yield f"trainer.check_val_every_n_epoch={epochs!r}: must be a whole number of at least 1, or null"
        return
    if not is_whole_number(steps):
        return
    per_epoch = steps_of_epoch(trainer, steps)
    if epochs is not None and epochs > 1 and epochs > steps // max(per_epoch, 1):
        fix = "remove it, and set trainer.val_check_interval; or set trainer.limit_val_batches=0"
        yield f"trainer.check_val_every_n_epoch={epochs}: the run has fewer epochs, so it would never validate; {fix}"
    most = trainer.get("max_epochs")
    if epochs is None and is_whole_number(most) and per_epoch * most < steps:
        yield (
            f"trainer.check_val_every_n_epoch=null: not possible with trainer.max_epochs={most}, which NeMo compares it with; "
            f"set max_epochs=-1 and trainer.max_steps={per_epoch * most}"
        )
    if per_epoch < steps and epochs is not None and number is not None and not share and number > per_epoch > 0:
        yield (
            f"trainer.val_check_interval={every}: more than the {per_epoch} steps of an epoch, by "
            f"trainer.limit_train_batches={trainer['limit_train_batches']}; lower it, or write "
            "+trainer.check_val_every_n_epoch=null to count the steps of all epochs"
        )


def _trainer_problems(trainer: Mapping[str, Any]) -> Iterator[str]:
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"):
        value = trainer.get(name)
        if value is not None and not _is_limit(value):
            yield f"trainer.{name}={value!r}: must be a share from 0.0 to 1.0, or a whole number of batches"
    steps = trainer.get("max_steps")
    none_left = is_whole_number(steps) and steps_of_epoch(trainer, steps) == 0
    if _is_limit(trainer.get("limit_train_batches")) and none_left:
        yield f"trainer.limit_train_batches={trainer['limit_train_batches']}: leaves no batch to train on; raise it"
    accumulated = trainer.get("accumulate_grad_batches", 1)
    if accumulated not in (1, None) or isinstance(accumulated, bool):
        fix = "set model.global_batch_size, which model.micro_batch_size divides"
        yield f"trainer.accumulate_grad_batches={accumulated!r}: must be 1, because NeMo accumulates itself; {fix}"
    clip = trainer.get("gradient_clip_val")
    if clip is not None and not (is_number(clip) and clip >= 0):
        yield f"trainer.gradient_clip_val={clip!r}: must be a number of at least 0; 0 or null: no clipping"
    for name, least in (("log_every_n_steps", 0), ("num_sanity_val_steps", -1)):
        value = trainer.get(name)
        if value is not None and not is_whole_number(value, least):
            yield f"trainer.{name}={value!r}: must be a whole number of at least {least}"
    if trainer.get("fast_dev_run"):
        yield (
            f"trainer.fast_dev_run={_shown(trainer['fast_dev_run'])}: not possible, because it switches the run's folder "
            "off; trainer.max_steps=2 is a short run"
        )


def _is_limit(value: object) -> bool:
    """Whether Lightning reads the value as a share or a number of batches."""
    return is_number(value) and value >= 0 and (value <= 1 or value == int(value))


def _shown(value: object) -> str:
    """A value as YAML shows it."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
