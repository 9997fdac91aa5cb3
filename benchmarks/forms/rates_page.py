# SPDX-License-Identifier: Apache-2.0
"""The sweep of the learning rates: its part of docs/learning_rates.md, its numbers and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_tied_lora.adapter.lr_multipliers import DEFAULTS
from nemo_tied_lora.commands.study.paragraphs import paragraph
from nemo_tied_lora.commands.study.results import Results
from nemo_tied_lora.config import FACTORS
from nemo_tied_lora.plots import panels
from nemo_tied_lora.tables import markdown_table

from .cells import base_cell
from .defaults import default_shares
from .plan import Plan
from .schedule import schedule
from .sweeping import Curve, OneRate, best_gains, checked, curves, one_rate

__all__ = ["PICTURE", "draw", "sweep_text", "sweep_values"]

PICTURE = "learning_rates.png"


def sweep_values(plan: Plan, results: Results) -> dict[str, Any]:
    """The sweep's numbers, for machines."""
    found = curves(plan, results.losses())
    best = best_gains(found)
    return {
        "runs": dict(zip(("done", "planned"), _counts(plan, results), strict=True)),
        "curves": [
            {
                "preset": c.preset,
                "rank": c.rank,
                "rule": c.rule,
                "gains": dict(c.gains),
                "best": best[c.preset, c.rank],
            }
            for c in found
        ],
        "one_rate": [
            {"preset": one.preset, "rule": one.rule, "rate": one.rate, "shares": dict(one.shares)}
            for one in _one_rates(found)
        ],
        "defaults": {name: default_shares(plan, found, name) for name in _presets(found)},
    }


def sweep_text(plan: Plan, results: Results) -> str:
    """The part of the page in Markdown."""
    return "\n\n".join(part for part in _parts(plan, results) if part)


def draw(path: Path, plan: Plan, results: Results) -> None:
    """A panel for each preset and rule: the share of the best gain at each rate, a line for each rank. Then the legend."""
    found = curves(plan, results.losses())
    best = best_gains(found)
    pairs = _pairs(found)
    rows = -(-(len(pairs) + 1) // 3)
    title = (
        "share of its own best gain that a preset reaches at each learning rate; the grey band is 5%; less than 0.5 is drawn "
        "at 0.5"
    )
    with panels(path, rows, columns=3, width=13, height=2.8 * rows + 1, title=title) as axes:
        for one, (preset, rule) in zip(axes, pairs, strict=False):
            _panel(one, plan, preset, rule, found, best)
        for one in axes[len(pairs) :]:
            one.axis("off")
        for rank in _ranks(found):
            axes[-1].plot([], [], **_style(rank), label=f"rank {rank}")
        axes[-1].legend(loc="center", ncols=2)


def _panel(axes: Any, plan: Plan, preset: str, rule: str, found: Sequence[Curve], best: Any) -> None:
    for curve in sorted((c for c in found if (c.preset, c.rule) == (preset, rule)), key=lambda c: c.rank):
        shares = [max(0.5, gain / best[preset, curve.rank]) for gain in curve.gains.values()]
        axes.plot(list(curve.gains), shares, **_style(curve.rank))
    axes.axhspan(1 - plan.tolerance, 1.0, color="0.9")
    axes.set_xscale("log")
    axes.set_ylim(0.48, 1.02)
    axes.set_xlim(3e-4, 0.8)
    axes.set_xlabel("learning rate")
    axes.set_title(f"{plan.candidate(preset).title}: {rule_text(plan, rule)}", fontsize="small")
    axes.grid(visible=True, alpha=0.25)


def _style(rank: int) -> dict[str, str]:
    """The same colour and mark for a rank in all panels."""
    number = rank.bit_length() - 1
    return {"color": f"C{number}", "marker": "osD^vPX*"[number % 8]}


def rule_text(plan: Plan, rule: str) -> str:
    """ "A 0.25, B 8/r": the multipliers, relative to rank 8."""
    parts = [f"{factor} {_power_text(c, p)}" for factor, (c, p) in plan.rules[rule].items()]
    return ", ".join(parts) or "one rate for all factors"


def _power_text(c: float, p: float) -> str:
    """c (r / 8)^p, as "4 √(8/r)"."""
    power = {-1.0: "8/r", -0.5: "√(8/r)", 0.0: ""}.get(p, f"(r/8)^{p:g}")
    constant = f"{c:g}" if c != 1 or not power else ""
    return f"{constant}{' ' if constant and power else ''}{power}"


def _parts(plan: Plan, results: Results) -> Iterator[str]:
    (task,) = plan.tasks
    losses = results.losses()
    found = curves(plan, losses)
    done, planned = _counts(plan, results)
    yield paragraph(
        f"**{done} of {planned} runs are done.** Task: {task.name}. Base: {plan.base}. Each run has {plan.sweep.steps} "
        f"steps of {plan.training.batch} items, {plan.training.warmup_steps} of them warm-up, then a cosine, seed "
        f"{plan.sweep.seed}, clipping at {plan.training.clip:g}, weight decay {plan.training.weight_decay:g}. The gain is "
        f"the base's loss of the answers on {plan.sweep.items} validation items minus the run's. A grid whose best rate is "
        f"at its edge grows there, at most {plan.sweep.growth} times."
    )
    if not found:
        yield "No results yet."
        return
    base = losses[base_cell(plan, task, "validation").key]
    yield paragraph(f"The base's loss is {base:.3f} nats per token.")
    yield f"![share of the best gain at each rate]({PICTURE})"
    yield from _defaults(plan, found)
    yield "#### One rate for all ranks"
    yield paragraph(
        "For each preset and rule: the one rate that serves its ranks best, and the share of its own best gain that each "
        f"rank reaches with it. The goal is at least {1 - plan.tolerance:.0%} everywhere."
    )
    rows = [["preset", "multipliers", "rate", "share at each rank", "worst"]]
    for one in _one_rates(found):
        shares = ", ".join(f"r={rank}: {share:.1%}" for rank, share in one.shares.items())
        name = plan.candidate(one.preset).title
        rows.append([name, rule_text(plan, one.rule), f"{one.rate:g}", shares, f"{one.worst:.1%}"])
    yield markdown_table(rows) if len(rows) > 1 else "No rate was tried at two ranks yet."
    yield from _checks(plan, results)
    yield "#### Each curve"
    rows = [["preset", "rank", "multipliers", "best rate", "gain at each rate"]]
    for curve in found:
        rate = max(curve.gains, key=lambda rate: curve.gains[rate])
        edge = " (edge)" if rate in (min(curve.gains), max(curve.gains)) else ""
        gains = ", ".join(f"{rate:g}: {_gain(gain)}" for rate, gain in curve.gains.items())
        name = plan.candidate(curve.preset).title
        rows.append([name, f"{curve.rank}", rule_text(plan, curve.rule), f"{rate:g}{edge}", gains])
    yield markdown_table(rows)


def _defaults(plan: Plan, found: Sequence[Curve]) -> Iterator[str]:
    """What the package's defaults reach."""
    yield "#### The defaults"
    measured = {name: default_shares(plan, found, name) for name in _presets(found)}
    yield paragraph(
        f"The presets' multipliers, and the share of its own best gain that each rank reaches with them at a learning rate of "
        f"{plan.one_rate:g}. {_said(plan, measured)}"
    )
    rows = [["preset", *FACTORS[::-1], *(f"r={rank}" for rank in _ranks(found))]]
    for name, shares in measured.items():
        multipliers = [DEFAULTS[name].get(factor) for factor in FACTORS[::-1]]
        texts = ["" if one is None else _power_text(one.at_rank_8, one.power) for one in multipliers]
        reached = [f"{shares[rank]:.1%}" if rank in shares else "" for rank in _ranks(found)]
        rows.append([plan.candidate(name).title, *texts, *reached])
    yield markdown_table(rows)


def _said(plan: Plan, measured: Mapping[str, Mapping[int, float]]) -> str:
    least = 1 - plan.tolerance
    missed = [
        f"{plan.candidate(name).title} of rank {rank}"
        for name, shares in measured.items()
        for rank, share in shares.items()
        if share < least
    ]
    if missed:
        return f"The goal is at least {least:.0%}. It is missed by {', '.join(missed)}."
    return f"The goal, at least {least:.0%}, is reached wherever it was measured."


def _ranks(found: Sequence[Curve]) -> list[int]:
    return sorted({curve.rank for curve in found})


def _checks(plan: Plan, results: Results) -> Iterator[str]:
    """What warm-up, clipping and weight decay decide."""
    losses = results.losses()
    (task,) = plan.tasks
    rows = [["preset", "rank", "learning rate", "change", "loss with the change", "usual loss"]]
    moved = 0.0  # of the gain
    for one in checked(plan, losses)[0]:
        if one.cell.key in losses:
            gain = losses[base_cell(plan, task, "validation").key] - one.usual
            moved = max(moved, abs(losses[one.cell.key] - one.usual) / gain)
            change = ", ".join(f"{name} {value:g}" for name, value in one.change.items())
            name = plan.candidate(one.preset).title
            loss = losses[one.cell.key]
            rows.append([name, f"{one.rank}", f"{one.rate:g}", change, _loss(loss), f"{one.usual:.3f}"])
    if len(rows) > 1:
        yield "#### Warm-up, clipping, weight decay"
        yield paragraph(
            "One change at a time, with the preset's best rate and one rate for all factors. A clip of 0 means none. The largest "
            f"change is {moved:.1%} of the gain."
        )
        yield markdown_table(rows)


def _presets(found: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(curve.preset for curve in found))


def _one_rates(found: Sequence[Curve]) -> list[OneRate]:
    options = (one_rate(found, preset, rule) for preset, rule in _pairs(found))
    return [one for one in options if one is not None]


def _pairs(found: Sequence[Curve]) -> list[tuple[str, str]]:
    """The presets and their rules, one preset after the other."""
    pairs = dict.fromkeys((curve.preset, curve.rule) for curve in found)
    return [pair for name in _presets(found) for pair in pairs if pair[0] == name]


def _gain(gain: float) -> str:
    return "diverged" if gain == -float("inf") else f"{gain:.3f}"


def _loss(loss: float) -> str:
    return "diverged" if loss == float("inf") else f"{loss:.3f}"


def _counts(plan: Plan, results: Results) -> tuple[int, int]:
    found = schedule(plan, results.losses())
    return sum(one.key in results.by_key for one in found.cells), len(found.cells) + found.waiting
