# SPDX-License-Identifier: Apache-2.0
"""`tied-lora compare`: LoRA, TL5, TL6 and VeRA at one rank from the same base, several seeds each."""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.local_command import run_composed
from nemo_tied_lora.config import PRESETS
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.files import write_atomically, write_json
from nemo_tied_lora.plots import picture
from nemo_tied_lora.tables import markdown_table

__all__ = ["SUMMARY", "main"]

SUMMARY = "train LoRA, TL5, TL6 and VeRA from the same base and write a table and a picture"

_EXAMPLES = """  tied-lora compare
  tied-lora compare "presets=[lora,tl6]" "seeds=[1]" "overrides=['model.peft.tied_lora.rank=16']" folder=runs/rank16
"""


def main(argv: list[str]) -> int:
    """Returns 0, the exit code of a run that failed, or 2 if the configuration is refused. Keeps the runs that have finished."""
    return run_composed("compare", argv, _compare, summary=SUMMARY, examples=_EXAMPLES)


def _compare(cfg: dict[str, Any]) -> int:
    _check(cfg)
    from nemo_tied_lora.commands.demo.stages import run_stages  # imports psutil, which --help does not need

    return run_stages("compare", _run, cfg)


def _check(cfg: Mapping[str, Any]) -> None:
    problems = Problems(
        f"{key}={cfg[key]!r}: must be a non-empty list" for key in ("presets", "seeds") if not _is_list(cfg[key])
    )
    for key in ("at_once", "steps"):
        problems.whole_number(key, cfg[key])
    presets = cfg["presets"] if _is_list(cfg["presets"]) else []
    choices = ", ".join(PRESETS)
    problems += [f"presets: {name!r} is unknown; choose from {choices}" for name in presets if name not in PRESETS]
    problems += [f"learning_rates.{name}: missing" for name in presets if name not in cfg["learning_rates"]]
    problems.raise_if_any()


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value)


def _run(cfg: Mapping[str, Any]) -> None:

    from nemo_tied_lora.commands.demo import stages
    from nemo_tied_lora.progress import Progress

    folder = Path(cfg["folder"])
    threads = max(1, (os.cpu_count() or 1) // cfg["at_once"])
    base = stages.make_base(Path(cfg["base_folder"]))
    data = stages.make_data(Path(cfg["base_folder"]))
    runs = [(preset, seed, folder / f"{preset}-seed{seed}") for seed in cfg["seeds"] for preset in cfg["presets"]]

    def train(run: tuple[str, int, Path]) -> None:
        preset, seed, place = run
        arguments = stages.finetune_arguments(base, data, place / "adapter.nemo", seed)
        arguments += [f"preset={preset}", "layout=single", f"exp_manager.explicit_log_dir={place}"]
        arguments += [f"model.optim.lr={cfg['learning_rates'][preset]}", "trainer.enable_progress_bar=false"]
        arguments += [f"trainer.max_steps={cfg['steps']}", f"trainer.val_check_interval={cfg['steps']}"]
        arguments += cfg["overrides"]
        record = place / "arguments.json"
        if (place / "metrics.json").exists() and record.exists():
            if json.loads(record.read_text()) == {"arguments": arguments}:
                return
            shutil.rmtree(place)  # a run with other settings; its numbers must not pass for this run's
        stages.run_command(arguments, place.with_name(f"{place.name}.log"), threads)
        write_json(record, {"arguments": arguments})

    with ThreadPoolExecutor(cfg["at_once"]) as pool:
        list(Progress(pool.map(train, runs), total=len(runs), desc="runs", unit="run"))
    answers = stages.evaluate(base, data, folder / "answers.json", [place / "adapter.nemo" for _, _, place in runs])
    results = [_result(preset, seed, place, answers) for preset, seed, place in runs]
    summary = {
        "base_exact_match": answers["results"]["base"]["exact_match"],
        "test_examples": len(answers["examples"]),
        "steps": cfg["steps"],
        "learning_rates": {preset: cfg["learning_rates"][preset] for preset in cfg["presets"]},
        "runs": results,
    }
    write_json(folder / "compare.json", summary)
    table = _table(summary)
    write_atomically(folder / "compare.md", table.encode())
    _draw(folder / "compare.png", summary)
    print(f"\n{table}\nwritten: {folder / 'compare.json'}, {folder / 'compare.md'}, {folder / 'compare.png'}")


def _result(preset: str, seed: int, place: Path, answers: Mapping[str, Any]) -> dict[str, Any]:
    metrics = json.loads((place / "metrics.json").read_text())
    return {
        "preset": preset,
        "seed": seed,
        "rank": metrics["adapter"]["rank"],
        "trained_parameters": metrics["trained_parameters"],
        "exact_match": answers["results"][str(place / "adapter.nemo")]["exact_match"],
        "validation_loss": metrics["validations"][-1]["validation_loss"],
        "wall_seconds": metrics["wall_seconds"],
    }


def _groups(summary: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in summary["runs"]:
        groups.setdefault(run["preset"], []).append(run)
    return groups


def _table(summary: Mapping[str, Any]) -> str:
    groups = _groups(summary)
    lora = groups["lora"][0]["trained_parameters"] if "lora" in groups else None
    rows: list[Sequence[str]] = [
        ("method", "trained", "of LoRA", "learning rate", "exact match, each seed", "mean", "std")
    ]
    for preset, runs in groups.items():
        scores = [run["exact_match"] for run in runs]
        trained = runs[0]["trained_parameters"]
        share = "" if lora is None else f"{trained / lora:.1%}"
        spread = f"{statistics.stdev(scores):.1%}" if len(scores) > 1 else ""
        each = ", ".join(f"{score:.1%}" for score in scores)
        rate = f"{summary['learning_rates'][preset]:g}"
        rows.append((preset, f"{trained:,}", share, rate, each, f"{statistics.mean(scores):.1%}", spread))
    rank = summary["runs"][0]["rank"]
    base = f"base {summary['base_exact_match']:.1%}"
    head = f"Rank {rank}, {summary['steps']} steps, {summary['test_examples']} held-out numbers, {base}:\n\n"
    return head + markdown_table(rows, padded=True) + "\n"


def _draw(path: Path, summary: Mapping[str, Any]) -> None:
    """Draws exact match over trained parameters: one dot per seed, one bar per method at the mean."""
    with picture(path, width=7) as axes:
        for index, (preset, runs) in enumerate(_groups(summary).items()):
            trained, scores = runs[0]["trained_parameters"], [run["exact_match"] for run in runs]
            color = f"C{index}"
            axes.scatter([trained] * len(scores), scores, color=color, alpha=0.6, label=f"{preset} ({trained:,})")
            axes.scatter([trained], [statistics.mean(scores)], color=color, marker="_", s=400, linewidths=2)
        axes.axhline(summary["base_exact_match"], color="gray", linestyle="--", linewidth=1, label="base")
        axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel="trained parameters", ylabel="exact match, held-out numbers")
        rank, steps = summary["runs"][0]["rank"], summary["steps"]
        axes.set_title(f"Rank {rank}, {steps} steps, {len(summary['runs'])} runs; bars are means")
