# SPDX-License-Identifier: Apache-2.0
"""docs/forms.md: quality against count, intervals, what did not work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from nemo_tied_lora.commands.study.paragraphs import interval_text, paragraph
from nemo_tied_lora.commands.study.results import Results
from nemo_tied_lora.tables import markdown_table

from .analysis import Score, Verdict, scores, verdicts
from .cells import base_cell
from .form import trained_parameters
from .forms_picture import PICTURE
from .plan import Plan
from .schedule import Entry, entries, kept, schedule, sweep_entry

__all__ = ["page_text", "page_values"]

_TITLE = "Which form of tied adapter is best at equal counts?"


def page_values(plan: Plan, results: Results) -> dict[str, Any]:
    """The numbers of the page, for machines."""
    budgets = {}
    for budget in plan.budgets:
        found = entries(plan, budget)
        budgets[budget] = {
            "parameters": plan.budgets[budget],
            "forms": {
                one.candidate.name: {"trained": _trained(plan, one), "form": one.form.settings()} for one in found
            },
            "tasks": {
                task.name: {
                    score.entry.candidate.name: {k: v for k, v in asdict(score).items() if k not in ("entry", "task")}
                    for score in scores(plan, task, found, results)
                }
                for task in plan.tasks
            },
            "differences": {
                one.candidate.name: {
                    other: [asdict(v) for v in its] for other, its in _against(plan, one, found, results)
                }
                for one in _compared(found)
            },
        }
    done, planned = _counts(plan, results)
    return {"base": plan.base, "runs": {"done": done, "planned": planned}, "budgets": budgets}


def page_text(plan: Plan, results: Results, steps: Mapping[str, Any] | None = None) -> str:
    """The page in Markdown.

    Args:
        steps: what `step_time.measure` has written.
    """
    parts = [*_parts(plan, results), *(_steps(steps) if steps is not None else ())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parts(plan: Plan, results: Results) -> Iterator[str]:
    done, planned = _counts(plan, results)
    yield f"# {_TITLE}"
    yield paragraph(
        "On LLaMA2-7B, TL6 of rank 8 trains as many parameters as LoRA of rank 1. So a tied adapter has to beat LoRA of "
        "rank 1, or its merits are only what it saves in memory and on the network. Here forms of tied adapters are "
        f"compared at equal counts. **{f'All {done}' if done >= planned else f'{done} of about {planned}'} runs are done.**"
    )
    yield "    Delta W_l = s diag(v_l) B_g R_l A_g"
    yield paragraph(
        "All forms are points of this one: l is a layer, g the group of layers that share A and B, R_l absent, diagonal (the "
        "paper's u) or full, v_l absent, free, one number for several outputs, or made of shared directions. Every point "
        "exports as plain LoRA, exactly: lora_A = R_l A_g, lora_B = s diag(v_l) B_g."
    )
    yield "## The verdict"
    yield from _verdict(plan, results)
    yield f"![each form against LoRA]({PICTURE})"
    for budget in plan.budgets:
        yield f"## At most {plan.budgets[budget]:,} parameters, the {_called(budget)}"
        yield from _budget(plan, budget, results)
    yield "## What did not stay"
    yield from _dropped(plan, results)
    yield "## How it was measured"
    yield from _measured(plan, results)


def _verdict(plan: Plan, results: Results) -> Iterator[str]:
    rows = [["at most", "form", "against", *(task.name for task in plan.tasks), "verdict"]]
    for budget in plan.budgets:
        found = entries(plan, budget)
        for one in _compared(found):
            for other, its in _against(plan, one, found, results):
                if any(verdict.seeds for verdict in its):
                    cells = [interval_text(verdict.difference, signed=True, digits=3) for verdict in its]
                    rows.append(
                        [_called(budget), one.candidate.title, plan.candidate(other).title, *cells, _word(its)]
                    )
    if len(rows) == 1:
        yield paragraph("No test runs of a candidate yet.")
        return
    for budget in plan.budgets:
        yield from _winners(plan, budget, results)
    yield markdown_table(rows)
    yield paragraph(
        "Loss of the form minus that of the one named beside it, in nats per token, on test items: below 0 the form is better. "
        "In brackets: 95% bootstrap intervals over seeds and items, paired. A candidate wins at a budget if both intervals are "
        "wholly below 0, against TL6 and against LoRA, on at least two of the three tasks. Then it enters the package, where "
        "TL5, VeRA and AdaLoRA are already. The loss of the answers decides because it is precise with few runs; the choice task's "
        "accuracy is shown too."
    )


def _winners(plan: Plan, budget: str, results: Results) -> Iterator[str]:
    """Which candidates beat both on at least two tasks, by the rule of the plan, and which forms do so on one task."""
    found = entries(plan, budget)
    tried, winners, open_ones, partial = 0, [], [], []
    for one in _compared(found):
        pairs = [its for _, its in _against(plan, one, found, results)]
        if not any(verdict.seeds for its in pairs for verdict in its):
            continue
        both = [[verdict.beats for verdict in of_task] for of_task in zip(*pairs, strict=True)]
        wins = sum(all(beats is True for beats in task) for task in both)
        possible = sum(all(beats is not False for beats in task) for task in both)
        may_win = not one.candidate.reference
        tried += may_win
        if may_win and wins >= _ENOUGH:
            winners.append(one.candidate.title)
        elif may_win and wins < _ENOUGH <= possible:
            open_ones.append(one.candidate.title)
        elif wins == 1:
            partial.append(one.candidate.title)
    if tried:
        names = "; ".join(f"**{name}**" for name in winners) or "none"
        rest = f" Not decided yet: {'; '.join(open_ones)}." if open_ones else ""
        rest += f" Better than both on one task: {'; '.join(partial)}." if partial else ""
        yield paragraph(
            f"At the {_called(budget)}, {tried} candidates have test runs. Better than both TL6 and LoRA on at least two tasks: "
            f"{names}.{rest}"
        )


_RIVALS = ("lora", "tl6")
_ENOUGH = 2
"""So many of the tasks."""


def _word(its: Sequence[Verdict]) -> str:
    wins = sum(verdict.beats is True for verdict in its)
    open_ones = sum(verdict.beats is None for verdict in its)
    if wins >= _ENOUGH:
        return f"**better** on {wins}"
    if wins + open_ones >= _ENOUGH:
        return "not decided yet"
    return f"better on {wins}" if wins else "not better"


def _compared(found: Sequence[Entry]) -> list[Entry]:
    """All forms but the two that each of them is compared with."""
    return [one for one in found if one.candidate.name not in _RIVALS]


def _against(plan: Plan, one: Entry, found: Sequence[Entry], results: Results) -> Iterator[tuple[str, list[Verdict]]]:
    for other in found:
        if other.candidate.name in _RIVALS:
            yield other.candidate.name, verdicts(plan, one, other, results)


def _budget(plan: Plan, budget: str, results: Results) -> Iterator[str]:
    found = entries(plan, budget)
    losses = results.losses()
    by_task: Mapping[str, list[Score]] = {task.name: scores(plan, task, found, results) for task in plan.tasks}
    rows = [["form", "rank", "trained", *(f"{task.name}: {what}" for task in plan.tasks for what in ("rate", "loss"))]]
    for number, one in enumerate(found):
        own = [by_task[task.name][number] for task in plan.tasks]
        if any(score.validation is not None for score in own):
            cells = [cell for score in own for cell in (_rate(score), _loss(score))]
            rows.append([one.candidate.title, _rank(one), f"{_trained(plan, one):,}", *cells])
    if len(rows) == 1:
        yield "No results yet."
        return
    bases = []
    for split in ("validation", "test"):
        known = [(task.name, losses.get(base_cell(plan, task, split).key)) for task in plan.tasks]
        bases += [f"{name} {loss:.3f} ({split})" for name, loss in known if loss is not None]
    yield markdown_table(rows)
    yield paragraph(
        "Loss: on test items, mean over seeds with its 95% interval, or in brackets that of the best rate on validation "
        f"items where no test run is done. The base's: {', '.join(bases)}."
    )
    accuracies = [
        f"{score.entry.candidate.title} {interval_text(score.accuracy)}"
        for its in by_task.values()
        for score in its
        if score.accuracy is not None
    ]
    if accuracies:
        yield paragraph(
            f"Accuracy of the choice task in points, by the likelihood of the number: {'; '.join(accuracies)}."
        )


def _rank(one: Entry) -> str:
    return f"{one.form.rank}" + ("" if one.form.keep is None else f" to {one.form.keep}")


def _rate(score: Score) -> str:
    return "" if score.rate is None else f"{score.rate:g}{' (edge)' if score.at_edge else ''}"


def _loss(score: Score) -> str:
    if score.loss is not None:
        return interval_text(score.loss, digits=3)
    return "" if score.validation is None else f"({score.validation:.3f})"


def _dropped(plan: Plan, results: Results) -> Iterator[str]:
    losses, lines = results.losses(), []
    for budget in plan.budgets:
        found = entries(plan, budget)
        first = kept(plan, plan.tasks[:1], found, plan.keep[0], losses)
        finalists = None if first is None else kept(plan, plan.tasks, first, plan.keep[1], losses)
        for names, what in ((first, "the first task's sweep"), (finalists, "the sweeps of all tasks")):
            before = found if names is first else first or ()
            gone = [one for one in before if names is not None and one not in names]
            gone = [one for one in gone if sweep_entry(plan, plan.tasks[0], one, losses).rate is not None]
            if gone:
                lines.append(f"- {_called(budget)}, after {what}: {'; '.join(one.candidate.title for one in gone)}.")
        if first is None:
            break
    yield paragraph(
        f"References always stay. Of the candidates, the best {plan.keep[0]} stay after the first task's sweep and the best "
        f"{plan.keep[1]} after all, by the share of LoRA's gain that they reach on validation data with their best rates. "
        "Only these have test runs, and only these are tried at the larger budget."
    )
    yield "\n".join(paragraph(line) for line in lines) if lines else "No sweep is complete yet."


def _measured(plan: Plan, results: Results) -> Iterator[str]:
    training, sweep = plan.training, plan.sweep
    yield paragraph(
        f"Base: {plan.base}, frozen, in bf16; factors in float32 on all four linears. AdamW, {training.batch} items a step, "
        f"{training.warmup_steps} steps of warm-up, then a cosine, weight decay {training.weight_decay:g}, clipping at "
        f"{training.clip:g}: the recipe, the items and their order are those of [study.md](study.md). Rates are chosen in runs "
        f"of {sweep.steps} steps with seed {sweep.seed} on {sweep.items} validation items; a grid whose best rate is at its edge "
        f"grows there, at most {sweep.growth} times. At each rank the factors have the multiples of the rate that "
        "[learning_rates.md](learning_rates.md#the-defaults) found for the reference that a form is most like; a core has "
        "none. Each form has the largest rank that fits into the budget."
    )
    rows = [["task", "family", "steps", "tokens of an item, at most", "test items"]]
    for task in plan.tasks:
        rows.append([task.name, task.family, f"{task.steps}", f"{task.max_seq_length}", f"{task.items}"])
    yield markdown_table(rows)
    seconds = sum(one.values.get("cpu_seconds", 0.0) for one in results.by_key.values())
    yield paragraph(
        "Runs are made by `benchmarks/forms`, outside the package: `python -m benchmarks.forms base` makes the base's "
        "folder once, `python -m benchmarks.forms run` does the runs that are missing. The plan "
        "with its rules, written before the first run on test data, is `benchmarks/forms/forms.yaml`. All runs so far, those "
        f"of [learning_rates.md](learning_rates.md) too, took {seconds / 3600:.1f} CPU hours. This page is written from "
        "`docs/forms_results` alone by `python -m benchmarks.forms page`; the numbers are in [forms.json](forms.json)."
    )
    yield paragraph(
        f"Rates and finalists come from runs of {sweep.steps} steps with one seed, which favour forms that learn fast. The "
        f"intervals of test runs resample the {plan.seeds} seeds, so one of them is wholly below 0 only if nearly all seeds "
        "agree."
    )
    yield paragraph(
        "Not measured: larger bases, longer training, more than one base, generation. VeRA's rank is limited to 128, so it "
        "does not use the whole budget: more random directions cost time and hardly any parameters."
    )


def _called(budget: str) -> str:
    """ "count of LoRA r=1" for lora_r1."""
    return budget.replace("lora_r", "count of LoRA r=")


def _steps(values: Mapping[str, Any]) -> Iterator[str]:
    steps = values["steps"]
    ratio = median(step["transformers"] / step["here"] for step in steps)
    here, theirs, tokens = (sum(step[name] for step in steps) for name in ("here", "transformers", "tokens"))
    versions = ", ".join(f"{name} {version}" for name, version in values["versions"].items())
    yield paragraph(
        f"A training step ({values['form']}, batches of {values['task']}) takes {1000 * here / tokens:.1f} CPU milliseconds a "
        f"token here, and {1000 * theirs / tokens:.1f} with transformers and a plain LoRA, padded and with all logits: "
        f"{ratio:.1f} times as long (median of {len(steps)} batches, in turns on one thread; {versions}; load average "
        f"{values['load_average']}). The trainer here computes logits for answers alone, lets only answers through the last "
        "layer after its attention, does not pad its linears, and writes attention out."
    )


def _trained(plan: Plan, one: Entry) -> int:
    return trained_parameters(one.form, plan.sizes.linears, plan.sizes.layers)


def _counts(plan: Plan, results: Results) -> tuple[int, int]:
    found = schedule(plan, results.losses())
    return sum(one.key in results.by_key for one in found.cells), len(found.cells) + found.waiting
