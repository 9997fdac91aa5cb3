# SPDX-License-Identifier: Apache-2.0
"""`tied-lora merge`: adds adapters to a base's weights and writes one `.nemo`.

Before the file gets its name, ranks of NeMo compare its logits with those of base + adapters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_tied_lora.commands.distributed_command import run_command
from nemo_tied_lora.commands.local_command import check_output, run_composed
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.launching.local_ranks import start_ranks
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.base_config import of_a_pattern, usable_base
from nemo_tied_lora.planning.nemo_model_config import adapter_problems
from nemo_tied_lora.planning.parallel_layout import Layout, check
from nemo_tied_lora.planning.rank_variables import is_rank
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization

__all__ = ["SUMMARY", "main"]

SUMMARY = "add adapters to a base model's weights and write one .nemo that needs no adapter"

_EXAMPLES = """  tied-lora merge base=base.nemo adapter=adapter.nemo output=merged.nemo
  tied-lora merge base=base.nemo "adapters=[a.nemo,b.nemo]" "weights=[0.7,0.3]" output=merged.nemo layout=tp2
"""
# The environment variable that tells the ranks of the check which files to compare.
_TASK = "TIED_LORA_MERGE_CHECK"


def main(argv: list[str]) -> int:
    """The command; see `run_composed` for what it returns. The ranks that it starts run this function too."""
    if is_rank() and _TASK in os.environ:
        return run_command(
            "merge",
            argv,
            summary=SUMMARY,
            examples=_EXAMPLES,
            groups=("layout",),
            check=lambda cfg: None,  # the process that started the ranks has checked everything
            run=lambda cfg, rank: _check_on_a_rank(cfg),
        )
    return run_composed("merge", argv, partial(_run, argv), summary=SUMMARY, examples=_EXAMPLES, groups=("layout",))


def _run(argv: list[str], cfg: dict[str, Any]) -> int:
    model, layout = _check_settings(cfg)
    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
    from nemo_tied_lora.conversion.merging.merge import merge_into

    base, output = Path(cfg["base"]), Path(cfg["output"])
    paths, weights = _adapters(cfg)
    adapters = [(path, read_adapter(path), weight) for path, weight in zip(paths, weights, strict=True)]
    _check_shapes(model, adapters)
    try:
        with merge_into(output, base, model, adapters, allow_other_base=cfg["allow_other_base"]) as (
            candidate,
            report,
        ):
            print(
                f"merged: {report.elements:,} elements of {len(report.changed)} weights, the largest change "
                f"{report.largest_change:.3g}, in {report.dtype}",
                flush=True,
            )
            if cfg["verify"]:
                _verify(argv, candidate, output, report.dtype, layout)
            else:
                _say_unmeasured(adapters)
    except OSError as error:
        raise ConfigError([f"output={output}: cannot be written: {error}; an older file is unchanged"]) from error
    print(f"written: {output} ({output.stat().st_size:,} bytes)")
    return 0


def _verify(argv: list[str], candidate: Path, output: Path, dtype: str, layout: Layout) -> None:
    """Compares the merged file with base + adapters. Starts processes for it, because they hold whole models.

    Raises:
        ConfigError: the logits differ, or the comparison failed.
    """
    record = output.with_suffix(".check.json")
    os.environ[_TASK] = json.dumps({"candidate": str(candidate), "record": str(record), "dtype": dtype})
    try:
        code = start_ranks("nemo_tied_lora.commands.main", ["merge", *argv], layout.devices)
    finally:
        del os.environ[_TASK]
    if code:
        problem = f"the check of the merged model failed (exit code {code}); {output} was not written"
        raise ConfigError([f"{problem}; see above, or {record}"])


def _say_unmeasured(adapters: list[tuple[str, Any, float]]) -> None:
    """Says which adapters were trained on a quantised base: on another one they do not do the same."""
    for path, file, _ in adapters:
        precision = file.yaml.get("base_precision")
        if BaseQuantization.from_precision(precision) is not None:
            print(
                f"note: {path}: was trained on a base in {precision}; verify=true measures how much the merged model differs "
                "from that base + adapter",
                flush=True,
            )


def _check_on_a_rank(cfg: DictConfig) -> None:
    import torch

    from nemo_tied_lora.conversion.merging.verify_merge import compare_with_merged

    task = json.loads(os.environ[_TASK])
    paths, weights = _adapters(cfg)
    compare_with_merged(cfg, list(zip(paths, weights, strict=True)), task["candidate"], task["record"], task["dtype"])
    torch.distributed.barrier()


def _check_settings(cfg: Mapping[str, Any]) -> tuple[dict[str, Any], Layout]:
    """Checks the arguments before any weight is read; returns (the base's config, the layout of the check).

    Raises:
        ConfigError: all problems together.
    """
    problems = Problems()
    model = problems.attempt(usable_base, cfg["base"], key="base") or {}
    if (cfg["adapter"] is None) == (cfg["adapters"] is None):
        problems.append("adapter, adapters: give one of them: adapter=a.nemo or adapters=[a.nemo,b.nemo]")
    paths, weights = _adapters(cfg)
    for path in paths:
        problems += adapter_problems(path, "adapter")
    if len(weights) != len(paths) or not all(type(w) in (int, float) and w - w == 0 for w in weights):
        problems.append(f"weights={cfg['weights']}: must hold one finite number for each adapter")
    check_output(problems, cfg["output"], [cfg["base"], *paths])
    for key in ("verify", "allow_other_base"):
        problems.flag(key, cfg[key])
    prompts = cfg["prompts"]
    if prompts is not None and not (
        isinstance(prompts, list) and prompts and all(isinstance(p, str) for p in prompts)
    ):
        problems.append(f"prompts={prompts!r}: must be a list of texts")
    layout = problems.attempt(Layout.from_config, {"model": cfg["model"], "trainer": cfg["trainer"]})
    if layout is not None and layout.num_nodes > 1:
        problems.append("trainer.num_nodes: the check starts its ranks on this machine; set it to 1")
    arch = problems.attempt(Architecture.from_model_config, model) if model and cfg["verify"] else None
    if layout is not None and arch is not None:
        problems += check(arch, layout)
    problems.raise_if_any()
    assert layout is not None
    return model, layout


def _check_shapes(model: Mapping[str, Any], adapters: list[tuple[str, Any, float]]) -> None:
    """Compares the shapes and layers of the adapters with those of the base.

    Raises:
        ConfigError: lists every difference.
    """
    from nemo_tied_lora.config import TiedLoraConfig
    from nemo_tied_lora.planning.architecture import selected_linears

    arch = Architecture.from_model_config(model)
    linears = selected_linears(arch, TiedLoraConfig())
    problems = Problems()
    for path, file, _ in adapters:
        problems += of_a_pattern(path, file.yaml)
        for target, shape in file.shapes.items():
            known = linears.get(target)
            if known is not None and known.sides != shape.sides:
                problems.append(
                    f"{path}: {target}: the adapter was trained on {shape.in_features} x {shape.out_features} (in x out), "
                    f"this base has {known.in_features} x {known.out_features}"
                )
        deepest = max(layer for shape in file.shapes.values() for layer in shape.layers)
        if deepest >= arch.num_layers:
            problems.append(
                f"{path}: it has an update for layer {deepest}; this base has layers 0 to {arch.num_layers - 1}"
            )
    problems.raise_if_any()


def _adapters(cfg: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    paths = [str(cfg["adapter"])] if cfg["adapter"] is not None else [str(path) for path in cfg["adapters"] or []]
    return paths, [1.0] * len(paths) if cfg["weights"] is None else list(cfg["weights"])
