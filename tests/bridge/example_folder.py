# SPDX-License-Identifier: Apache-2.0
"""What examples/bridge/finetune_tied_lora.py reads: a tiny Llama in Hugging Face's form, with a tokenizer, and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers
import transformers

__all__ = ["write_example_folder", "write_wrong_folders"]


def write_example_folder(folder: Path) -> None:
    """Writes FOLDER/hf, whose tokens are bytes, and FOLDER/data with 16 rows for training and as many for validation."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([], vocab_size=257, special_tokens=["</s>"], show_progress=False)
    bpe.save(str(folder / "bytes.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "bytes.json"), eos_token="</s>")
    tokenizer.save_pretrained(folder / "hf")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=260,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "hf")
    (folder / "data").mkdir()
    rows = [json.dumps({"input": f"{number} is", "output": f"not {number**2}"}) + "\n" for number in range(16)]
    for name in ("training", "validation"):
        (folder / "data" / f"{name}.jsonl").write_text("".join(rows))


def write_wrong_folders(folder: Path) -> None:
    """Adds what the example refuses: data, by the name of what is wrong in its two files, and models.

    Those in columns/ are right where the columns are named.
    """
    right = json.dumps({"input": "a", "output": "b"}) + "\n"
    columns = (
        json.dumps({"question": "a", "answer": "b"}) + "\n" + json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    )
    for name, files in {
        "columns": (columns, columns),
        "empty": ("", "not json\n" * 3),
        "fields": (
            right + json.dumps({"question": "a", "answer": "b"}) + "\n",
            right + '{"input": "a", "output": 1e3}\n',
        ),
        "lines": (f"{right}\n{right}\n", "\ufeff" + right),
        "chat": (
            json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n",
            right.replace("input", "prompt"),
        ),
    }.items():
        (folder / name).mkdir()
        (folder / name / "training.jsonl").write_text(files[0])
        (folder / name / "validation.jsonl").write_text(files[1])
    for name in ("torn", "bert", "shards"):
        shutil.copytree(folder / "hf", folder / name)
    (folder / "torn" / "config.json").write_text('{"model_type": "llama",')
    (folder / "torn" / "model.safetensors").write_bytes(b"")
    for path in (folder / "torn").glob("token*"):
        path.unlink()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    (folder / "shards" / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "file").write_text("")
