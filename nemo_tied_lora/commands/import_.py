# SPDX-License-Identifier: Apache-2.0
"""`tied-lora import`: converts a Hugging Face model to a base `.nemo`, or fits a tied adapter to a LoRA. Needs no GPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_tied_lora.commands.distributed_command import run_command
from nemo_tied_lora.commands.local_command import check_output, check_paths, run_composed
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.conversion.gguf_file import GgufFile, read_gguf
from nemo_tied_lora.conversion.hf_config_file import read_hf_config
from nemo_tied_lora.conversion.import_room import import_room_problem
from nemo_tied_lora.conversion.nemo_lora_config import read_nemo_lora_config
from nemo_tied_lora.conversion.peft_lora_config import read_peft_config
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.base_config import base_model_config
from nemo_tied_lora.tables import text_table

__all__ = ["SOURCES", "SUMMARY", "main"]

SUMMARY = "make a base .nemo of a Hugging Face model, or fit a tied adapter to a LoRA"
SOURCES = ("hf-base", "lora")

_GROUPS = ("preset",)
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_EXAMPLES = """  tied-lora import from=hf-base path=my-hf-folder output=base.nemo
  tied-lora import from=hf-base path=SmolLM2-135M-Instruct.Q4_1.gguf output=base.nemo
  tied-lora import from=hf-base path=my-hf-folder output=base.nemo dtype=bfloat16 verify=false
  tied-lora import from=lora path=my-peft-folder base=base.nemo output=adapter.nemo rank=16
  tied-lora import from=lora path=nemo_lora.nemo output=adapter.nemo rank=16 preset=tl5
"""


def main(argv: list[str]) -> int:
    """The command; see `run_composed` and `run_command` for what it returns."""
    return run_composed("import", argv, partial(_import, argv), summary=SUMMARY, examples=_EXAMPLES, groups=_GROUPS)


def _import(argv: list[str], cfg: Mapping[str, Any]) -> int:
    """Fits a LoRA in this process, without Megatron; converts a base on one rank of NeMo."""
    if cfg["from"] == "lora":
        return _fit(cfg)
    return run_command(
        "import",
        argv,
        summary=SUMMARY,
        examples=_EXAMPLES,
        groups=_GROUPS,
        check=_check,
        run=lambda cfg, rank: _run(cfg),
    )


def _fit(cfg: Mapping[str, Any]) -> int:
    config = _check_lora(cfg)
    from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
    from nemo_tied_lora.conversion.lora_to_tied import fit_adapter, read_lora
    from nemo_tied_lora.progress import Progress

    base = None if cfg["base"] is None else base_model_config(cfg["base"], key="base")
    lora = read_lora(Path(cfg["path"]), base)
    with Progress(desc="fitting", unit="iteration") as bar:

        def progress(target: str, error: float) -> None:
            bar.set_postfix_str(f"{target}: relative error {error:.3e}", refresh=False)
            bar.update()

        limits = {"max_iterations": cfg["max_iterations"], "tolerance": cfg["fit_tolerance"]}
        fitted = fit_adapter(lora, config, _preset(cfg), **limits, progress=progress)
    errors = {t: dict(zip(fitted.shapes[t].layers, fit.errors, strict=True)) for t, fit in fitted.fits.items()}
    source = {"from": Path(cfg["path"]).name, "relative_errors": errors}
    facts = {"base": {key: lora.base.get(key) for key in _BASE_KEYS}, "fitted": source}
    try:
        write_adapter(Path(cfg["output"]), fitted.config, fitted.shapes, fitted.state, facts)
    except OSError as error:
        raise ConfigError([f"output={cfg['output']}: {error}"]) from error
    for note in fitted.notes:
        print(f"note: {note}")
    print(_table(fitted.fits, errors, fitted.bounds))
    print(f"written: {cfg['output']} ({Path(cfg['output']).stat().st_size:,} bytes)")
    return _check_written(Path(cfg["output"]), lora, fitted.fits)


def _check_written(path: Path, lora: Any, fits: Mapping[str, Any]) -> int:
    """Reads the file back; returns 1 if it is further from the LoRA than the fit, beyond float32's rounding."""
    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
    from nemo_tied_lora.conversion.lora_to_tied import errors_of_file

    found = errors_of_file(lora, read_adapter(path))
    errors = ", ".join(f"{target} {error:.2e}" for target, error in found.items())
    print(f"check: read back, its relative error over all layers is {errors}")
    wrong = [target for target, error in found.items() if not error <= fits[target].history[-1] + _ROUNDING]
    if wrong:
        print(
            f"tied-lora import: {path} is wrong: it is further away than the fit: {', '.join(wrong)}", file=sys.stderr
        )
    return 1 if wrong else 0


# Factors are stored in float32. This is a few of its rounding steps, relative to the delta.
_ROUNDING = 1e-5


_BASE_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "activation",
    "normalization",
    "position_embedding_type",
    "share_embeddings_and_output_weights",
)


def _table(fits: Mapping[str, Any], errors: Mapping[str, Mapping[int, float]], bounds: Mapping[str, float]) -> str:
    """||delta - fit|| / ||delta|| for each layer and target, and for each target as a whole, with its lower bound."""
    layers = sorted({layer for by_layer in errors.values() for layer in by_layer})
    rows = [["relative error", *errors]]
    rows += [[f"layer {layer}", *(f"{by_layer[layer]:.2e}" for by_layer in errors.values())] for layer in layers]
    rows += [["all layers", *(f"{fit.history[-1]:.2e}" for fit in fits.values())]]
    rows += [["bound", *(f"{bounds[target]:.2e}" for target in errors)]]
    rounds = ", ".join(f"{target} {len(fit.history) - 1}" for target, fit in fits.items())
    note = "bound: no A of this rank that all layers share can get a smaller error"
    return f"{text_table(rows)}\n{note}; iterations: {rounds}"


def _check_lora(cfg: Mapping[str, Any]) -> TiedLoraConfig:
    """Checks the arguments of from=lora and the LoRA's own configuration, before torch is imported.

    Raises:
        ConfigError: all problems together.
    """
    check_paths(cfg, "path", "base", "output")
    problems = Problems()
    check_output(problems, cfg["output"], [cfg["path"], cfg["base"]])
    if cfg["path"] is None or not Path(cfg["path"]).exists():
        problems.append(f"path={cfg['path']}: no such file or folder; name peft's folder or NeMo's LoRA .nemo")
    else:
        path = Path(cfg["path"])
        problems.attempt(read_peft_config if path.is_dir() else read_nemo_lora_config, path)
    if cfg["base"] is not None and not Path(cfg["base"]).exists():
        problems.append(f"base={cfg['base']}: no such file")
    elif cfg["base"] is not None and (Path(cfg["base"]) / "config.json").is_file():
        fix = "make its .nemo first: tied-lora import from=hf-base"
        problems.append(f"base={cfg['base']}: is a Hugging Face folder; {fix}")
    problems.whole_number("max_iterations", cfg["max_iterations"])
    if not isinstance(cfg["fit_tolerance"], (int, float)) or cfg["fit_tolerance"] < 0:
        problems.append(f"fit_tolerance={cfg['fit_tolerance']}: must be at least 0")
    if _preset(cfg) == "adalora":
        problems.append(
            "preset=adalora: a LoRA says nothing about what its training would prune; choose lora, tl5, tl6 or vera"
        )
    fields = {"preset": _preset(cfg), "rank": cfg["rank"], "seed": cfg["seed"]}
    return problems.build(TiedLoraConfig.from_mapping, fields)


def _preset(cfg: Mapping[str, Any]) -> str:
    return str(((cfg["model"].get("peft") or {}).get("tied_lora") or {}).get("preset"))


def _run(cfg: DictConfig) -> None:
    from nemo_tied_lora.conversion.from_hf_base import import_hf_base

    try:
        keys, comparison = import_hf_base(cfg)
    except OSError as error:
        raise ConfigError([f"output={cfg.output}: cannot be written: {error}; an older file is unchanged"]) from error
    for note in keys.notes:
        print(f"note: {note}")
    print(f"written: {cfg.output} ({Path(cfg.output).stat().st_size:,} bytes)")
    if comparison is None:
        print("check: none (verify=false)")
        return
    print(
        f"check: restored from the file, its logits differ from transformers' by at most "
        f"{comparison.largest_difference:.2e} ({comparison.relative:.1e} of the largest)"
    )
    for text in comparison.differing_texts:
        print(f"check: the tokenizer gives other ids than Hugging Face's for {text!r}")
    if comparison.not_compared is not None:
        print(f"check: the tokenizers could not be compared: {comparison.not_compared}", flush=True)
    elif not comparison.differing_texts:
        print("check: the tokenizer gives Hugging Face's ids for every sample text", flush=True)


def _check(cfg: Mapping[str, Any]) -> None:
    """Checks the arguments of from=hf-base and config.json, before torch is imported.

    Raises:
        ConfigError: all problems together.
    """
    check_paths(cfg, "path", "output")
    problems = Problems()
    problems.one_of("from", cfg["from"], SOURCES)
    gguf = problems.attempt(_check_source, cfg["path"])
    check_output(problems, cfg["output"], [cfg["path"]])
    problems.one_of("dtype", cfg["dtype"], _DTYPES)
    if not problems:
        numbers = 0 if gguf is None else sum(gguf.numbers.values())
        folder = Path(cfg["path"]) if gguf is None else None
        room = import_room_problem(Path(cfg["output"]), cfg["dtype"], folder=folder, gguf_numbers=numbers)
        problems += [f"output={cfg['output']}: {room}"] if room else []
    problems.whole_number("vocab_multiple", cfg["vocab_multiple"])
    if not isinstance(cfg["tolerance"], (int, float)) or cfg["tolerance"] <= 0:
        problems.append(f"tolerance={cfg['tolerance']}: must be greater than 0")
    if cfg["trainer"]["devices"] != 1 or cfg["trainer"]["num_nodes"] != 1:
        problems.append(
            "trainer.devices, trainer.num_nodes: must be 1: import runs on one rank; the .nemo loads on any layout"
        )
    problems.raise_if_any()


def _check_source(path: str | None) -> GgufFile | None:
    """Checks that `path` is a Hugging Face folder or a GGUF file that can be imported. Returns the file's description.

    Raises:
        ConfigError: all problems together.
    """
    if path is not None and Path(path).is_file():
        return read_gguf(Path(path))
    if path is None or not Path(path).is_dir():
        raise ConfigError([f"path={path}: no such folder or file; name a Hugging Face model's folder, or a GGUF file"])
    if not (Path(path) / "config.json").is_file():
        is_lora = (Path(path) / "adapter_config.json").is_file()
        files = sorted(Path(path).glob("*.gguf"))
        what = "is a LoRA, not a model; import it with from=lora" if is_lora else "holds no config.json; name a model"
        raise ConfigError([f"path={path}: {what if not files else f'write path={files[0]}'}"])
    read_hf_config(Path(path))
    return None
