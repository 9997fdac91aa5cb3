# SPDX-License-Identifier: Apache-2.0
"""The command line: python -m benchmarks.forms COMMAND.

base            make the Hugging Face folder of SmolLM2-135M, once (90 MB are downloaded)
run             do the runs that have no result yet: first those of the learning rates, then those of the forms
list            show which runs are done, and which come next
page            write docs/forms.md and the sweep in docs/learning_rates.md, from the results alone
step            measure a training step beside that of transformers
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from nemo_tied_lora.commands.program import run_program
from nemo_tied_lora.commands.study.results import read_results
from nemo_tied_lora.errors import ConfigError

from .plan import FORMS, RATES, read_plan
from .running import outlook, run
from .schedule import schedule

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
RESULTS = Path("docs/forms_results")
MODEL = Path("runs/smollm2/hf")
PLANS = {"rates": RATES, "forms": FORMS}


def main(arguments: list[str]) -> int:
    """Returns the exit code; 2 if something was refused, 130 after Ctrl-C or SIGTERM."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        return 130
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forms",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(__doc__ or "").partition("\n\n")[2],
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    base = commands.add_parser("base", help="make the Hugging Face folder of the base")
    base.add_argument("folder", type=Path, metavar="FOLDER", nargs="?", default=MODEL, help=f"default: {MODEL}")
    base.add_argument("--gguf", type=Path, metavar="FILE", help="the GGUF file; default: get it from its package")
    base.set_defaults(command=_base)
    for name, command, what in (
        ("run", _run, "do the runs that are missing"),
        ("list", _list, "show what is done and what comes next"),
        ("step", _step, "measure a training step beside that of transformers"),
    ):
        added = commands.add_parser(name, help=what)
        added.set_defaults(command=command)
        added.add_argument("--model", type=Path, default=MODEL, metavar="FOLDER", help=f"the base; default: {MODEL}")
        added.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"default: {RESULTS}")
        added.add_argument(
            "--plan", choices=("all", *PLANS), default="all", help="rates, forms, or both, in this order"
        )
        added.add_argument("--workers", type=_count, default=2, metavar="N", help="runs at a time (default: 2)")
        added.add_argument("--minutes", type=float, metavar="N", help="start no further run after so many minutes")
        added.add_argument("--data", metavar="FOLDER", help="of the tasks' files; default: that of study=paper_claim")
    page = commands.add_parser("page", help="write the pages from the results")
    page.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    page.add_argument("--docs", type=Path, default=Path("docs"), metavar="FOLDER")
    page.set_defaults(command=_page)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _plans(options: argparse.Namespace) -> list[Path]:
    return list(PLANS.values()) if options.plan == "all" else [PLANS[options.plan]]


def _run(options: argparse.Namespace) -> int:
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    code = 0
    for plan in _plans(options):
        minutes = None if end is None else (end - time.monotonic()) / 60
        if minutes is None or minutes > 0:
            code |= run(
                plan, options.model, options.results, workers=options.workers, minutes=minutes, data=options.data
            )
    return code


def _list(options: argparse.Namespace) -> int:
    results = read_results(options.results)
    for path in _plans(options):
        plan = read_plan(path)
        print(f"{path.stem}: {outlook(plan, results, options.workers)}")
        left = [one for one in schedule(plan, results.losses()).cells if one.key not in results.by_key]
        print("\n".join(f"  {one.label}" for one in left[:12]))
    return 0


def _base(options: argparse.Namespace) -> int:
    from .base import make

    return make(options.folder, options.gguf)


def _step(options: argparse.Namespace) -> int:
    from .pages import STEP_TIME
    from .step_time import measure

    return measure(options.model, options.data, Path("docs") / STEP_TIME)


def _page(options: argparse.Namespace) -> int:
    from .pages import write

    return write(options.results, options.docs)


if __name__ == "__main__":
    run_program(main, sys.argv[1:], "benchmarks.forms")
