# SPDX-License-Identifier: Apache-2.0
"""Checks data files, prompts and batches before a run. Each function yields one line per problem."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import is_whole_number
from nemo_tied_lora.planning.parallel_layout import Layout

__all__ = ["batch_problems", "data_problems", "jsonl_problems", "template_fields"]


def data_problems(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Checks the sections train_ds, validation_ds and test_ds, and the first line of each file."""
    for name in ("train_ds", "validation_ds", "test_ds"):
        section = cfg["model"]["data"][name]
        key = f"model.data.{name}.file_names"
        files = section.get("file_names")
        if name == "test_ds" and files is None:
            continue
        if not isinstance(files, list) or not files:
            yield f"{key}={files!r}: must be a list of JSONL files"
            continue
        weights = section.get("concat_sampling_probabilities")
        if name == "train_ds" and (not isinstance(weights, list) or len(weights) != len(files)):
            yield f"model.data.train_ds.concat_sampling_probabilities={weights!r}: must hold one number for each file"
        yield from _batch_problems(name, section)
        if name != "train_ds":
            yield from _generation_problems(name, section, cfg["model"])
        for file in files:
            yield from _first_line_problems(key, Path(str(file)), template_fields(section.get("prompt_template")))


def _generation_problems(name: str, section: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """Refuses generation under sequence parallelism: NeMo 2.4 leaves it on, and fails at the first odd length."""
    metric = (section.get("metric") or {}).get("name")
    if not model.get("sequence_parallel") or model.get("tensor_model_parallel_size", 1) == 1:
        return
    if metric != "loss":
        yield (
            f"model.data.{name}.metric.name={metric}: needs to generate, which NeMo 2.4 cannot do with "
            "model.sequence_parallel=true; set it to loss, and use tied-lora generate after training"
        )
    if section.get("write_predictions_to_file"):
        yield (
            f"model.data.{name}.write_predictions_to_file=true: not possible with model.sequence_parallel=true, for the "
            "same reason; set it to false"
        )


def _batch_problems(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    micro, whole = section.get("micro_batch_size"), section.get("global_batch_size")
    if not (is_whole_number(micro) and is_whole_number(whole)):
        yield f"model.data.{name}: micro_batch_size={micro!r} and global_batch_size={whole!r} must be at least 1"
    elif whole % micro:
        yield f"model.data.{name}.global_batch_size={whole}: must be divisible by micro_batch_size={micro}"


def template_fields(template: object) -> list[str]:
    """Returns the names in braces of a prompt template."""
    return [field for _, field, _, _ in string.Formatter().parse(str(template)) if field]


def jsonl_problems(key: str, path: Path, fields: list[str]) -> Iterator[str]:
    """Checks every line of a file, and names the first that lacks a field."""
    first = list(_first_line_problems(key, path, fields))
    yield from first
    if first:
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                missing = [field for field in fields if line.strip() and field not in json.loads(line)]
            except (json.JSONDecodeError, TypeError):
                missing = ["JSON object"]
            if missing:
                yield f"{key}: {path}: line {number} has no {', '.join(missing)}"
                return


def _first_line_problems(key: str, path: Path, fields: list[str]) -> Iterator[str]:
    if not path.is_file():
        yield f"{key}: {path}: no such file"
        return
    try:
        with path.open(encoding="utf-8") as lines:
            example = json.loads(next(lines, ""))
    except (json.JSONDecodeError, UnicodeDecodeError):
        yield f"{key}: {path}: the first line is not JSON; each line must be one JSON object"
        return
    except OSError as error:
        yield f"{key}: {path}: cannot be read: {error.strerror}"
        return
    missing = [field for field in fields if not isinstance(example, Mapping) or field not in example]
    if missing:
        yield f"{key}: {path}: the first line has no {', '.join(missing)}, which prompt_template names"


def batch_problems(cfg: Mapping[str, Any], base: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Compares each section's batch with the data-parallel size, and its longest sequence with the layout and the base.

    NeMo pads a batch to a multiple that suits every layout, but never beyond max_seq_length.
    """
    for name in ("train_ds", "validation_ds", "test_ds"):
        section = cfg["model"]["data"][name]
        if section.get("file_names"):
            yield from _split_batch_problems(f"model.data.{name}", section, layout.resolved_dp_size)
            yield from _length_problems(
                f"model.data.{name}.max_seq_length", section.get("max_seq_length"), base, layout
            )


def _split_batch_problems(key: str, section: Mapping[str, Any], dp_size: int) -> Iterator[str]:
    micro, whole = section.get("micro_batch_size"), section.get("global_batch_size")
    if not (is_whole_number(micro) and is_whole_number(whole) and dp_size > 0):
        return  # reported by `data_problems`
    if whole % micro == 0 and whole % (micro * dp_size):
        step = micro * dp_size
        yield (
            f"{key}.global_batch_size={whole}: not divisible by micro_batch_size={micro} x data-parallel size "
            f"{dp_size}; use {-(-whole // step) * step}"
        )


def _length_problems(key: str, length: object, base: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    if not is_whole_number(length):
        yield f"{key}={length!r}: must be a whole number of at least 1"
        return
    positions = base.get("max_position_embeddings") or base.get("encoder_seq_length")
    learned = base.get("position_embedding_type", "learned_absolute") == "learned_absolute"
    if learned and isinstance(positions, int) and length > positions:
        yield f"{key}={length}: the base has learned positions for {positions} tokens only; use at most {positions}"
    parts = {"2 x context_parallel_size": 2 * layout.cp_size if layout.cp_size > 1 else 1}
    if layout.sequence_parallel and layout.tp_size > 1:
        parts["tensor_model_parallel_size x context_parallel_size (sequence_parallel)"] = (
            layout.tp_size * layout.cp_size
        )
    for name, size in parts.items():
        if length % size:
            yield f"{key}={length}: not divisible by {name} = {size}; use {-(-length // size) * size}"
