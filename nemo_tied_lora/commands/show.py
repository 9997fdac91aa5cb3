# SPDX-License-Identifier: Apache-2.0
"""`tied-lora show`: shows an adapter's file as tables and a picture. Imports neither NeMo nor Megatron."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_tied_lora.commands.local_command import run_composed
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.nemo_model_config import adapter_problems
from nemo_tied_lora.tables import text_table

if TYPE_CHECKING:
    from nemo_tied_lora.adapter.update_statistics import LayerFacts
    from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile

__all__ = ["SUMMARY", "main"]

SUMMARY = "print an adapter's config, base, parameters and norms, and draw what it learned layer by layer"

_FORMATS = ("table", "json")
_EXAMPLES = """  tied-lora show adapter=adapter.nemo
  tied-lora show adapter=adapter.nemo output=null format=json
"""


def main(argv: list[str]) -> int:
    """The command; see `run_composed` for what it returns."""
    return run_composed("show", argv, _run, summary=SUMMARY, examples=_EXAMPLES)


def _run(cfg: dict[str, Any]) -> int:
    picture = _picture_path(cfg)
    from nemo_tied_lora.adapter.update_statistics import inspect_layers
    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter

    path = Path(cfg["adapter"])
    file = read_adapter(path)
    layers = inspect_layers(file.config, file.shapes, file.state)
    if picture is not None:
        from nemo_tied_lora.commands.show_picture import draw_adapter

        try:
            draw_adapter(picture, layers, f"{path.name}: {_title(file)}")
        except OSError as error:
            raise ConfigError([f"output={picture}: cannot be written: {error}"]) from error
    if cfg["format"] == "json":
        print(json.dumps(_as_json(path, file, layers, picture), indent=2))
    else:
        print(_as_text(path, file, layers))
        print("\n" + (f"picture   {picture}" if picture else "output=null: no picture"))
    return 0


def _picture_path(cfg: Mapping[str, Any]) -> Path | None:
    """The path of the picture; None if output=null.

    Raises:
        ConfigError: all problems together.
    """
    problems = Problems()
    problems.one_of("format", cfg["format"], _FORMATS)
    problems += adapter_problems(cfg["adapter"], "adapter")
    if cfg["output"] is not None and Path(str(cfg["output"])).suffix != ".png":
        problems.append(f"output={cfg['output']}: must end in .png; null draws nothing")
    problems.raise_if_any()
    return None if cfg["output"] is None else Path(cfg["output"])


def _title(file: AdapterFile) -> str:
    tied = " ".join(file.config.tied) or "nothing"
    return f"rank {file.config.rank}, trained {' '.join(file.config.trained)}, tied {tied}"


def _as_json(path: Path, file: AdapterFile, layers: Sequence[LayerFacts], picture: Path | None) -> dict[str, Any]:
    from nemo_tied_lora.adapter.param_count import parameter_counts

    counts = parameter_counts(file.shapes, file.config)
    return {
        "adapter": str(path),
        "bytes": path.stat().st_size,
        "format_version": file.yaml["format_version"],
        "config": file.config.as_dict(),
        "base": file.yaml.get("base"),
        "base_precision": file.yaml.get("base_precision"),
        "versions": file.yaml.get("versions"),
        "training": file.yaml.get("training"),
        "trained_parameters": sum(counts.values()),
        "targets": {t: {**s.to_dict(), "trained_parameters": counts[t]} for t, s in file.shapes.items()},
        "layers": [dataclasses.asdict(facts) for facts in layers],
        "ranks": file.ranks() or None,
        "picture": None if picture is None else str(picture),
    }


def _as_text(path: Path, file: AdapterFile, layers: Sequence[LayerFacts]) -> str:
    config = file.config
    alpha = f"alpha {config.alpha_by_rank if config.alpha is None else config.alpha:g}"
    if config.alpha_rule == "sqrt":
        alpha += f" / sqrt(rank), scale {config.scale:.4g}"
    dtype = str(next(iter(file.state.values())).dtype).removeprefix("torch.")
    lines = [
        f"adapter   {path} ({path.stat().st_size:,} bytes, {dtype}, format version {file.yaml['format_version']})",
        f"config    {_title(file)}, {alpha}, dropout {config.dropout:g}, seed {config.seed}",
        *_rank_lines(file),
        *_base_lines(file.yaml),
        "",
        text_table(_parameter_rows(file), total=True),
        "",
        text_table(_layer_rows(layers, file.ranks())),
    ]
    return "\n".join(lines)


def _rank_lines(file: AdapterFile) -> list[str]:
    """What a rank budget has left; no line without one."""
    ranks = file.ranks().values()
    if not ranks:
        return []
    from nemo_tied_lora.adapter.rank_budget.masks import live_atoms

    live = live_atoms(file.config, file.masks).values() if file.config.tied else ()
    atoms = f"; {sum(int(a.sum()) for a in live)} of {sum(map(len, live))} shared atoms are in use" if live else ""
    mean = sum(ranks) / len(ranks)
    return [f"ranks     {min(ranks)} to {max(ranks)} after pruning, mean {mean:.2f} of {file.config.rank}{atoms}"]


def _base_lines(description: Mapping[str, Any]) -> list[str]:
    base = description.get("base") or {}
    arch, prints = base.get("architecture") or base, base.get("fingerprint") or {}
    sizes = f"{arch.get('num_layers', '?')} layers, hidden {arch.get('hidden_size', '?')}"
    if arch.get("hybrid_layer_pattern"):
        sizes += f", pattern {arch['hybrid_layer_pattern']}"
    lines = [f"base      {base.get('name') or 'unnamed'}: {sizes}, fingerprint {prints.get('value', 'not recorded')}"]
    lines += (
        [f"precision {description['base_precision']}, of the base in training"]
        if description.get("base_precision")
        else []
    )
    tokenizer = base.get("tokenizer") or {}
    if tokenizer.get("sha256"):
        lines.append(
            f"tokenizer {tokenizer.get('kind')}, {tokenizer.get('vocab_size')} pieces, {tokenizer['sha256'][:12]}"
        )
    for name in ("versions", "training"):
        facts = description.get(name) or {}
        if facts:
            values = ", ".join(f"{key} {value}" for key, value in facts.items() if not isinstance(value, Mapping))
            lines.append(f"{name:<9} {values}")
    return lines


def _parameter_rows(file: AdapterFile) -> list[tuple[str, ...]]:
    from nemo_tied_lora.adapter.param_count import parameter_counts

    counts = parameter_counts(file.shapes, file.config)
    rows = [("target", "in", "out", "layers", "trained parameters")]
    for target, shape in file.shapes.items():
        sides = (str(shape.in_features), str(shape.out_features))
        rows.append((target, *sides, str(len(shape.layers)), f"{counts[target]:,}"))
    return [*rows, ("total", "", "", "", f"{sum(counts.values()):,}")]


def _layer_rows(layers: Sequence[LayerFacts], ranks: Mapping[str, int]) -> list[tuple[str, ...]]:
    """ranks: after pruning, as {"layers.7.linear_qkv": 3}; empty: no such column."""
    left = ("rank",) if ranks else ()
    rows: list[tuple[str, ...]] = [
        ("layer", "linear", *left, "|u|", "|v|", "|A|", "|B|", "|update|", "effective rank")
    ]
    for facts in layers:
        norms = [f"{facts.norms[f]:.4g}" if f in facts.norms else "1 each" for f in "uvAB"]
        kept = [str(ranks[f"layers.{facts.layer}.{facts.target}"])] if ranks else []
        rows.append(
            (str(facts.layer), facts.target, *kept, *norms, f"{facts.update_norm:.4g}", f"{facts.effective_rank:.2f}")
        )
    return rows
