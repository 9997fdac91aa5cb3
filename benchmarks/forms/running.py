# SPDX-License-Identifier: Apache-2.0
"""Runs a plan: several workers, each a process with the base in memory, until all is done or time is up."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
import traceback
from pathlib import Path
from statistics import mean

from nemo_tied_lora.commands.study.claims import claim
from nemo_tied_lora.commands.study.plan import Study
from nemo_tied_lora.commands.study.results import Results, read_results, write_result
from nemo_tied_lora.commands.study.task_files import prepare_task
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.tables import duration

from .cells import Cell
from .plan import Plan, read_plan
from .schedule import Schedule, schedule
from .sizes import Sizes

__all__ = ["check_model", "outlook", "run", "study_of_items"]

_MEMORY = {
    # One thread each, whatever the machine has: two runs at a time are faster than one with two threads.
    "OMP_NUM_THREADS": "1",
    # glibc gives large blocks back to the system after each use, and a new page costs more than the sum that fills it.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def study_of_items(folder: str | None = None) -> Study:
    """The study whose items and limits are used: `configs/study/paper_claim.yaml`.

    Args:
        folder: where its tasks' files are, or are made; None: the study's own.
    """
    words = ["study=paper_claim", *([f"folder={folder}"] if folder else [])]
    return Study.from_config(plain(compose_config("compare", words)))


def check_model(plan: Plan, folder: Path) -> None:
    """Checks that the folder holds a base of the plan's sizes.

    Raises:
        ConfigError: names what is missing or differs.
    """
    names = ("config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json")
    missing = [name for name in names if not any(folder.glob(name))]
    remedy = f"make it with: python -m benchmarks.forms base {folder}"
    if missing:
        raise ConfigError([f"--model {folder}: has no {', '.join(missing)}; {remedy}"])
    found = Sizes.of(folder)
    if found != plan.sizes:
        raise ConfigError([f"--model {folder}: has {found}, the plan's base has {plan.sizes}; {remedy}"])


def run(plan_path: Path, model: Path, results: Path, *, workers: int, minutes: float | None, data: str | None) -> int:
    """Does the runs of a plan that have no result. Returns the exit code: 0, or 1 if runs failed.

    Args:
        results: the folder of the results.
        workers: processes; each does one run at a time.
        minutes: start no further run after this time.
        data: the folder of the tasks' files.
    """
    check_model(read_plan(plan_path), model)
    results.mkdir(parents=True, exist_ok=True)
    os.environ.update(_MEMORY)  # read when a process starts, so before spawn
    until = None if minutes is None else time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(plan_path, model, results, until, data, workers), name=f"worker {number}")
        for number in range(workers)
    ]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends the workers too, as Ctrl-C does
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            if process.is_alive():
                process.terminate()
        raise
    return 0 if all(process.exitcode == 0 for process in processes) else 1


def outlook(plan: Plan, results: Results, workers: int) -> str:
    """How many runs are done, and how long the others take."""
    found = schedule(plan, results.losses())
    total = len(found.cells) + found.waiting
    done = sum(one.key in results.by_key for one in found.cells)
    seconds = _seconds_left(found, results)
    left = "" if seconds is None else f", about {duration(seconds / workers)} left on {workers} free cores"
    return f"{done} of {total} runs{left}"


def _seconds_left(found: Schedule, results: Results) -> float | None:
    """CPU seconds: as long for each training step as the runs on the same task took, else as all runs. None: there is none."""
    rates: dict[str, list[float]] = {}
    for one in results.by_key.values():
        settings = one.values["settings"]
        if settings["form"] is not None:
            rates.setdefault(settings["task"], []).append(one.values["cpu_seconds"] / settings["steps"])
    if not rates:
        return None
    overall = mean(rate for its in rates.values() for rate in its)
    left = [one.settings for one in found.cells if one.key not in results.by_key and one.settings["form"] is not None]
    steps = [settings["steps"] for settings in left]
    each = [mean(rates.get(settings["task"], [overall])) for settings in left]
    waiting = found.waiting * overall * (mean(steps) if steps else 0)
    return sum(a * b for a, b in zip(steps, each, strict=True)) + waiting


def _work(plan_path: Path, model: Path, results: Path, until: float | None, data: str | None, workers: int) -> None:
    """One worker: the next run that nobody has done or is doing, again and again."""
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # nothing is lost: a result is written whole or not at all
    import torch

    from .one_run import Bench

    torch.set_num_threads(1)
    plan, study = read_plan(plan_path), study_of_items(data)
    # The study's files, so that items are those of `tied-lora compare`.
    bench = Bench(model, _fingerprint(model), lambda task: prepare_task(study, study.task(task)))
    claims = Path(study.folder, "forms")
    failed: set[str] = set()
    while until is None or time.monotonic() < until:
        left = [one for one in _left(plan, results) if one.key not in failed]
        if not left or not any(_do(bench, plan, one, results, claims, failed, workers) for one in left):
            if not left or len(failed) >= len(left):
                break
            time.sleep(5)  # others do what is left; their results may decide more
    raise SystemExit(1 if failed else 0)


def _left(plan: Plan, results: Path) -> list[Cell]:
    found = read_results(results)
    return [one for one in schedule(plan, found.losses()).cells if one.key not in found.by_key]


def _do(bench: object, plan: Plan, one: Cell, results: Path, claims: Path, failed: set[str], workers: int) -> bool:
    """Does a run unless another process does it. Says whether it did."""
    from .one_run import Bench

    assert isinstance(bench, Bench)
    with claim(claims / one.key) as descriptor:
        if descriptor is None or one.key in read_results(results).by_key:
            return False
        began, cpu = time.monotonic(), time.process_time()
        try:
            write_result(results, one, bench.result(one))  # type: ignore[arg-type]
        except Exception as error:
            failed.add(one.key)
            traceback.print_exc()
            print(f"{one.label}: failed with {type(error).__name__}: {error}", flush=True)
            return True
        found = read_results(results)
        loss = found.by_key[one.key].loss
        took = f"{duration(time.monotonic() - began)} ({time.process_time() - cpu:.0f} CPU seconds)"
        print(f"{one.label}: loss {loss:.4f} in {took}; {outlook(plan, found, workers)}", flush=True)
    return True


def _fingerprint(model: Path) -> str:
    """The beginning of the SHA-256 of the weights' files."""
    found = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                found.update(block)
    return found.hexdigest()[:32]
