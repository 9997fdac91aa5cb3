# SPDX-License-Identifier: Apache-2.0
"""`tied-lora launch`: starts a fine-tuning run or a sweep, on SLURM or on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from omegaconf import DictConfig

from nemo_tied_lora.commands.hydra_flags import parser, print_config, print_notes, yaml_sources
from nemo_tied_lora.commands.task_data import check_task
from nemo_tied_lora.errors import ConfigError, report
from nemo_tied_lora.launching.submit import Launch, prepare, print_launch, run_here, submit
from nemo_tied_lora.launching.sweep import expand_short_keys
from nemo_tied_lora.planning.composing.compose import compose_config, compose_with_notes, plain
from nemo_tied_lora.planning.composing.dotted_keys import has_key
from nemo_tied_lora.planning.composing.yaml_sources import YamlSources

__all__ = ["SUMMARY", "main"]

SUMMARY = "start one fine-tuning run or a sweep, on SLURM or on this machine"

_EXAMPLES = """  tied-lora launch cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8 cluster.partition=gpu model=llama2_7b \\
      layout=tp8 model.restore_from_path=llama2_7b.nemo "model.data.train_ds.file_names=[train.jsonl]" \\
      "model.data.validation_ds.file_names=[validation.jsonl]" dry_run=true
  tied-lora launch cluster=slurm cluster.at_once=4 rank=2,8,32,128 preset=tl5,tl6 name=ranks ...
  tied-lora launch cluster=local layout=tp2 recipe=quickstart
All keys except dry_run, model= and those of cluster go to tied-lora finetune. rank is short for model.peft.tied_lora.rank.
"""
_OWN = ("dry_run", "cluster", "model")


def main(argv: list[str]) -> int:
    """Returns 0 for success, 2 if the configuration is refused, else the exit code of a run on this machine."""
    groups = ("cluster", "model", "layout", "preset", "data", "task", "optim", "recipe")
    options = parser("launch", SUMMARY, _EXAMPLES, groups).parse_intermixed_args(argv)
    own, arguments = _split([expand_short_keys(argument) for argument in options.overrides])
    try:
        sources = yaml_sources("finetune", options)
        settings = compose_config("launch", own, replace(sources, own=None))
        if options.cfg:
            return _print_configs(settings, arguments, sources, options)
        launch = prepare(plain(settings), arguments, sources)
        for cfg in launch.configs:
            check_task(plain(cfg))
        print_notes("launch", launch.notes)
        if settings.dry_run:
            print_launch(launch)
            return 0
        return run_here(launch) if launch.job.cluster.kind == "local" else _submit(launch)
    except ConfigError as error:
        return report("launch", error)


def _submit(launch: Launch) -> int:
    number = submit(launch)
    job = launch.job
    print(f"submitted: job {number}, {job.nodes} nodes x {job.ranks_per_node} ranks, {len(launch.runs)} run(s)")
    print(f"folder:    {job.folder}")
    print(f"the queue: squeue --job {number}")
    return 0


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides of launch, overrides of finetune)."""
    own: list[str] = []
    rest: list[str] = []
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        (own if key in _OWN or key.startswith("cluster.") else rest).append(override)
    return own, rest


def _print_configs(
    settings: DictConfig, arguments: list[str], sources: YamlSources, options: argparse.Namespace
) -> int:
    finetune, notes = compose_with_notes("finetune", arguments, sources)
    print_notes("launch", notes)
    section = options.package
    if section is not None:
        print_config(settings if has_key(settings, section) else finetune, options)
        return 0
    print_config(settings, options)
    print("\n# finetune:")
    print_config(finetune, options)
    return 0
