# SPDX-License-Identifier: Apache-2.0
"""Makes a Hugging Face tokenizer of a GGUF file's vocabulary.

transformers makes one too, but for every byte-level BPE it uses Llama's rules: it adds a BOS that the file says not to add,
and splits digits and words as Llama 3 does. Here `tokenizer.ggml.pre` decides how text is split, and `add_bos_token`
whether a BOS is added. A vocabulary of sentencepiece becomes a sentencepiece model, whose kinds of pieces GGUF has kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import is_whole_number

__all__ = ["PRE_TOKENIZERS", "adds_bos", "vocabulary_problems", "write_tokenizer"]

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS: dict[str, str] = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), "qwen2"),
}
"""Names that `tokenizer.ggml.pre` may have -> how text is split before BPE:

- gpt2: GPT-2's rule. - digits: each digit alone, then GPT-2's rule. - llama3, qwen2: their regular expressions, with up to
three digits together, and each digit alone.
"""
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def adds_bos(vocabulary: Mapping[str, Any]) -> bool:
    """Whether a text begins with BOS: as the file says, else as llama.cpp does for such a vocabulary."""
    is_llama3 = PRE_TOKENIZERS.get(str(vocabulary.get("pre"))) == "llama3"
    return bool(vocabulary.get("add_bos_token", vocabulary["model"] == "llama" or is_llama3))


def vocabulary_problems(vocabulary: Mapping[str, Any]) -> Iterator[str]:
    """Yields what keeps the vocabulary from becoming a tokenizer that gives the same ids.

    Args:
        vocabulary: the metadata below `tokenizer.ggml.`.
    """
    kind, pre, tokens = vocabulary.get("model"), vocabulary.get("pre"), vocabulary.get("tokens")
    if kind not in ("gpt2", "llama"):
        yield f"tokenizer.ggml.model={kind!r} is not supported; it must be gpt2 (byte-level BPE) or llama (sentencepiece)"
        return
    if kind == "gpt2" and pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        yield f"tokenizer.ggml.pre={pre!r}: this release does not know how it splits text; it knows {known}"
    if not isinstance(tokens, list) or not tokens:
        yield "tokenizer.ggml.tokens: missing; the file holds no vocabulary"
        return
    lengths = ("token_type", *(() if kind == "gpt2" else ("scores",)))
    for key in lengths:
        if not isinstance(vocabulary.get(key), list) or len(vocabulary[key]) != len(tokens):
            yield f"tokenizer.ggml.{key}: must have {len(tokens)} entries, one for each token"
    if kind == "gpt2" and not isinstance(vocabulary.get("merges"), list):
        yield "tokenizer.ggml.merges: missing; a byte-level BPE needs them"
    twice = len(tokens) - len(set(tokens))
    if twice:
        yield f"tokenizer.ggml.tokens: {twice} tokens are there twice"
    for key in _ROLES.values():
        number = vocabulary.get(key)
        if number is not None and not (is_whole_number(number, 0) and number < len(tokens)):
            yield f"tokenizer.ggml.{key}={number}: there are {len(tokens)} tokens"
    if adds_bos(vocabulary) and vocabulary.get("bos_token_id") is None:
        yield "tokenizer.ggml.bos_token_id: missing, though a text begins with BOS"


def write_tokenizer(vocabulary: Mapping[str, Any], folder: Path, max_length: int) -> None:
    """Writes the tokenizer's files as a Hugging Face folder has them.

    Raises:
        Exception: whatever tokenizers or sentencepiece raise for a vocabulary that is damaged.
    """
    if vocabulary["model"] == "llama":
        _write_sentencepiece(vocabulary, folder, max_length)
    else:
        _write_bpe(vocabulary, folder, max_length)


def _role_tokens(vocabulary: Mapping[str, Any]) -> dict[str, str]:
    """ "bos_token" and the like -> the token."""
    tokens = vocabulary["tokens"]
    return {
        f"{role}_token": tokens[vocabulary[key]] for role, key in _ROLES.items() if vocabulary.get(key) is not None
    }


def _write_bpe(vocabulary: Mapping[str, Any], folder: Path, max_length: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens, kind = vocabulary["tokens"], PRE_TOKENIZERS[vocabulary["pre"]]
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary["merges"]]
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=kind == "llama3"))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, vocabulary["token_type"], strict=True))
    for add, wanted in (
        (tokenizer.add_special_tokens, (_UNKNOWN, _CONTROL)),
        (tokenizer.add_tokens, (_USER_DEFINED,)),
    ):
        special = _CONTROL in wanted
        add([AddedToken(word, special=special, normalized=False) for word, number in kinds if number in wanted])
    roles = _role_tokens(vocabulary)
    if adds_bos(vocabulary):
        bos = roles["bos_token"]
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, ids[bos])]
                ),
            ]
        )
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **roles)
    theirs.chat_template = vocabulary.get("chat_template")
    theirs.save_pretrained(folder)


def _pre_tokenizer(kind: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if kind in ("gpt2", "digits"):
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return (
            gpt2 if kind == "gpt2" else pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
        )
    digits = r"\p{N}{1,3}" if kind == "llama3" else r"\p{N}"
    split = pre_tokenizers.Split(Regex(_WORDS + digits + _REST), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _write_sentencepiece(vocabulary: Mapping[str, Any], folder: Path, max_length: int) -> None:
    """GGUF keeps each piece of a sentencepiece model with its score and its kind, whose numbers are sentencepiece's."""
    # sentencepiece's own description needs a newer protobuf than NeMo allows.
    from transformers.utils import sentencepiece_model_pb2_new

    model = sentencepiece_model_pb2_new.ModelProto()
    for piece, score, kind in zip(vocabulary["tokens"], vocabulary["scores"], vocabulary["token_type"], strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size = spec.BPE, len(vocabulary["tokens"])
    spec.byte_fallback = _BYTE in vocabulary["token_type"]
    for role, key in _ROLES.items():
        number = vocabulary.get(key)
        setattr(spec, f"{role}_id", -1 if number is None else number)
        if number is not None:
            setattr(spec, f"{role}_piece", vocabulary["tokens"][number])
    unknown = [n for n, kind in enumerate(vocabulary["token_type"]) if kind == _UNKNOWN]
    if unknown:
        spec.unk_id, spec.unk_piece = unknown[0], vocabulary["tokens"][unknown[0]]
    normal = model.normalizer_spec
    normal.name, normal.remove_extra_whitespaces, normal.escape_whitespaces = "identity", False, True
    normal.add_dummy_prefix = bool(vocabulary.get("add_space_prefix", True))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": adds_bos(vocabulary),
        "add_eos_token": bool(vocabulary.get("add_eos_token", False)),
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **_role_tokens(vocabulary),
    }
    if vocabulary.get("chat_template"):
        config["chat_template"] = vocabulary["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
