# SPDX-License-Identifier: Apache-2.0
"""Checks the numbers of the data, the model, the watchdog and generation against each other. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import Problems, is_number, is_whole_number

__all__ = ["generation_lines", "generation_number_problems", "number_lines", "number_problems"]

_METRICS = ("exact_string_match", "rouge", "token_f1", "loss")
# NeMo 2.4 names these too, but builds them in a way that torchmetrics refuses since its release 0.11.
_BROKEN_METRICS = (
    *("accuracy", "average_precision", "f1", "wer", "bleu"),
    *("pearson_corr_coef", "spearman_corr_coef", "matthews_corr_coef"),
)
_MAX_SEED = (1 << 32) - 1
# operations.md: finished, an error, refused, stopped by a guard, ended by the watchdog.
_TAKEN_CODES = (0, 1, 2, 3, 70)
_SUM_TOLERANCE = 1e-3


def number_problems(cfg: Mapping[str, Any]) -> Problems:
    """Checks a configuration of finetune or pretrain."""
    model, problems = cfg["model"], Problems()
    seed = model.get("seed")
    if seed is not None and not (is_whole_number(seed) and seed <= _MAX_SEED):
        problems.append(f"model.seed={seed!r}: must be a whole number from 1 to {_MAX_SEED}")
    for name in ("hidden_dropout", "attention_dropout", "ffn_dropout"):
        value = model.get(name)
        if value is not None and not (is_number(value) and 0 <= value < 1):
            problems.append(f"model.{name}={value!r}: must be a number of at least 0 and below 1, a probability")
    problems += _recomputation_problems(model)
    code = (cfg.get("preemption") or {}).get("exit_code")
    if is_whole_number(code, 0) and code in _TAKEN_CODES:
        problems.append(f"preemption.exit_code={code}: has another meaning (docs/operations.md); 75 is the default")
    for name in ("train_ds", "validation_ds", "test_ds"):
        section = (model.get("data") or {}).get(name)
        if isinstance(section, Mapping) and (section.get("file_names") or name != "test_ds"):
            problems += _dataset_problems(f"model.data.{name}", section)
            problems += _sampling_problems(section) if name == "train_ds" else _metric_problems(name, section)
            if name != "train_ds":
                limit = "limit_val_batches" if name == "validation_ds" else "limit_test_batches"
                problems += _limit_problems(name, section, limit, cfg["trainer"].get(limit))
    if model.get("megatron_amp_O2") is True and str(cfg["trainer"].get("precision")) == "32":
        problems.append("model.megatron_amp_O2=true: not possible with trainer.precision=32; set it to false, or bf16")
    return problems


def number_lines(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Yields what a user should know of numbers that have no problems."""
    weights, files = (cfg["model"]["data"]["train_ds"].get(key) for key in (_PROBABILITIES, "file_names"))
    total = sum(weights)
    if abs(total - 1) > _SUM_TOLERANCE:
        shares = ", ".join(
            f"{Path(str(file)).name} {weight / total:.1%}" for file, weight in zip(files, weights, strict=True)
        )
        yield f"model.data.train_ds.{_PROBABILITIES}={weights}: the sum is {total:g}, not 1; taken as shares: {shares}"
    for name in ("validation_ds", "test_ds"):
        section = cfg["model"]["data"].get(name) or {}
        if section.get("write_predictions_to_file") and section.get("output_file_path_prefix") is None:
            key = f"model.data.{name}.output_file_path_prefix"
            yield f"{key}=null: the files with predictions get names that begin with None_"
    for name in ("train_ds", "validation_ds", "test_ds"):
        least = (cfg["model"]["data"].get(name) or {}).get("min_seq_length")
        if least not in (None, 0, 1):
            yield f"model.data.{name}.min_seq_length={least}: has no effect; NeMo 2.4 keeps shorter examples"
    watchdog = cfg.get("watchdog") or {}
    stuck, timeout = (watchdog.get(name) or 0 for name in ("stuck_s", "timeout_s"))
    if 0 < stuck < timeout:
        yield (
            f"watchdog.stuck_s={stuck}: less than watchdog.timeout_s={timeout}, so a stall ends the run before a dead rank "
            "is noticed"
        )


def generation_number_problems(cfg: Mapping[str, Any], base: Mapping[str, Any] | None) -> Iterator[str]:
    """Checks the numbers of `tied-lora generate`.

    Args:
        base: the base's model_config.yaml, if it can be read.
    """
    top_k, top_p, number = (cfg.get(key) for key in ("top_k", "top_p", "tokens_to_generate"))
    if top_k is not None and not is_whole_number(top_k, 0):
        yield f"top_k={top_k!r}: must be a whole number of at least 0; 0: all tokens"
    if top_p is not None and not (is_number(top_p) and 0 <= top_p <= 1):
        yield f"top_p={top_p!r}: must be a number from 0 to 1; 0 or 1: all tokens"
    penalty, least = cfg.get("repetition_penalty"), cfg.get("min_tokens_to_generate")
    if penalty is not None and not (is_number(penalty) and penalty > 0):
        yield f"repetition_penalty={penalty!r}: must be a number above 0; 1: none"
    if least is not None and not is_whole_number(least, 0):
        yield f"min_tokens_to_generate={least!r}: must be a whole number of at least 0"
    elif least is not None and is_whole_number(number) and least > number:
        yield f"min_tokens_to_generate={least}: more than tokens_to_generate={number}; lower it"
    positions = (base or {}).get("max_position_embeddings") or (base or {}).get("encoder_seq_length")
    if is_whole_number(number) and is_whole_number(positions) and number >= positions:
        yield (
            f"tokens_to_generate={number}: the base has {positions} positions, for prompt and answer together; use fewer"
        )
    if (size := cfg["model"].get("context_parallel_size")) not in (None, 1):
        yield f"model.context_parallel_size={size!r}: each prompt is read on one rank; set it to 1"


def generation_lines(cfg: Mapping[str, Any]) -> list[str]:
    """What a user should know of generation without problems."""
    if cfg.get("temperature") is not None:
        return []
    without_effect = {"top_k": (None, 0), "repetition_penalty": (None, 1)}
    return [
        f"{key}={cfg[key]}: has no effect, because temperature=null always takes the likeliest token"
        for key, neutral in without_effect.items()
        if cfg.get(key) not in neutral
    ]


_PROBABILITIES = "concat_sampling_probabilities"


def _sampling_problems(section: Mapping[str, Any]) -> Iterator[str]:
    weights, key = section.get(_PROBABILITIES), f"model.data.train_ds.{_PROBABILITIES}"
    if not isinstance(weights, list):
        return  # reported by `data_checks`
    if not all(is_number(weight) and weight >= 0 for weight in weights):
        yield f"{key}={weights}: must be numbers of at least 0"
    elif weights and not all(weights):
        left_out = [number for number, weight in enumerate(weights, 1) if not weight]
        yield f"{key}={weights}: file {', '.join(map(str, left_out))} would never be read; remove it from file_names"


def _dataset_problems(key: str, section: Mapping[str, Any]) -> Iterator[str]:
    longest, least = section.get("max_seq_length"), section.get("min_seq_length")
    if least is not None and not is_whole_number(least, 0):
        yield f"{key}.min_seq_length={least!r}: must be a whole number of at least 0"
    elif least is not None and is_whole_number(longest) and least > longest:
        yield f"{key}.min_seq_length={least}: more than max_seq_length={longest}; lower it"
    for name, bound in (("num_workers", 0), ("memmap_workers", 1)):
        if section.get(name) is not None and not is_whole_number(section[name], bound):
            yield f"{key}.{name}={section[name]!r}: must be a whole number of at least {bound}"
    if section.get("truncation_method", "right") not in ("left", "right"):
        yield f"{key}.truncation_method={section['truncation_method']}: unknown; choose one of left, right"


def _metric_problems(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    key, metric = f"model.data.{name}", section.get("metric", {"name": "exact_string_match"}) or {}
    kind, files, names = metric.get("name"), section.get("file_names"), section.get("names")
    if kind not in _METRICS:
        why = "NeMo cannot build it with the installed torchmetrics" if kind in _BROKEN_METRICS else "unknown"
        yield f"{key}.metric.name={kind}: {why}; choose one of {', '.join(_METRICS)}"
    number, longest = section.get("tokens_to_generate"), section.get("max_seq_length")
    if number is not None and not is_whole_number(number, 0 if kind == "loss" else 1):
        yield f"{key}.tokens_to_generate={number!r}: must be a whole number of at least 1"
    elif kind != "loss" and is_whole_number(number) and is_whole_number(longest) and number >= longest:
        yield (
            f"{key}.tokens_to_generate={number}: leaves nothing of max_seq_length={longest} for the prompt; lower it, or "
            f"set {key}.metric.name=loss, which generates nothing"
        )
    if isinstance(files, list) and isinstance(names, list) and len(names) != len(files):
        yield f"{key}.names={names}: must hold one name for each of the {len(files)} files"
    whole = section.get("global_batch_size")
    if section.get("drop_last") and is_whole_number(whole) and isinstance(files, list):
        for file in files:
            if _lines(Path(str(file)), whole) < whole:
                yield f"{key}.drop_last=true: {file} has fewer lines than global_batch_size={whole}, so all are dropped"


def _limit_problems(name: str, section: Mapping[str, Any], limit: str, share: object) -> Iterator[str]:
    """Lightning stops if a share of the batches of an evaluation set is less than one batch."""
    whole, files = section.get("global_batch_size"), section.get("file_names")
    if not (isinstance(share, float) and 0 < share < 1 and is_whole_number(whole) and isinstance(files, list)):
        return
    for file in files:
        lines = _lines(Path(str(file)), whole * math.ceil(1 / share))
        batches = lines // whole if section.get("drop_last") else -(-lines // whole)
        if batches > 0 and batches * share < 1:
            least = math.ceil(100 / batches) / 100
            yield f"trainer.{limit}={share}: is less than one of the {batches} batches of {file}; use at least {least:g}"


def _recomputation_problems(model: Mapping[str, Any]) -> Iterator[str]:
    """megatron-core's conditions on recomputation: its TransformerConfig raises."""
    names = ("granularity", "method", "num_layers")
    kind, method, number = (model.get(f"activations_checkpoint_{name}") for name in names)
    key = "model.activations_checkpoint"
    if kind is None:
        return
    if kind not in ("full", "selective"):
        yield f"{key}_granularity={kind}: unknown; choose one of full, selective, null"
        return
    if method not in ("uniform", "block") and (method is not None or kind == "full"):
        yield f"{key}_method={'null' if method is None else method}: granularity={kind} needs uniform or block"
    if kind == "full" and not is_whole_number(number):
        shown = "null" if number is None else repr(number)
        yield f"{key}_num_layers={shown}: granularity=full needs a whole number of at least 1"
    if kind == "selective" and number is not None:
        yield f"{key}_num_layers={number}: must be null with granularity=selective"


def _lines(path: Path, enough: int) -> int:
    """The number of lines that are not blank, up to `enough`. `enough` for a file that cannot be read."""
    found = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                found += bool(line.strip())
                if found >= enough:
                    break
    except OSError:
        return enough
    return found
