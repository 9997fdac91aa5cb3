# SPDX-License-Identifier: Apache-2.0
"""Checks the configuration of data and batches before a run. Each function yields one line per problem."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import is_whole_number
from nemo_tied_lora.planning.data.data_files import SECTIONS, made_by_task, unreadable
from nemo_tied_lora.planning.data.prompt_template import training_template_problems
from nemo_tied_lora.planning.parallel_layout import Layout

__all__ = ["batch_problems", "data_problems"]


def data_problems(cfg: Mapping[str, Any], *, runs_here: bool = True) -> Iterator[str]:
    """Checks the sections train_ds, validation_ds and test_ds, and that their files can be opened.

    `data_files` reads the lines.

    Args:
        runs_here: False if another machine will run it, so that it does not matter what is installed here.
    """
    data = cfg["model"]["data"]
    chat = bool(data.get("chat"))
    if chat:
        yield from _chat_problems(data)
    told: set[str] = set()
    for name in SECTIONS:
        section = data.get(name)
        key = f"model.data.{name}.file_names"
        if not isinstance(section, Mapping):
            yield f"model.data.{name}={section!r}: must be a section of keys; {key}=null for no files"
            continue
        files = section.get("file_names")
        if name == "test_ds" and files is None:
            continue
        if not isinstance(files, list) or not files:
            yield f"{key}={files!r}: must be a list of JSONL files"
            continue
        weights = section.get("concat_sampling_probabilities")
        if name == "train_ds" and (not isinstance(weights, list) or len(weights) != len(files)):
            fix = f"as [{','.join([f'{1 / len(files):.3g}'] * min(len(files), 8))}{',...' if len(files) > 8 else ''}]"
            yield (
                f"model.data.train_ds.concat_sampling_probabilities={weights!r}: must hold one number for each of the "
                f"{len(files)} files in file_names, {fix} for equal shares"
            )
        yield from _batch_problems(name, section)
        if section.get("packed_sequence"):
            yield from _packed_problems(f"model.data.{name}", section, runs_here=runs_here)
        if name != "train_ds":
            yield from _generation_problems(name, section, cfg["model"])
        if not chat:
            yield from _template_problems(name, section, told)
        for file in dict.fromkeys(map(str, files)):
            if not made_by_task(cfg, Path(file)):
                yield from unreadable(key, Path(file))


def _template_problems(name: str, section: Mapping[str, Any], told: set[str]) -> Iterator[str]:
    """Sections usually take these keys from train_ds. So each problem is reported once, for the first section."""
    for problem in training_template_problems("", section):
        if problem not in told:
            told.add(problem)
            yield f"model.data.{name}{problem}"


_CHAT_TOKENS = ("system_turn_start", "turn_start", "label_start", "end_of_turn", "end_of_name")


def _chat_problems(data: Mapping[str, Any]) -> Iterator[str]:
    tokens = data.get("chat_prompt_tokens")
    if tokens is None:
        return
    key = "model.data.chat_prompt_tokens"
    if not isinstance(tokens, Mapping):
        yield f"{key}={tokens!r}: must be a section with {', '.join(_CHAT_TOKENS)}"
        return
    missing = [name for name in _CHAT_TOKENS if name not in tokens]
    if missing:
        yield f"{key}: lacks {', '.join(missing)}; set all of {', '.join(_CHAT_TOKENS)}, or none for NeMo's defaults"
    for name in tokens:
        if name not in _CHAT_TOKENS:
            yield f"{key}.{name}: not a key of it; choose from {', '.join(_CHAT_TOKENS)}"
        elif not isinstance(tokens[name], str) or not tokens[name]:
            yield f"{key}.{name}={tokens[name]!r}: must be a text that is not empty"


def _packed_problems(key: str, section: Mapping[str, Any], *, runs_here: bool) -> Iterator[str]:
    """Packed sequences need an attention that keeps them apart; of Megatron's, only Transformer Engine's does."""
    if runs_here and importlib.util.find_spec("transformer_engine") is None:
        yield (
            f"{key}.packed_sequence=true: needs the attention of Transformer Engine, on GPUs, and it is not installed "
            "here; train on the JSONL files that were packed, with packed_sequence=false"
        )
    if section.get("micro_batch_size") != 1:
        yield f"{key}.micro_batch_size={section.get('micro_batch_size')!r}: must be 1 for packed sequences"


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


def batch_problems(cfg: Mapping[str, Any], base: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Compares each section's batch with the data-parallel size, and its longest sequence with the layout and the base.

    NeMo pads a batch to a multiple that suits every layout, but never beyond max_seq_length.
    """
    for name in SECTIONS:
        section = cfg["model"]["data"].get(name)
        if isinstance(section, Mapping) and section.get("file_names"):
            engine = cfg["model"].get("transformer_engine", base.get("transformer_engine"))
            if section.get("packed_sequence") and not engine:
                yield (
                    f"model.data.{name}.packed_sequence=true: the base's model_config.yaml has transformer_engine: false, "
                    "and only Transformer Engine's attention keeps packed sequences apart; add +model.transformer_engine=true"
                )
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
