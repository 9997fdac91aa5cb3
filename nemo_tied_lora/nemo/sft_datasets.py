# SPDX-License-Identifier: Apache-2.0
"""NeMo's fine-tuning datasets, read so that every file works that the check of the data accepts.

Tokens, truncation, loss mask and batches are NeMo's. What differs is how a line is read:

- blank lines and byte order marks are skipped, and a number in a field of the template is its text;
- a template keeps characters beyond ASCII: NeMo turns "ö" into "Ã¶";
- the index of a file has its size and time of change in its name. NeMo would use the index of an older file of the same
  name, and so cut lines at wrong places.

`model.data.train_ds.shuffle=false` keeps the order of the file. NeMo shuffles whatever it says.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import GPTSFTChatDataset
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset, GPTSFTPackedDataset
from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import TextMemMapDataset
from nemo.collections.nlp.models.language_modeling import megatron_gpt_sft_model
from omegaconf import open_dict

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.data.example_forms import with_texts
from nemo_tied_lora.planning.data.jsonl_lines import is_blank
from nemo_tied_lora.planning.data.prompt_template import template_fields, unescaped

__all__ = [
    "ChatDataset",
    "JsonlExamples",
    "PackedDataset",
    "PromptDataset",
    "leave_room_only_to_generate",
    "line_ends",
    "own_datasets",
]

_BLOCK_BYTES = 64 << 20
_WHITE = np.frombuffer(b" \t\r\n\x0b\x0c\xc2\xe1\xe2\xe3\xef", np.uint8)
"""How a blank line can begin. A byte order mark, and white space beyond ASCII, begin with the last five."""


class JsonlExamples(TextMemMapDataset):
    """The examples of one JSONL file, read from disk when asked for.

    Args:
        path: the file.
        fields: in these, a number becomes its text.
        index_folder: for the index; None: beside the file, as in NeMo.
    """

    def __init__(self, path: str, fields: list[str], index_folder: str | None, workers: int | None) -> None:
        found = os.stat(path)
        folder = index_folder or f"{path}.idx"
        self._fields = fields
        super().__init__(
            [str(Path(path).resolve())],
            workers=workers,
            build_index_fn=line_ends,
            index_mapping_dir=f"{folder}/{found.st_size}-{found.st_mtime_ns}",
        )

    def _build_data_from_text(self, text: str) -> dict[str, Any]:
        return with_texts(text, self._fields)


def line_ends(path: str, newline: int = 10) -> np.ndarray:
    """Returns where each example's line ends, (examples,) int64. Blank lines count to the next example's line.

    It has the signature of NeMo's `build_index_fn`.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    blocks = [
        start + np.flatnonzero(data[start : start + _BLOCK_BYTES] == newline)
        for start in range(0, len(data), _BLOCK_BYTES)
    ]
    ends = np.concatenate(blocks).astype(np.int64)
    if len(ends) == 0 or ends[-1] + 1 < len(data):
        ends = np.append(ends, len(data))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    suspects = np.flatnonzero((starts == ends) | np.isin(data[np.minimum(starts, len(data) - 1)], _WHITE))
    blank = [line for line in suspects if is_blank(data[starts[line] : ends[line]].tobytes())]
    return np.delete(ends, blank)


class _InFileOrder:
    """A mixin in front of NeMo's dataset: with `in_file_order` it gives its examples in their order, again and again."""

    max_num_samples: int | None

    def __init__(self, *args: Any, in_file_order: bool = False, **settings: Any) -> None:
        self._in_file_order = in_file_order
        super().__init__(*args, **settings)

    def _build_samples_mapping(self) -> None:
        if not self._in_file_order or self.max_num_samples is None:
            super()._build_samples_mapping()  # type: ignore[misc]
            return
        indices = np.arange(self.max_num_samples) % len(self.indexed_dataset)  # type: ignore[attr-defined]
        self.samples_mapping = self._mapping(indices)

    def _mapping(self, indices: np.ndarray) -> Any:
        """The indices in the form that the dataset reads."""
        return [(int(index), None, None) for index in indices]


class _Lines(_InFileOrder):
    """A mixin in front of NeMo's dataset that reads its file with `JsonlExamples`."""

    def _load_dataset(self) -> None:
        if self.hf_dataset:  # type: ignore[attr-defined]
            super()._load_dataset()  # type: ignore[misc]
            return
        self.indexed_dataset = JsonlExamples(
            self.file_path,  # type: ignore[attr-defined]
            self._text_fields(),
            self.index_mapping_dir,  # type: ignore[attr-defined]
            self.memmap_workers,  # type: ignore[attr-defined]
        )

    def _text_fields(self) -> list[str]:
        return []


class PromptDataset(_Lines, GPTSFTDataset):
    """`GPTSFTDataset`: a prompt template with fields of each line."""

    prompt_template: str

    def _text_fields(self) -> list[str]:
        return template_fields(self.prompt_template)

    def _maybe_validate_prompt_template(self) -> None:
        """NeMo's, which `planning.data.prompt_template` has checked, without its damage to characters beyond ASCII."""
        self.prompt_template_keys = template_fields(self.prompt_template)
        self.prompt_template = unescaped(self.prompt_template)
        if self.truncation_fields[:1] == ["context"] and self.prompt_template_keys[0] == "input":
            self.truncation_fields[0] = "input"

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        if self.hf_dataset:  # it has read numbers as numbers
            texts = {name: str(example[name]) for name in self.prompt_template_keys if name in example}
            example = {**example, **texts}
        return super()._process_example(example)


class ChatDataset(_Lines, GPTSFTChatDataset):
    """`GPTSFTChatDataset`: NeMo's conversations."""

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """NeMo's, with the count of tokens that `model.log_token_counts` needs."""
        lengths = [len(item["input_ids"]) for item in batch]
        return {**super().collate_fn(batch), "token_count": lengths}


class PackedDataset(_InFileOrder, GPTSFTPackedDataset):
    """`GPTSFTPackedDataset`: sequences that NeMo's script has packed.

    Raises:
        ConfigError: the file cannot be read, a pack has another form, or it is longer than `max_seq_length`.
    """

    def _mapping(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def _load_dataset(self) -> None:
        path, most = self.file_path, self.max_seq_length
        remedy = "write it with NeMo's prepare_packed_ft_dataset.py again"
        try:
            self.indexed_dataset = np.load(path, allow_pickle=True)
            # Each sequence trains on one token less than it has: its labels are its tokens, one further.
            longest = max(len(pack["input_ids"]) - len(pack["seq_start_id"]) for pack in self.indexed_dataset)
            uneven = [
                n for n, pack in enumerate(self.indexed_dataset, 1) if len(pack["input_ids"]) != len(pack["loss_mask"])
            ]
        except Exception as error:  # a pickle can raise anything
            raise ConfigError([f"{path}: not packed sequences: {type(error).__name__}: {error}; {remedy}"]) from error
        if uneven:
            raise ConfigError([f"{path}: pack {uneven[0]}: input_ids and loss_mask differ in length; {remedy}"])
        if longest > most:
            fix = f"set it to {longest} or more, the size that the sequences were packed to"
            raise ConfigError(
                [f"model.data.train_ds.max_seq_length={most}: {path} has a pack of {longest} tokens; {fix}"]
            )


def leave_room_only_to_generate(data: Any) -> None:
    """Sets `tokens_to_generate` to 0 in sections that only compute the loss. NeMo would cut answers to leave room for it.

    Args:
        data: the configuration's section `model.data`.
    """
    for name in ("validation_ds", "test_ds"):
        section = data.get(name)
        if (
            section
            and (section.get("metric") or {}).get("name") == "loss"
            and not section.get("write_predictions_to_file")
        ):
            with open_dict(section):
                section.tokens_to_generate = 0


@contextlib.contextmanager
def own_datasets(in_file_order: bool = False) -> Iterator[None]:
    """While it lasts, NeMo's model builds these datasets: it has no other way to choose them.

    Args:
        in_file_order: training examples come in the order of their file. With several files, each is in its order.
    """
    names = {"GPTSFTDataset": PromptDataset, "GPTSFTChatDataset": ChatDataset, "GPTSFTPackedDataset": PackedDataset}
    nemos = {name: getattr(megatron_gpt_sft_model, name) for name in names}
    try:
        for name, dataset in names.items():
            setattr(megatron_gpt_sft_model, name, functools.partial(dataset, in_file_order=in_file_order))
        yield
    finally:
        for name, dataset in nemos.items():
            setattr(megatron_gpt_sft_model, name, dataset)
