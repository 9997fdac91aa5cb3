# SPDX-License-Identifier: Apache-2.0
"""Saves tiny random models of `transformers`, with tokenizers, in the form of their hub folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["FAMILIES", "SEQUENCE", "save_model", "tokens"]

SEQUENCE = 12
FAMILIES = ("llama", "mistral", "qwen2", "gpt2")
_TEXT = [f"one {i} two {i * 7} three, vier fünf six; def f(x): return x * {i}" for i in range(64)]
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def save_model(family: str, folder: Path, **changes: Any) -> Any:
    """Builds the family's model with random weights everywhere, saves it with a tokenizer, and returns it.

    Args:
        changes: other sizes than the usual ones, in the words of transformers; not of a GPT-2.
    """
    import transformers

    _save_tokenizer(family, folder)
    fast = (folder / "tokenizer.json").exists()
    vocab = len(transformers.AutoTokenizer.from_pretrained(str(folder), use_fast=fast))
    # More rows than tokens, and a number that sizes do not divide evenly.
    sizes: dict[str, Any] = {"vocab_size": vocab + 3, "bos_token_id": 1, "eos_token_id": 2}
    llama = {**_LLAMA, **changes}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**{"head_dim": 12, **llama}, **sizes, rms_norm_eps=3e-5),
        "mistral": lambda: transformers.MistralConfig(**llama, **sizes, head_dim=8, sliding_window=16, rope_theta=5e4),
        "qwen2": lambda: transformers.Qwen2Config(**llama, **sizes, tie_word_embeddings=True, rope_theta=1e6),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_inner=48, n_layer=4, n_head=4, n_positions=32, layer_norm_epsilon=2e-5, **sizes
        ),
    }
    config = configs[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(FAMILIES.index(family))
    for name, parameter in model.named_parameters():
        is_norm = name.endswith("weight") and ("norm" in name or ".ln_" in name)
        parameter.data.normal_(1.0 if is_norm else 0.0, 0.15, generator=generator)
    # Several shards, as large models have.
    model.save_pretrained(folder, max_shard_size="40KB" if family == "llama" else "5GB")
    return model


def tokens(family: str) -> torch.Tensor:
    """Random tokens (3, SEQUENCE) from a fixed seed."""
    generator = torch.Generator().manual_seed(11 + FAMILIES.index(family))
    return torch.randint(0, 256, (3, SEQUENCE), generator=generator)


def _save_tokenizer(family: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if family in ("llama", "mistral"):
        _save_sentencepiece(folder)
        return
    import tokenizers
    import transformers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(_TEXT, vocab_size=290, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    files = {"vocab_file": str(folder / "vocab.json"), "merges_file": str(folder / "merges.txt")}
    kind = transformers.GPT2TokenizerFast if family == "gpt2" else transformers.Qwen2TokenizerFast
    kind(**files, unk_token="<|endoftext|>", eos_token="<|endoftext|>").save_pretrained(folder)


def _save_sentencepiece(folder: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
