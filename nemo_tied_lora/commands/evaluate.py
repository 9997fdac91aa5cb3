# SPDX-License-Identifier: Apache-2.0
"""`tied-lora evaluate`: measures a base and its adapters on a task's test set."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_tied_lora.commands.distributed_command import run_command
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.preflight import check_evaluation
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization
from nemo_tied_lora.tasks.adapters import adapter_list, adapter_list_problems
from nemo_tied_lora.tasks.predictions import alone_in

if TYPE_CHECKING:  # numpy, which the list of commands does without
    from nemo_tied_lora.tasks.evaluation import Evaluation

__all__ = ["SUMMARY", "main"]

SUMMARY = "measure a base and its adapters on a task's test set"

_EXAMPLES = """  tied-lora evaluate base=base.nemo adapter=adapter.nemo task=nli_wordnet_senses
  tied-lora evaluate base=base.nemo "adapter=[null,a.nemo,b.nemo]" task=math_gsm_symbolic layout=pp2 output=results
"""


def main(argv: list[str]) -> int:
    """The command; see `run_command` for what it returns."""
    return run_command(
        "evaluate",
        argv,
        summary=SUMMARY,
        examples=_EXAMPLES,
        groups=("task", "layout"),
        check=_check,
        make_files=lambda values: _evaluation(values).check(),
        run=lambda cfg, rank: _run(cfg),
    )


def _check(values: Mapping[str, Any]) -> list[str]:
    """Checks everything that needs no file of the task. Returns the lines to print at the start.

    Raises:
        ConfigError: with all problems.
    """
    from nemo_tied_lora.tasks.task import Task

    problems = Problems()
    if values.get("task") is None:
        problems.append("task: missing; name one, as task=nli_wordnet_senses; tied-lora evaluate --help lists them")
    else:
        problems.attempt(Task.from_config, values["task"])
    problems.one_of("split", values.get("split"), ("test", "validation"))
    wrong = list(adapter_list_problems(values.get("adapter")))
    problems += wrong
    lines = problems.attempt(check_evaluation, values, [] if wrong else adapter_list(values.get("adapter")))
    output = values.get("output")
    if isinstance(output, (str, int, float)):
        problems += _output_problems(Path(str(output)))
    problems.raise_if_any()
    return lines or []


def _output_problems(folder: Path) -> Iterator[str]:
    """Yields the part of the path that is there and is not a folder."""
    there = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    if not there.is_dir():
        which = "" if there == folder else f"{there} "
        yield f"output={folder}: {which}is a file; name a folder"


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    """The evaluation of a checked configuration. Makes the task's files if they are not there."""
    from nemo_tied_lora.tasks.evaluation import Evaluation
    from nemo_tied_lora.tasks.prepare import prepare
    from nemo_tied_lora.tasks.task import Task

    task = Task.from_config(values["task"])
    quantization = BaseQuantization.from_setting(values["model"].get("base_quantization"))
    return Evaluation(
        task,
        prepare(task),
        base=str(values["base"]),
        adapters=adapter_list(values["adapter"]),
        folder=None if values["output"] is None else str(values["output"]),
        precision=str(values["trainer"]["precision"]),
        base_quantization=None if quantization is None else quantization.precision,
        split=str(values["split"]),
    )


def _run(cfg: DictConfig) -> None:
    """Rank 0 alone reads and writes files; the others learn from it what is missing."""
    from nemo_tied_lora.adapter.agreement import from_rank_0
    from nemo_tied_lora.nemo.task_evaluation import predict

    values: Any = OmegaConf.to_container(cfg, resolve=True)
    with ExitStack() as stack, open_dict(cfg):
        cfg.model.pop("data", None)  # of a training; the rest of `model` goes to the base
        mine: list[Evaluation] = []

        def begin() -> None:
            evaluation = _evaluation(values)
            with evaluation.writing():
                stack.enter_context(alone_in(evaluation.folder))
            evaluation.begin()
            mine.append(evaluation)

        from_rank_0("evaluate", begin)
        predict(cfg, mine[0] if mine else None)
        sizes = {key: value for key, value in values["model"].items() if key.endswith("parallel_size") and value}
        from_rank_0("evaluate", lambda: _report(mine[0], values["resamples"], sizes))


def _report(evaluation: Evaluation, resamples: int, layout: Mapping[str, int]) -> None:
    from nemo_tied_lora.tasks.evaluation import RESULTS_FILE
    from nemo_tied_lora.tasks.results import results_table

    print(results_table(evaluation.finish(resamples=resamples, layout=layout)), flush=True)
    print(f"\nwritten: {evaluation.folder / RESULTS_FILE}", flush=True)
