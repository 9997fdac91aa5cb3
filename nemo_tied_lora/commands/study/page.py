# SPDX-License-Identifier: Apache-2.0
"""The page of a study, docs/study.md for `paper_claim`: Markdown, JSON and a picture, from the results alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.study.comparison import Difference, Scores, TaskSummary, summarise
from nemo_tied_lora.commands.study.listing import done_rows, totals
from nemo_tied_lora.commands.study.paragraphs import interval_text, paragraph, rounded
from nemo_tied_lora.commands.study.picture import draw
from nemo_tied_lora.commands.study.plan import BASE, Study
from nemo_tied_lora.commands.study.rates import choose_rate, headroom
from nemo_tied_lora.commands.study.results import Result, Results
from nemo_tied_lora.commands.study.rules import beyond_rule, headroom_rule, rate_rule, verdict_rules
from nemo_tied_lora.commands.study.schedule import schedule
from nemo_tied_lora.files import write_atomically, write_json
from nemo_tied_lora.tables import markdown_table
from nemo_tied_lora.tasks.metrics import METRICS

__all__ = ["page_text", "page_values", "write_page"]


def write_page(page: Path, study: Study, results: Results, command: str) -> list[Path]:
    """Writes the page, and beside it the same name with .json and .png. Returns the files.

    Args:
        command: the command that writes the page.

    Raises:
        ConfigError: results contradict each other.
    """
    summaries = summarise(study, results)
    picture, numbers = page.with_suffix(".png"), page.with_suffix(".json")
    draw(picture, study, summaries)
    write_json(numbers, page_values(study, summaries, results))
    write_atomically(page, page_text(study, summaries, results, picture.name, numbers.name, command).encode())
    return [page, numbers, picture]


def page_values(study: Study, summaries: Sequence[TaskSummary], results: Results) -> dict[str, Any]:
    """The numbers of the page, for machines. Rounded, so that another machine's rounding does not change them."""
    losses = results.losses()
    sweeps = {
        task.name: {
            method.name: {"rate": choice.rate, "at_edge": choice.at_edge, "losses": choice.losses}
            for method in study.methods
            if (choice := choose_rate(study, method, task, losses)) and choice.cells
        }
        for task in study.tasks
    }
    done, total = totals(schedule(study, losses), results)
    return rounded(
        {
            "name": study.name,
            "base": study.base.name,
            "runs": {"done": done, "planned": total},
            "claim": asdict(study.claim),
            "tasks": {
                one.task.name: {
                    "family": one.task.family,
                    "primary": one.task.primary,
                    "test_items": one.test_items,
                    "methods": {name: asdict(scores) for name, scores in one.scores.items()},
                    "differences": [asdict(difference) for difference in one.differences],
                }
                for one in summaries
            },
            "sweep": sweeps,
            "headroom": headroom(study, losses),
        }
    )


def page_text(
    study: Study, summaries: Sequence[TaskSummary], results: Results, picture: str, numbers: str, command: str
) -> str:
    """The page in Markdown.

    Args:
        picture, numbers: the names of the files beside it.
    """
    plan = schedule(study, results.losses())
    done, total = totals(plan, results)
    state = "" if done == total else f" **{done} of {total} runs are done; [the rest is missing](#what-is-missing).**"
    parts = [
        f"# {study.title}",
        *(paragraph(text) for text in study.about[:-1]),
        paragraph((study.about[-1:] or ("",))[0] + state),
    ]
    parts += ["## The verdict", *_verdicts(study, summaries)]
    parts += [f"![quality against trained parameters]({picture})"]
    parts += [paragraph(text) for text in _reading(study)]
    parts += ["## Each family", *(text for summary in summaries for text in _family(study, summary))]
    parts += ["## Learning rates", *_rates(study, results)]
    parts += ["## What is missing", *_missing(study, done, total, markdown_table(done_rows(study, plan, results)))]
    parts += ["## Limits", *(paragraph(f"- {text}") for text in study.limits)] if study.limits else []
    own = [found for cell in plan.cells if (found := results.of(cell)) is not None]
    parts += ["## How it was made", *_made(study, own, numbers, command)]
    return "\n\n".join(part for part in _joined_items(parts) if part) + "\n"


def _verdicts(study: Study, summaries: Sequence[TaskSummary]) -> Iterator[str]:
    claim = study.claim
    yield _comparison_table(study, summaries, claim.candidate, claim.reference)
    known = [*study.bases, *(method.name for method in study.methods)]
    for method, other in claim.also.items():
        if method in known and other in known:
            yield _comparison_table(study, summaries, method, other)
    if claim.rival is not None:
        yield paragraph(
            f"{study.title_of(claim.candidate)} against {study.title_of(claim.rival)}, the rival with about as few parameters:"
        )
        yield _comparison_table(study, summaries, claim.candidate, claim.rival)


def _comparison_table(study: Study, summaries: Sequence[TaskSummary], first: str, second: str) -> str:
    found = [(s, d) for s in summaries for d in s.differences if (d.method, d.other) == (first, second)]
    if not any(d.seeds for _, d in found):
        return paragraph(f"{study.title_of(first)} against {study.title_of(second)}: no results yet.")
    titles = [f"{study.title_of(name)} ({_trained(found, name)})" for name in (second, first)]
    head = ["family", "metric", BASE, *titles]
    rows = [[*head, "difference, 95%", "margin", "verdict"]]
    for summary, difference in found:
        scores = [summary.scores[name] for name in (BASE, second, first)]
        rows.append(
            [
                summary.task.family,
                METRICS[summary.task.primary].title,
                *(_value(one) for one in scores),
                interval_text(difference.primary, signed=True),
                "" if difference.margin is None else f"±{difference.margin:.1f}",
                _verdict(difference),
            ]
        )
    return markdown_table(rows)


def _trained(found: Sequence[tuple[TaskSummary, Difference]], name: str) -> str:
    counts = {s.scores[name].trained for s, _ in found if s.scores[name].trained}
    return " or ".join(f"{count:,}" for count in sorted(counts)) or "?"


def _verdict(difference: Difference) -> str:
    if not difference.seeds:
        return difference.verdict
    by = difference.primary
    size = f" by {abs(by.value):.1f}" if by is not None and difference.verdict in ("worse", "better") else ""
    seeds = len(difference.seeds)
    few = f", so far ({seeds} of {difference.planned} seeds)" if seeds < difference.planned else ""
    return f"**{difference.verdict}{size}**{few}"


def _reading(study: Study) -> Iterator[str]:
    yield from verdict_rules(study)
    yield beyond_rule(study)
    yield (
        "Intervals are 95% bootstrap intervals over seeds and test items together, paired by item and seed where methods are "
        "compared. With one seed they are over items alone."
    )


def _family(study: Study, summary: TaskSummary) -> Iterator[str]:
    task = summary.task
    yield f"### {task.family[:1].upper()}{task.family[1:]}: {task.name}"
    shown = [scores for scores in summary.scores.values() if scores.seeds or scores.diverged]
    if not shown:
        yield "No results yet."
        return
    reference = summary.scores.get(study.claim.reference)
    lora = reference.trained if reference is not None else 0
    metric = METRICS[task.primary]
    groups = list(dict.fromkeys(name for scores in summary.scores.values() for name in scores.groups))
    head = [
        "method",
        "trained",
        f"of {study.title_of(study.claim.reference)}",
        "rate",
        "seeds",
        f"{metric.title}, 95%",
        "each seed",
    ]
    rows = [[*head, *groups, *(METRICS[name].title for name in task.also), "answer loss"]]
    for scores in shown:
        share = f"{scores.trained / lora:.1%}" if lora and scores.trained else ""
        rows.append(
            [
                study.title_of(scores.method),
                f"{scores.trained:,}",
                share,
                _rate_cell(study, scores),
                "" if scores.method in study.bases else _seeds(scores),
                interval_text(scores.primary),
                ", ".join(f"{value:.1f}" for value in scores.each) if scores.method not in study.bases else "",
                *(f"{scores.groups[name]:.1f}" if name in scores.groups else "" for name in groups),
                *(f"{scores.others[name]:.1f}" if name in scores.others else "" for name in task.also),
                "" if scores.loss is None else f"{scores.loss.value:.3f}",
            ]
        )
    yield markdown_table(rows)
    yield from _differences(study, summary)


def _differences(study: Study, summary: TaskSummary) -> Iterator[str]:
    rows = [["comparison", f"{METRICS[summary.task.primary].title}, 95%", "verdict", "answer loss, 95%"]]
    for one in summary.differences:
        if one.seeds:
            loss = interval_text(one.loss, signed=True, digits=3)
            names = f"{study.title_of(one.method)} minus {study.title_of(one.other)}"
            rows.append([names, interval_text(one.primary, signed=True), _verdict(one), loss])
    if len(rows) > 1:
        yield markdown_table(rows)


def _rate_cell(study: Study, scores: Scores) -> str:
    """The rate. If it was chosen for another method, with that method's title."""
    if scores.rate is None:
        return ""
    chosen_for = study.method(scores.method).rates_of
    return f"{scores.rate:g}" if chosen_for is None else f"{scores.rate:g}, as {study.title_of(chosen_for)}"


def _seeds(scores: Scores) -> str:
    diverged = f" ({scores.diverged} diverged)" if scores.diverged else ""
    return f"{len(scores.seeds)} of {scores.planned}{diverged}"


def _rates(study: Study, results: Results) -> Iterator[str]:
    losses = results.losses()
    swept = [method for method in study.methods if len(method.rates) > 1]
    if not swept:
        yield paragraph("The study's YAML fixes them; there is no sweep.")
        return
    yield paragraph(rate_rule(study))
    rows = [["task", "method", "rate", "answer loss on validation data at each rate"]]
    for task in study.tasks:
        for method in swept:
            choice = choose_rate(study, method, task, losses)
            each = ", ".join(_at_rate(rate, loss) for rate, loss in choice.losses.items())
            edge = " (edge)" if choice.at_edge else ""
            rate = "not chosen yet" if choice.rate is None else f"{choice.rate:g}{edge}"
            if each:
                rows.append([task.name, method.title, rate, each])
    if len(rows) > 1:
        yield markdown_table(rows)
    if rule := headroom_rule(study):
        gains = ", ".join(f"{name} {gain:.2f}" for name, gain in headroom(study, losses).items() if gain is not None)
        yield paragraph(rule + (f" In nats per token: {gains}." if gains else ""))


def _at_rate(rate: float, loss: float) -> str:
    return f"{rate:g}: {'diverged' if loss == float('inf') else f'{loss:.3f}'}"


def _missing(study: Study, done: int, total: int, table: str) -> Iterator[str]:
    if done == total:
        yield paragraph(f"Nothing: all {total} runs are done.")
    else:
        yield paragraph(f"{done} of {total} runs are done. The table shows how many of each.")
    yield table


def _made(study: Study, results: Sequence[Result], numbers: str, command: str) -> Iterator[str]:
    training = study.training
    yield paragraph(
        f"Base: {study.base.name}. Each run is `tied-lora finetune` on NeMo, in {training.precision} with the adapter in "
        f"float32: {training.batch} items a step, {training.warmup_steps} steps of warm-up, then a cosine schedule, weight "
        f"decay {training.weight_decay:g}, one learning rate for all factors. Then `tied-lora evaluate` measures it on test "
        "data, greedily."
    )
    rows = [
        ["task", "steps", "tokens of an item, at most", "characters of a training item, at most", "test items", "data"]
    ]
    for task in study.tasks:
        data: dict[str, str] = {}
        for result in results:
            data |= result.values["data"] if result.values["settings"]["task"] == task.name else {}
        rows.append(
            [
                task.name,
                f"{task.steps}",
                f"{task.max_seq_length}",
                "" if task.max_chars is None else f"{task.max_chars}",
                "all" if task.items is None else f"{task.items}",
                ", ".join(f"{split} `{checksum[:8]}`" for split, checksum in sorted(data.items())),
            ]
        )
    yield markdown_table(rows)
    yield paragraph(
        "Longer training items are left out for all methods alike. The last column shows the beginning of the data's checksums."
    )
    if versions := _versions(results):
        yield paragraph(f"Versions: {versions}. Time of all runs together: {_hours(results)} hours on one core each.")
    yield paragraph(
        f"The numbers are in [{numbers}]({numbers}), the results of each run in `{study.results}`. This page is written from "
        f"them alone by `{command}`."
    )


def _versions(results: Sequence[Result]) -> str:
    found: dict[str, set[str]] = {}
    for result in results:
        for name, version in result.values.get("versions", {}).items():
            found.setdefault(name, set()).add(str(version))
    return ", ".join(f"{name} {' or '.join(sorted(versions))}" for name, versions in found.items())


def _hours(results: Sequence[Result]) -> str:
    return f"{sum(result.seconds for result in results) / 3600:.1f}"


def _value(scores: Scores) -> str:
    return "" if scores.primary is None else f"{scores.primary.value:.1f}"


def _joined_items(parts: Sequence[str]) -> Iterator[str]:
    """Joins list items that follow each other to one part."""
    items: list[str] = []
    for part in [*parts, ""]:
        if part.startswith("- "):
            items.append(part)
            continue
        if items:
            yield "\n".join(items)
            items = []
        yield part
