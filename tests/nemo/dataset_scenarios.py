# SPDX-License-Identifier: Apache-2.0
"""What the test of the datasets does in a forked process: builds NeMo's datasets and ours on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["CHAT_TOKENS", "chat_rows", "report_datasets"]

CHAT_TOKENS = {
    "system_turn_start": "0",
    "turn_start": "1",
    "label_start": "2",
    "end_of_turn": ":",
    "end_of_name": ":",
}
"""Texts that the workshop's tokenizer, which knows few characters, can write."""


def report_datasets(folder: Path) -> int:
    """Writes datasets.json: what `tests/nemo/test_datasets.py` compares."""
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset

    from nemo_tied_lora.nemo.sft_datasets import PromptDataset, line_ends

    def examples(dataset: Any) -> list[Any]:
        return [dataset[index] for index in range(len(dataset))]

    nemos = examples(_prompts(GPTSFTDataset, folder / "clean.jsonl"))
    changed = folder / "changed.jsonl"
    numbers = []
    for text in ('{"input": "1:", "output": "eins"}\n' * 3, '{"input": "12:", "output": "zwei"}\n' * 5):
        changed.write_text(text)
        numbers.append([example["answer_ids"] for example in examples(_prompts(PromptDataset, changed))])
    template = _prompts(PromptDataset, folder / "clean.jsonl", prompt_template="ö\\n{input} {output}")
    garbled = _prompts(GPTSFTDataset, folder / "clean.jsonl", prompt_template="ö\\n{input} {output}")
    found = {
        "clean as in NeMo": examples(_prompts(PromptDataset, folder / "clean.jsonl")) == nemos,
        "messy as clean": [_without_metadata(one) for one in examples(_prompts(PromptDataset, folder / "messy.jsonl"))]
        == [_without_metadata(one) for one in nemos],
        "numbers": [len(one) for one in numbers],
        "templates": [template.prompt_template, garbled.prompt_template],
        "ends": line_ends(str(folder / "messy.jsonl")).tolist(),
        "truncation": _truncation(folder),
        "conversations": _same_conversations(folder),
        "packed": _packed(folder),
        "room": _room(),
        "order": _order(folder),
        "task items": _task_items(folder / "task"),
        "early": _early(folder),
    }
    (folder / "datasets.json").write_text(json.dumps(found))
    return 0


def chat_rows(folder: Path) -> int:
    """Writes rows.json: tokens and loss mask of each conversation of chat.jsonl, by NeMo's own class."""
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import GPTSFTChatDataset

    dataset = _chat(GPTSFTChatDataset, folder)
    rows = [dataset[index] for index in range(len(dataset))]
    listed = [[row["input_ids"][:-1].tolist(), row["mask"][1:].int().tolist()] for row in rows]
    (folder / "rows.json").write_text(json.dumps(listed))
    return 0


def _without_metadata(example: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in example.items() if name != "metadata"}


def _tokenizer(folder: Path) -> Any:
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(str(folder / "tokenizer.model"))


def _prompts(kind: Any, path: Path, **changed: Any) -> Any:
    settings = {"prompt_template": "{input} {output}", "label_key": "output", "truncation_field": "input", **changed}
    index = str(path.parent / f"index of {kind.__name__}")
    return kind(str(path), _tokenizer(path.parent), memmap_workers=1, index_mapping_dir=index, **settings)


def _chat(kind: Any, folder: Path, **changed: Any) -> Any:
    index = str(folder / f"index of {kind.__name__}")
    settings = {"special_tokens": CHAT_TOKENS, "memmap_workers": 1, "index_mapping_dir": index, **changed}
    return kind(str(folder / "chat.jsonl"), _tokenizer(folder), **settings)


def _truncation(folder: Path) -> dict[str, Any]:
    """For several settings: our counts, and those of a loop over NeMo's examples."""
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset

    from nemo_tied_lora.nemo.answer_truncation import count_answers

    whole = _prompts(GPTSFTDataset, folder / "long.jsonl", max_seq_length=10_000)
    found = {}
    variants: dict[str, dict[str, Any]] = {
        "prompt first": {"truncation_field": "input"},
        "answer first": {"truncation_field": "output"},
        "both": {"truncation_field": "input,output"},
        "none": {"truncation_field": None},
        "left": {"truncation_field": None, "truncation_method": "left"},
        "room to generate": {"truncation_field": None, "tokens_to_generate": 6},
        "bos and sep": {"truncation_field": None, "add_bos": True, "add_sep": True, "sep_id": 4},
        "prompt longer than all": {"truncation_field": None, "max_seq_length": 3},
    }
    for name, settings in variants.items():
        dataset = _prompts(GPTSFTDataset, folder / "long.jsonl", **{"max_seq_length": 16, **settings})
        pairs = [(dataset[index], whole[index]) for index in range(len(whole))]
        by_hand = {
            "answers": sum(len(all_["answer_ids"]) > 0 for _, all_ in pairs),
            "cut": sum(0 < len(cut["answer_ids"]) < len(all_["answer_ids"]) for cut, all_ in pairs),
            "lost": sum(not cut["answer_ids"] and bool(all_["answer_ids"]) for cut, all_ in pairs),
            "prompts_cut": sum(
                cut["context_length"] - dataset.add_bos - dataset.add_sep < all_["context_length"]
                for cut, all_ in pairs
            ),
        }
        found[name] = [count_answers(dataset, range(len(whole)))[0], by_hand]
    return found


def _early(folder: Path) -> dict[str, Any]:
    """What is counted with the base's file alone, and what cannot be."""
    import contextlib
    import io
    from types import SimpleNamespace

    import torch
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset

    from nemo_tied_lora.nemo.answer_truncation import count_answers
    from nemo_tied_lora.nemo.early_answer_check import check_answers_early
    from nemo_tied_lora.nemo.model import MegatronGPTTiedLoraModel
    from nemo_tied_lora.planning.composing.compose import compose_config

    base, trainer = str(folder / "base.nemo"), SimpleNamespace(limit_val_batches=0, local_rank=0)

    def early(*changed: str, path: str = base) -> tuple[bool, str]:
        words = [f"model.restore_from_path={base}", "model.data.train_ds.max_seq_length=16", *changed]
        words += [f"model.data.train_ds.{key}" for key in (f"file_names=[{folder}/long.jsonl]", "memmap_workers=1")]
        words.append(f"+model.data.train_ds.index_mapping_dir='{folder}/early'")
        model_cfg = MegatronGPTTiedLoraModel.merge_cfg_with(base, compose_config("finetune", words))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            return check_answers_early(path, model_cfg, trainer), printed.getvalue()

    without_a_group = early()[0]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    counts = count_answers(_prompts(GPTSFTDataset, folder / "long.jsonl", max_seq_length=16), range(39))[0]
    return {
        "counts": counts,
        "counted": early(),
        "not": [without_a_group, early("model.data.chat=true")[0], early(path=str(folder / "train.jsonl"))[0]],
    }


def _same_conversations(folder: Path) -> list[bool]:
    """Whether NeMo's class and ours make the same batch, in each key."""
    import torch
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import GPTSFTChatDataset

    from nemo_tied_lora.nemo.sft_datasets import ChatDataset

    nemos, ours = _chat(GPTSFTChatDataset, folder), _chat(ChatDataset, folder)
    batches = [one.collate_fn([one[index] for index in range(len(one))]) for one in (nemos, ours)]
    assert batches[0]["loss_mask"].sum() > 0
    return [
        bool(torch.equal(batches[1][key], value)) if isinstance(value, torch.Tensor) else batches[1][key] == value
        for key, value in batches[0].items()
    ]


def _packed(folder: Path) -> dict[str, list[str]]:
    """For several files of packed sequences: what our class says."""
    import numpy as np

    from nemo_tied_lora.errors import ConfigError
    from nemo_tied_lora.nemo.sft_datasets import PackedDataset

    pack = {"input_ids": list(range(4, 14)), "loss_mask": [1] * 10, "seq_start_id": [0, 4]}
    files: dict[str, Any] = {
        "right": [pack, pack],
        "too long": [{**pack, "input_ids": [5] * 20, "loss_mask": [1] * 20}],
        "uneven": [pack, {**pack, "loss_mask": [1]}],
        "without keys": [{"input_ids": [1]}],
    }
    found = {}
    for name, packs in files.items():
        np.save(folder / f"{name}.npy", np.array(packs, dtype=object), allow_pickle=True)
        try:
            dataset = _prompts(PackedDataset, folder / f"{name}.npy", max_seq_length=8, max_num_samples=3)
            batch = dataset.collate_fn([dataset[0]])
            found[name] = [str(batch["tokens"].tolist()), str(len(dataset))]
        except ConfigError as error:
            found[name] = list(error.problems)
    return found


def _order(folder: Path) -> dict[str, list[int]]:
    """Which examples of a file of eight the training sees, in file order and as NeMo draws them, for each form of data."""
    import numpy as np

    from nemo_tied_lora.nemo.sft_datasets import ChatDataset, PackedDataset, PromptDataset

    packs = [{"input_ids": [first] * 5, "loss_mask": [1] * 5, "seq_start_id": [0]} for first in range(8)]
    np.save(folder / "eight.npy", np.array(packs, dtype=object), allow_pickle=True)
    found = {}
    for kept in (True, False):
        settings = {"max_num_samples": 12, "in_file_order": kept, "sanity_check_dist_workers": False}
        prompts = _prompts(PromptDataset, folder / "clean.jsonl", **settings)
        chats, packed = (
            _chat(ChatDataset, folder, **settings),
            _prompts(PackedDataset, folder / "eight.npy", **settings),
        )
        word = "kept" if kept else "drawn"
        found[f"prompts {word}"] = [int(prompts.samples_mapping[index][0]) for index in range(12)]
        found[f"chats {word}"] = [int(chats.samples_mapping[index][0]) for index in range(12)]
        found[f"packed {word}"] = [int(packed[index]["input_ids"][0]) for index in range(12)]
    return found


def _room() -> list[int]:
    """`tokens_to_generate` of sections that generate, compute the loss, and compute it beside predictions."""
    from omegaconf import OmegaConf

    from nemo_tied_lora.nemo.sft_datasets import leave_room_only_to_generate

    found = []
    for section in (
        {"metric": {"name": "exact_string_match"}},
        {"metric": {"name": "loss"}},
        {"metric": {"name": "loss"}, "write_predictions_to_file": True},
        {},
    ):
        data = OmegaConf.create({"validation_ds": {"tokens_to_generate": 32, **section}, "test_ds": None})
        leave_room_only_to_generate(data)
        found.append(data.validation_ds.tokens_to_generate)
    return found


def _task_items(folder: Path) -> dict[str, Any]:
    """For a tokenizer that keeps every blank and adds one, as Llama 2's: a task's items in training and in evaluation."""
    import sentencepiece
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    from nemo_tied_lora.nemo.sft_datasets import PromptDataset
    from nemo_tied_lora.nemo.tokenized_items import answer_ids

    folder.mkdir()
    items = [
        {"input": "what is it\nanswer:", "output": " it is a cat"},
        {"input": "and  that:", "output": " a dog\nthat is"},
    ]
    texts = [item["input"].replace("\n", " ") + item["output"] for item in items]
    settings = {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "byte_fallback": True, "vocab_size": 300}
    prefix = str(folder / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=prefix, minloglevel=2, **settings
    )
    tokenizer = SentencePieceTokenizer(f"{prefix}.model")
    (folder / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    found: dict[str, Any] = {"adds blanks": not tokenizer.space_sensitive}
    for separator, shown in ((" ", items), ("", [{**item, "output": item["output"].strip()} for item in items])):
        (folder / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in shown))
        dataset = PromptDataset(
            str(folder / "train.jsonl"),
            tokenizer,
            prompt_template="{input}" + separator + "{output}",
            label_key="output",
            truncation_field="input",
            memmap_workers=1,
            index_mapping_dir=str(folder / f"index {len(separator)}"),
        )
        trained = [dataset[number]["input_ids"] for number in range(len(dataset))]
        evaluated = [tokenizer.text_to_ids(item["input"]) + answer_ids(tokenizer, item["output"]) for item in shown]
        naive = [tokenizer.text_to_ids(item["input"]) + tokenizer.text_to_ids(item["output"]) for item in shown]
        found[separator] = {"same": trained == evaluated, "naive": [one[:-1] for one in trained] == naive}
    return found
