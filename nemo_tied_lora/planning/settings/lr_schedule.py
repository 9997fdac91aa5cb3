# SPDX-License-Identifier: Apache-2.0
"""Checks the optimizer and the schedule of the learning rate before a run, and explains what the schedule will do.

The schedules are NeMo's (`nemo.core.optim.lr_scheduler`, NeMo 2.4). Step k of a run has the schedule's rate at k - 1.
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nemo_tied_lora.errors import is_number, is_whole_number

__all__ = ["optimizer_problems", "schedule_lines", "schedule_problems", "unread_keys"]

_WARMUP = ("warmup_steps", "warmup_ratio", "min_lr", "last_epoch")
_HOLD = (*_WARMUP, "hold_steps", "hold_ratio")
_SCHEDULES: dict[str, tuple[str, ...]] = {
    "CosineAnnealing": (*_WARMUP, "constant_steps", "constant_ratio"),
    "WarmupPolicy": _WARMUP,
    "WarmupHoldPolicy": _HOLD,
    "WarmupAnnealing": _WARMUP,
    "SquareAnnealing": _WARMUP,
    "SquareRootAnnealing": _WARMUP,
    "InverseSquareRootAnnealing": _WARMUP,
    "T5InverseSquareRootAnnealing": ("constant_steps", "constant_ratio", "min_lr", "last_epoch"),
    "NoamAnnealing": (*_WARMUP, "d_model"),
    "NoamHoldAnnealing": (*_HOLD, "decay_rate"),
    "PolynomialDecayAnnealing": (*_WARMUP, "power", "cycle"),
    "PolynomialHoldDecayAnnealing": (*_HOLD, "power", "cycle"),
    "StepLR": ("step_size", "gamma", "last_epoch"),
    "CyclicLR": (
        *("base_lr", "max_lr", "step_size_up", "step_size_down", "mode", "gamma", "scale_fn", "scale_mode"),
        *("cycle_momentum", "base_momentum", "max_momentum", "last_epoch"),
    ),
}
"""NeMo's name of a schedule to the keys that it reads."""
_PER_EPOCH = ("ExponentialLR", "ReduceLROnPlateau")
# NeMo takes these out before it builds the schedule.
_ALWAYS = ("name", "monitor", "reduce_on_plateau", "max_steps", "iters_per_batch", "t_max_epochs")
_ALWAYS_T = ("t_accumulate_grad_batches", "t_limit_train_batches", "t_num_workers")
_NEEDED = {"NoamAnnealing": "d_model", "StepLR": "step_size", "CyclicLR": "max_lr"}
_KEY = "model.optim.sched"


def optimizer_problems(optim: Mapping[str, Any]) -> Iterator[str]:
    """Yields one line per number of the section `model.optim` that no optimizer can use."""
    rate = optim.get("lr")
    if not is_number(rate):
        yield f"model.optim.lr={rate!r}: must be a number above 0, as 1e-4"
    elif rate == 0:
        yield "model.optim.lr=0: the run would train nothing; set it above 0"
    elif rate < 0:
        yield f"model.optim.lr={rate}: must be greater than 0"
    for name in ("weight_decay", "momentum", "eps"):
        value = optim.get(name)
        if value is not None and not (is_number(value) and value >= 0):
            yield f"model.optim.{name}={value!r}: must be a number of at least 0"
    betas = optim.get("betas")
    if betas is not None:
        pair = isinstance(betas, (list, tuple)) and len(betas) == 2
        if not (pair and all(is_number(beta) and 0 <= beta < 1 for beta in betas)):
            yield f"model.optim.betas={betas!r}: must be two numbers of at least 0 and below 1"


def schedule_problems(optim: Mapping[str, Any], max_steps: int | None) -> Iterator[str]:
    """Yields one line per part of `model.optim.sched` that contradicts another, the learning rate, or the run's length.

    Args:
        max_steps: the run's; None if that is wrong itself.
    """
    if "sched" not in optim:
        return
    sched = optim["sched"]
    if not isinstance(sched, Mapping):
        yield f"{_KEY}={sched!r}: must be a section of keys; write ~{_KEY} for a constant learning rate"
        return
    if "args" in sched or "_target_" in sched:
        return  # NeMo's other forms, which name the class themselves
    yield from _name_problems(sched)
    yield from _number_problems(sched)
    for first, second in (
        ("warmup_steps", "warmup_ratio"),
        ("constant_steps", "constant_ratio"),
        ("hold_steps", "hold_ratio"),
    ):
        if sched.get(first) is not None and sched.get(second) is not None:
            yield f"{_KEY}.{second}={sched[second]}: {first}={sched[first]} is set too; add {_KEY}.{first}=null"
    yield from _rate_problems(sched, optim.get("lr"))
    total = sched.get("max_steps") or max_steps
    if is_whole_number(total):
        yield from _length_problems(sched, total)


def schedule_lines(optim: Mapping[str, Any], max_steps: int) -> Iterator[str]:
    """Yields what a user should know of a schedule that has no problems."""
    sched, rate = optim.get("sched"), optim.get("lr")
    if not isinstance(sched, Mapping) or "args" in sched or "_target_" in sched or not is_number(rate):
        return
    total = sched.get("max_steps") or max_steps
    warmup, constant = _steps(sched, "warmup", total), _steps(sched, "constant", total)
    least = sched.get("min_lr") or 0
    if sched.get("name") == "CosineAnnealing" and constant:
        if warmup:
            yield f"{_KEY}.constant_steps={constant}: NeMo's warmup then starts at 0, so step 1 changes nothing"
        if warmup + constant == total:
            yield f"{_KEY}: after {warmup} steps of warmup, all others have min_lr={least:g}; nothing is left to decay"
    elif warmup >= max_steps:
        last = rate * max_steps / (warmup + 1)
        reached = f"the learning rate only reaches {last:.3g} of model.optim.lr={rate:g}"
        yield f"{_KEY}.warmup_steps={warmup}: not less than trainer.max_steps={max_steps}; {reached}"
    if sched.get("name") == "T5InverseSquareRootAnnealing":
        yield f"{_KEY}.name={sched['name']}: does not read model.optim.lr={rate:g}; step k has 1 / sqrt(k), or less at first"
    hold = _steps(sched, "hold", total)
    if hold and warmup < max_steps <= warmup + hold:
        yield f"{_KEY}: warmup and hold last for {warmup + hold} of {max_steps} steps; the learning rate never falls"
    if total < max_steps:
        yield f"{_KEY}.max_steps={total}: less than trainer.max_steps={max_steps}; the other steps have min_lr={least:g}"


def unread_keys(sched: Mapping[str, Any]) -> list[str]:
    """The keys that the schedule of this name does not read; NeMo would fail with a TypeError. Empty for unknown names."""
    known = _SCHEDULES.get(str(sched.get("name")))
    if known is None or "args" in sched or "_target_" in sched:
        return []
    return [key for key in sched if key not in (*known, *_ALWAYS, *_ALWAYS_T)]


def _name_problems(sched: Mapping[str, Any]) -> Iterator[str]:
    name = str(sched.get("name"))
    if name in _PER_EPOCH:
        yield (
            f"{_KEY}.name={name}: changes the learning rate after each epoch, but the run is one epoch; "
            f"choose one of {', '.join(_SCHEDULES)}"
        )
    elif name not in _SCHEDULES:
        yield f"{_KEY}.name={name}: unknown; choose one of {', '.join(_SCHEDULES)}"
    for key in unread_keys(sched):
        if sched[key] not in (None, 0):
            yield f"{_KEY}.{key}={sched[key]}: {name} has no such key; write ~{_KEY}.{key}"
    needed = _NEEDED.get(name)
    if needed is not None and sched.get(needed) is None:
        yield f"{_KEY}.{needed}: missing; {name} needs it (write +{_KEY}.{needed}=...)"
    if name == "NoamHoldAnnealing" and not _steps(sched, "warmup", 1 << 30):
        yield f"{_KEY}.warmup_steps=0: {name} needs at least 1"
    if name == "T5InverseSquareRootAnnealing" and not is_whole_number(sched.get("constant_steps")):
        yield f"{_KEY}.constant_steps={sched.get('constant_steps')}: {name} needs at least 1"


def _number_problems(sched: Mapping[str, Any]) -> Iterator[str]:
    for key in ("warmup_steps", "constant_steps", "hold_steps"):
        if sched.get(key) is not None and not is_whole_number(sched[key], 0):
            yield f"{_KEY}.{key}={sched[key]!r}: must be a whole number of at least 0"
    for key in ("warmup_ratio", "constant_ratio", "hold_ratio"):
        value = sched.get(key)
        if value is not None and not (is_number(value) and 0 <= value <= 1):
            yield f"{_KEY}.{key}={value!r}: must be a number from 0 to 1, the share of the steps"
    if sched.get("max_steps") is not None and not is_whole_number(sched["max_steps"]):
        yield f"{_KEY}.max_steps={sched['max_steps']!r}: must be a whole number of at least 1; null: trainer.max_steps"


def _rate_problems(sched: Mapping[str, Any], rate: object) -> Iterator[str]:
    """Compares min_lr with lr."""
    least = sched.get("min_lr")
    if least is None:
        return
    if not (is_number(least) and least >= 0):
        yield f"{_KEY}.min_lr={least!r}: must be a number of at least 0"
    elif is_number(rate) and rate > 0:
        bound = f"model.optim.lr={rate:g}"
        if least > rate:
            yield f"{_KEY}.min_lr={least:g}: more than {bound}, from which it is reached; lower it"
        elif least == rate and sched.get("name") == "CosineAnnealing" and sched.get("constant_steps"):
            yield f"{_KEY}.min_lr={least:g}: must be less than {bound}, if constant_steps is set; lower it"


def _length_problems(sched: Mapping[str, Any], total: int) -> Iterator[str]:
    """NeMo's constant_steps are the last ones, at min_lr: with too many, the rate falls to min_lr after the warmup."""
    warmup, constant = _steps(sched, "warmup", total), _steps(sched, "constant", total)
    if sched.get("name") != "CosineAnnealing" or not constant:
        return
    if warmup + constant > total or (warmup == 0 and constant == total):
        fits = f"at most {max(0, total - warmup - 1)} fit" if warmup < total - 1 else "set it to 0"
        yield (
            f"{_KEY}: warmup_steps={warmup} and constant_steps={constant} leave no step of max_steps={total} to decay; "
            f"constant_steps are the last ones, at min_lr; {fits}"
        )


def _steps(sched: Mapping[str, Any], name: str, total: object) -> int:
    """`name`_steps, or `name`_ratio as a number of steps. 0 for wrong values."""
    steps, ratio = sched.get(f"{name}_steps"), sched.get(f"{name}_ratio")
    if steps is not None:
        return steps if is_whole_number(steps, 0) else 0
    return int(ratio * total) if is_number(ratio) and 0 <= ratio <= 1 and is_whole_number(total) else 0
