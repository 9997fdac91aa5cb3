# SPDX-License-Identifier: Apache-2.0
"""`tied-lora compare`: methods on tasks with several seeds, each run once, and a page with verdicts."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_tied_lora.commands.local_command import check_paths, run_composed
from nemo_tied_lora.commands.study.plan import Study, left_out_pairs
from nemo_tied_lora.errors import ConfigError, Problems, report
from nemo_tied_lora.files import folder_problem
from nemo_tied_lora.planning.base_config import usable_base
from nemo_tied_lora.planning.settings.base_quantization import quantization_problems

__all__ = ["SUMMARY", "main"]

SUMMARY = "compare methods on tasks with several seeds, and write a page with verdicts"

_EXAMPLES = """  tied-lora compare
  tied-lora compare methods.tl6.seeds=5 ~methods.vera
  tied-lora compare study=paper_claim minutes=90
  tied-lora compare study=paper_claim list=true
  tied-lora compare study=paper_claim page=docs/study.md
"""
_OLD_KEYS = {
    "presets": "is now the section methods; ~methods.NAME leaves one out",
    "seeds": "is now methods.NAME.seeds, a number",
    "steps": "is now tasks.NAME.steps",
    "learning_rates": "is now methods.NAME.rates, a list",
    "base_folder": "is now base.path, the base's .nemo",
    "overrides": "is now training.overrides",
}
"""Keys of this command before it ran studies."""
_UNPACKED = 2.2
"""The disk space of a run, in sizes of the base's file: NeMo unpacks it, and checkpoints and predictions are small."""


def main(argv: list[str]) -> int:
    """Returns 0, 1 if a run failed, or 2 if the study is refused. A run that is done is never done again."""
    old = [f"{word}: {_OLD_KEYS[key]}" for word in argv if (key := _first_key(word)) in _OLD_KEYS]
    if old:
        return report("compare", ConfigError(old))
    return run_composed("compare", argv, _compare, summary=SUMMARY, examples=_EXAMPLES, groups=("study",))


def _first_key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~").partition(".")[0]


def _compare(cfg: dict[str, Any]) -> int:
    problems = Problems()
    _check_keys(problems, cfg)
    study = problems.build(Study.from_config, cfg)
    for line in left_out_pairs(study):
        print(f"note: {line}", file=sys.stderr)
    if cfg["page"] is not None:
        return _write_page(study, Path(cfg["page"]), f"tied-lora compare study={study.name} page={cfg['page']}")
    if cfg["list"]:
        return _list(study, cfg["at_once"])
    return _run(study, cfg)


def _check_keys(problems: Problems, cfg: Mapping[str, Any]) -> None:
    problems.attempt(check_paths, cfg, "folder", "results", "page")
    problems.whole_number("at_once", cfg["at_once"])
    problems.flag("list", cfg["list"])
    problems.flag("keep_adapters", cfg["keep_adapters"])
    if cfg["limit"] is not None:
        problems.whole_number("limit", cfg["limit"])
    minutes = cfg["minutes"]
    if minutes is not None and (
        isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < math.inf
    ):
        problems.append(f"minutes={minutes!r}: must be a positive number, or null for no limit")
    page = Path(str(cfg["page"]))
    if cfg["page"] is not None and page.suffix != ".md":
        problems.append(f"page={page}: must end in .md; its .json and .png go beside it")
    elif cfg["page"] is not None and (problem := folder_problem(page.parent)):
        problems.append(f"page={page}: its folder {problem}")


def _write_page(study: Study, page: Path, command: str) -> int:
    from nemo_tied_lora.commands.study.page import write_page
    from nemo_tied_lora.commands.study.results import read_results

    files = write_page(page, study, read_results(Path(study.results)), command)
    print(f"written: {', '.join(map(str, files))}")
    return 0


def _list(study: Study, at_once: int) -> int:
    from nemo_tied_lora.commands.study.listing import listing
    from nemo_tied_lora.commands.study.one_run import folder_of
    from nemo_tied_lora.commands.study.results import read_results

    print(listing(study, read_results(Path(study.results)), lambda cell: folder_of(study, cell), at_once))
    return 0


def _run(study: Study, cfg: Mapping[str, Any]) -> int:
    from nemo_tied_lora.commands.study.commands import Commands
    from nemo_tied_lora.commands.study.one_run import folder_of, run_cell
    from nemo_tied_lora.commands.study.results import read_results
    from nemo_tied_lora.commands.study.running import run_study
    from nemo_tied_lora.commands.study.task_files import check_tasks, prepare_tasks

    problems = Problems()
    problems.attempt(read_results, Path(study.results))
    problems.attempt(check_tasks, study)
    _check_quantization(problems, study)
    for key, place in (("folder", study.folder), ("results", study.results)):
        problem = folder_problem(Path(place))
        problems += [f"{key}={place}: {problem}"] if problem else []
    _check_base(problems, study, cfg["at_once"])
    problems.raise_if_any()
    files = prepare_tasks(study)
    _check_data(study, {name: found.checksums for name, found in files.items()})
    commands = Commands(max(1, (os.cpu_count() or 1) // cfg["at_once"]))
    with _stopped_by_sigterm():
        outcome = run_study(
            study,
            lambda cell: folder_of(study, cell),
            lambda cell, claim: run_cell(study, cell, files[cell.task], commands, claim, cfg["keep_adapters"]),
            commands.stop,
            at_once=cfg["at_once"],
            limit=cfg["limit"],
            minutes=cfg["minutes"],
        )
    page = Path(study.folder, "page.md")
    _write_page(study, page, f"tied-lora compare study={study.name} page={page}")
    _list(study, cfg["at_once"])
    if outcome.stopped is not None:
        print(f"no further run was started: {outcome.stopped}; type the command again to continue")
    for label, why in outcome.failed.items():
        print(f"tied-lora compare: {label} failed: {why}; type the command again to try it again", file=sys.stderr)
    return 1 if outcome.failed else 0


def _check_base(problems: Problems, study: Study, at_once: int) -> None:
    """The base must be there, and so must the room that runs need."""
    base = Path(study.base.path)
    if not base.exists():
        problems.append(f"base.path={base}: no such file; {study.base.remedy}")
        return
    problems.attempt(usable_base, study.base.path, "base.path")
    if base.is_dir():
        return
    needed = int(at_once * _UNPACKED * base.stat().st_size)
    for what, place in (("folder", Path(study.folder)), ("TMPDIR", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(_existing(place)).free
        if free < needed:
            problems.append(
                f"{what}={place}: {at_once} runs at a time need {needed / 2**30:.1f} GiB there, {free / 2**30:.1f} GiB are "
                f"free; free some, lower at_once, or set {what} to another disk"
            )


def _check_quantization(problems: Problems, study: Study) -> None:
    """What every run of a method would be refused for, such as a missing bitsandbytes."""
    for method in study.methods:
        lines = quantization_problems(method.base_quantization, None, None, None)
        problems += [line.replace("model.", f"methods.{method.name}.", 1) for line in lines]


def _existing(path: Path) -> Path:
    """The path, or the nearest parent that exists."""
    return next(one for one in (path.resolve(), *path.resolve().parents) if one.exists())


def _check_data(study: Study, checksums: Mapping[str, Mapping[str, str]]) -> None:
    """The data must be those of the results that are there: others could not be compared with them."""
    from nemo_tied_lora.commands.study.results import read_results

    problems, told = Problems(), set[tuple[str, str]]()
    for result in read_results(Path(study.results)).by_key.values():
        task = result.values["settings"]["task"]
        for split, known in result.values["data"].items():
            found = checksums.get(task, {}).get(split)
            if found not in (None, known) and (task, split) not in told:
                told.add((task, split))
                problems.append(
                    f"results={study.results}: {result.path.name} was made with {task}'s {split} data of checksum {known}, and "
                    f"now it is {found}; name another folder for results, or use the same data and limits"
                )
    problems.raise_if_any()


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM end this process as Ctrl-C does, so that the runs save and stop."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
