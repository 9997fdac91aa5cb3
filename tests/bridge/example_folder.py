# SPDX-License-Identifier: Apache-2.0
"""What examples/bridge/finetune_tied_lora.py reads: a tiny Llama in Hugging Face's form, with a tokenizer, and data."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import transformers

__all__ = ["write_example_folder"]


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
