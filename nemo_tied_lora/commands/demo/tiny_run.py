# SPDX-License-Identifier: Apache-2.0
"""The quickstart on a small base that it makes itself: German numbers in words."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_tied_lora.files import write_atomically, write_json
from nemo_tied_lora.tables import markdown_table

__all__ = ["run"]

_SHOWN = 5
_FROM_RUN = ("trained_parameters", "parameter_table", "lora_parameters", "base_parameters", "tokens_per_second")


def run(cfg: Mapping[str, Any]) -> None:
    """Runs the stages, and writes and prints the report.

    Raises:
        StageError: a stage failed.
    """
    from nemo_tied_lora.commands.demo import stages

    folder = Path(cfg["folder"])
    devices, preset = cfg["trainer"]["devices"], cfg["model"]["peft"]["tied_lora"]["preset"]
    sizes = {key: cfg["model"][key] for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size")}
    layout = "tp{}pp{}".format(*sizes.values())
    started = time.perf_counter()
    with stages.MemoryMeter() as memory:
        had_base = (folder / "base.nemo").exists()
        base = stages.make_base(folder)
        data = stages.make_data(folder)
        pretraining_seconds = time.perf_counter() - started
        # One folder per preset and layout: a run must not resume from another one's checkpoints.
        training = folder / f"training-{preset}-{layout}"
        trained = training / "adapter.nemo"
        arguments = stages.finetune_arguments(base, data, trained, cfg["seed"])
        arguments += [f"preset={preset}", f"exp_manager.explicit_log_dir={training}", f"trainer.devices={devices}"]
        arguments += [f"model.{key}={size}" for key, size in sizes.items()]
        finetuning_seconds = stages.run_command([*arguments, *cfg["overrides"]])
        answers = stages.evaluate(base, data, folder / "answers.json", [trained])
    run = json.loads((training / "metrics.json").read_text())
    before, after = answers["results"]["base"], answers["results"][str(trained)]
    metrics = {
        "exact_match_before": before["exact_match"],
        "exact_match_after": after["exact_match"],
        "test_examples": len(answers["examples"]),
        **{key: run[key] for key in _FROM_RUN},
        "wall_seconds": time.perf_counter() - started,
        "base_was_there": had_base,
        "pretraining_seconds": 0.0 if had_base else pretraining_seconds,
        "finetuning_seconds": finetuning_seconds,
        "peak_memory_bytes": memory.peak_bytes,
        "layout": layout,
        "preset": preset,
        "seed": cfg["seed"],
        "steps": len(run["steps"]),
    }
    _publish(folder, training, metrics, _table(answers["examples"], before["answers"], after["answers"]))


def _publish(folder: Path, training: Path, metrics: Mapping[str, Any], table: str) -> None:
    """Moves the results up, writes metrics.json and report.md, prints the report, and deletes the checkpoints."""
    for name in ("adapter.nemo", "loss.png"):
        (training / name).replace(folder / name)
    write_json(folder / "metrics.json", dict(metrics))
    text = _report(folder, metrics, table)
    write_atomically(folder / "report.md", text.encode())
    print(text)
    shutil.rmtree(training / "checkpoints", ignore_errors=True)


def _report(folder: Path, metrics: Mapping[str, Any], table: str) -> str:
    share = metrics["trained_parameters"] / metrics["lora_parameters"]
    return f"""
## German numbers in words, {metrics["preset"]} on {metrics["layout"]}

Exact match on {metrics["test_examples"]} held-out numbers: \
{metrics["exact_match_before"]:.1%} before, **{metrics["exact_match_after"]:.1%} after**.
Trained parameters: {metrics["trained_parameters"]:,}, {share:.1%} of LoRA's {metrics["lora_parameters"]:,} \
at the same rank, {metrics["trained_parameters"] / metrics["base_parameters"]:.2%} of the base's.
Time: {metrics["wall_seconds"]:.0f} s. Memory: {metrics["peak_memory_bytes"] / 2**30:.2f} GiB at most, all processes.

{table}

```
{metrics["parameter_table"]}

adapter   {folder / "adapter.nemo"} ({(folder / "adapter.nemo").stat().st_size:,} bytes)
picture   {folder / "loss.png"}
numbers   {folder / "metrics.json"}
answers   {folder / "answers.json"}
```
"""


def _table(examples: Sequence[Mapping[str, str]], before: Sequence[str], after: Sequence[str]) -> str:
    """Five prompts from the whole test set, with the answers of the base and of the adapted model."""
    rows = [("prompt", "base", "adapted", "right")]
    for index in range(0, len(examples), max(1, len(examples) // _SHOWN)):
        expected = examples[index]["output"].strip()
        mark = "yes" if after[index].strip() == expected else f"no: {expected}"
        rows.append((examples[index]["input"], before[index].strip(), after[index].strip(), mark))
    return markdown_table(rows[: _SHOWN + 1], padded=True)
