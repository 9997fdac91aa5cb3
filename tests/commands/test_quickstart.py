# SPDX-License-Identifier: Apache-2.0
"""The whole command, in forked processes: the quickstart on a tiny GGUF file with three heads, on three ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.command_runs import tied_lora
from tests.harness.gguf_files import bpe_vocabulary, write_gguf

WORDS = [
    "base=tiny.Q8_0.gguf",
    "layout=tp3",
    "task.limits.train=24",
    "task.limits.validation=8",
    "task.limits.test=6",
    "overrides=['trainer.max_steps=2','trainer.val_check_interval=2','model.data.train_ds.max_seq_length=512']",
]
FOLDER = Path("runs", "smollm2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GGUF file of a Llama with three heads."""
    import tokenizers
    import transformers
    from gguf import GGMLQuantizationType

    folder = tmp_path_factory.mktemp("quickstart")
    bpe = tokenizers.ByteLevelBPETokenizer()
    text = ["here the word means:", "a thing that is like another thing; of or in the form of"] * 8
    bpe.train_from_iterator(text, vocab_size=384, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=384,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    vocabulary = bpe_vocabulary(tokenizer, "gpt-2", 384, padding_token_id=0)
    write_gguf(folder / "tiny.Q8_0.gguf", model, vocabulary, kind=GGMLQuantizationType.Q8_0)
    return folder


def test_the_quickstart_imports_trains_evaluates_and_does_nothing_twice(folder: Path) -> None:
    printed = tied_lora("quickstart", *WORDS, folder=folder).stdout
    place = folder / FOLDER
    numbers = json.loads((place / "metrics.json").read_text())
    assert (numbers["layout"], numbers["preset"]) == ("tp3pp1", "tl6")
    assert numbers["base"]["name"] == "tiny"
    assert numbers["evaluation"]["items"] == 6
    assert numbers["peak_memory_bytes"] > 2**27
    assert set(numbers["seconds"]) == {"model", "finetuning", "evaluation"}
    report = (place / "report.md").read_text()
    assert report.strip() in printed
    assert "tiny, dequantised from Q8_0" in report
    assert "on 6 held-out items: " in report
    assert f"Trained parameters: {numbers['trained_parameters']:,}, **" in report
    assert report.count("| English: ") == 3
    assert "| prompt " in report
    assert " reference " in report
    assert (place / "loss.png").read_bytes().startswith(b"\x89PNG")
    made = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.suffix in (".nemo", ".jsonl")}
    del made[place / "tl6.nemo"]  # a copy
    assert len(made) >= 7  # the base, the adapter, three splits, the predictions of two models
    again = tied_lora("quickstart", *WORDS, folder=folder).stdout
    assert "finished already" in again
    assert "\nTime: " in printed
    assert "\nTime of this call, which continued another: " in again
    assert "$ tied-lora import" not in again
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert not [path for path in place.rglob(".*") if path.is_dir()]
