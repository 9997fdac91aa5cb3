#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Makes the table of recipes in docs/cluster.md: composes each recipe as `tied-lora launch` does, and plans it.

python benchmarks/cluster_recipes.py          prints the table
python benchmarks/cluster_recipes.py --write  writes it into the page
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.plan import plan_of
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.tables import markdown_table

__all__ = ["PAGE", "RECIPES", "finetune_overrides", "in_page", "table"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cluster.md"

_FULL = "model.activations_checkpoint_granularity=full model.activations_checkpoint_method=uniform"
RECIPES = (
    "model=llama2_7b recipe=llama2 cluster.nodes=1 layout=tp2",
    "model=llama2_7b recipe=llama2 cluster.nodes=2 layout=tp2",
    "model=llama2_7b recipe=llama2 cluster.nodes=2 layout=tp8",
    "model=llama2_13b recipe=llama2 cluster.nodes=2 layout=tp4",
    "model=llama2_13b recipe=llama2 cluster.nodes=2 layout=tp8",
    "model=llama2_70b recipe=llama2 cluster.nodes=2 layout=tp8",
    f"model=llama2_70b recipe=llama2 cluster.nodes=2 layout=tp8 {_FULL} model.activations_checkpoint_num_layers=1",
    "model=llama2_70b recipe=llama2 cluster.nodes=4 layout=tp8pp4",
    "model=llama2_70b recipe=llama2 cluster.nodes=8 layout=tp8pp4",
)
"""Arguments after `tied-lora launch cluster=slurm cluster.gpus_per_node=8`."""

_GPUS = 8
_BETWEEN = re.compile(r"(<!-- recipes: [^\n]*-->\n).*?(<!-- end of the recipes -->)", flags=re.S)
# The keys that decide the memory. finetune and plan share them.
_PLANNED = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "micro_batch_size",
    "global_batch_size",
    "megatron_amp_O2",
    "hidden_dropout",
    "activations_checkpoint_granularity",
    "activations_checkpoint_method",
    "activations_checkpoint_num_layers",
)


def finetune_overrides(line: str) -> list[str]:
    """A recipe without the arguments that only launch takes."""
    return [word for word in shlex.split(line) if not word.startswith(("model=", "cluster."))]


def planned(line: str) -> dict[str, Any]:
    """`tied-lora plan`'s numbers for a recipe, with the settings that finetune composes."""
    words = dict(word.split("=", 1) for word in shlex.split(line))
    run = plain(compose_config("finetune", finetune_overrides(line)))
    settings = plain(compose_config("plan", [f"model={words['model']}"]))
    settings["model"] |= {key: run["model"][key] for key in _PLANNED}
    settings["model"]["encoder_seq_length"] = run["model"]["data"]["train_ds"]["max_seq_length"]
    settings["trainer"] |= {"num_nodes": int(words["cluster.nodes"]), "devices": _GPUS}
    settings["trainer"]["precision"] = run["trainer"]["precision"]
    return plan_of(settings)


def table() -> str:
    """A Markdown table with one row per recipe, then the recipes."""
    rows = [["", "base", "nodes x GPUs", "TP x PP x DP", "base weights", "adapter", "activations", "sum"]]
    for number, line in enumerate(RECIPES, 1):
        result = planned(line)
        layout, memory = result["layout"], result["memory"]
        sizes = " x ".join(str(layout[f"{name}_size"]) for name in ("tp", "pp", "dp"))
        parts = [f"{memory[key] / 2**30:.2f}" for key in ("base", "adapter", "activations", "sum")]
        name = re.sub(r"llama2_(\d+)b", r"LLaMA2-\1B", line.split()[0].partition("=")[2])
        rows.append([str(number), name, f"{layout['num_nodes']} x {_GPUS}", sizes, *parts])
    lines = [f"    {number}  {line}" for number, line in enumerate(RECIPES, 1)]
    return "\n".join([markdown_table(rows), "", *lines]) + "\n"


def in_page(page: str) -> str:
    """The page with the current table."""
    assert _BETWEEN.search(page), "the page has no place for the table"
    return _BETWEEN.sub(lambda match: f"{match[1]}\n{table()}\n{match[2]}", page)


def main() -> None:
    """Prints the table, or writes it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write it into docs/cluster.md")
    if parser.parse_args().write:
        PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
