# SPDX-License-Identifier: Apache-2.0
"""`tied-lora quickstart`: fine-tunes a real language model on two ranks of a laptop, and shows what it has learned."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.local_command import check_paths, run_composed
from nemo_tied_lora.errors import ConfigError, Problems, is_whole_number, report
from nemo_tied_lora.files import folder_problem
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.parallel_layout import Layout, check

__all__ = ["SUMMARY", "main"]

SUMMARY = "fine-tune SmolLM2-135M on two ranks of this machine, and show the result"

_EXAMPLES = """  tied-lora quickstart
  tied-lora quickstart layout=tp3 preset=tl5
  tied-lora quickstart base=hub "overrides=['model.peft.tied_lora.rank=32','trainer.max_steps=200']"
  tied-lora quickstart model=tiny layout=tp2 folder=runs/tiny
"""
_MODELS = ("smollm2", "tiny")
_LARGEST_SEED = 2**32 - 1


def main(argv: list[str]) -> int:
    """Returns 0 for success, the exit code of the stage that failed, or 2 if the configuration is refused."""
    if any(word.partition("=")[0] in ("--config-dir", "-cd") for word in argv):
        problem = "--config-dir: the stages would not find its groups; use tied-lora finetune, then tied-lora evaluate"
        return report("quickstart", ConfigError([problem]))
    groups = ("model", "task", "layout", "preset")
    return run_composed("quickstart", argv, _quickstart, summary=SUMMARY, examples=_EXAMPLES, groups=groups)


def _quickstart(cfg: dict[str, Any]) -> int:
    model = cfg["model"].get("name")
    if model not in _MODELS:
        raise ConfigError([f"model: the quickstart has only {' and '.join(_MODELS)}; base= takes a model of your own"])
    if cfg["folder"] in (None, ""):
        cfg["folder"] = {"smollm2": "runs/smollm2", "tiny": "runs/quickstart"}[model]
    problems = Problems()
    problems.attempt(check_paths, cfg, "folder", "base")
    if not isinstance(cfg["overrides"], list) or not all(isinstance(word, str) for word in cfg["overrides"]):
        problems.append(
            f"overrides={cfg['overrides']!r}: must be a list of texts: \"overrides=['trainer.max_steps=200']\""
        )
    problems.raise_if_any()
    # These import psutil, which --help does not need.
    from nemo_tied_lora.commands.demo.run import check_overrides, run
    from nemo_tied_lora.commands.demo.smollm2_base import SMOLLM2
    from nemo_tied_lora.commands.demo.stages import run_stages
    from nemo_tied_lora.commands.demo.tiny_base import TINY
    from nemo_tied_lora.commands.study.claims import claim

    chosen = {"smollm2": SMOLLM2, "tiny": TINY}[model]
    if not is_whole_number(cfg["seed"]) or cfg["seed"] > _LARGEST_SEED:
        problems.append(f"seed={cfg['seed']!r}: must be a whole number from 1 to {_LARGEST_SEED}")
    problem = folder_problem(Path(cfg["folder"]))
    problems += [f"folder={cfg['folder']}: {problem}"] if problem else []
    problems.attempt(chosen.check, cfg)
    problems += _layout_problems(cfg, problems.attempt(chosen.sizes, cfg))
    problems.raise_if_any()
    check_overrides(chosen, cfg)
    with claim(Path(cfg["folder"])) as claimed:
        if claimed is None:
            problem = (
                "another quickstart works there, or one that was stopped still saves; wait, or name another folder"
            )
            raise ConfigError([f"folder={cfg['folder']}: {problem}"])
        os.set_inheritable(claimed, True)  # a stage holds the claim too
        return run_stages("quickstart", lambda values: run(chosen, values), cfg)


def _layout_problems(cfg: Mapping[str, Any], model: Mapping[str, Any] | None) -> list[str]:
    """In what the layout does not fit this machine or the model, if its sizes are known."""
    problems: list[str] = []
    if model is not None:
        sizes = {"trainer": cfg["trainer"], "model": {**cfg["model"], "micro_batch_size": 1, "global_batch_size": 4}}
        problems += check(Architecture.from_model_config(model), Layout.from_config(sizes))
    if cfg["trainer"]["num_nodes"] > 1:
        problems.append("layout: the quickstart runs on one machine; choose single, tp2, tp3, pp2 or tp2pp2")
    return problems
