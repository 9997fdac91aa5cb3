# SPDX-License-Identifier: Apache-2.0
"""Chooses the tokenizer of an imported base, and compares its ids with those of Hugging Face's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.nemo.stored_tokenizer import STORED_FILES

__all__ = ["differing_texts", "texts_not_given_back", "tokenizer_section"]

_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # squared\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.",
    " a blank before, two  between, and one after ",
    "1234567890 3.14159 -1e-6",
    "日本語 и кириллица",
)


def tokenizer_section(folder: Path) -> dict[str, Any]:
    """NeMo's `model.tokenizer` for a Hugging Face folder. Its paths are in that folder; NeMo copies the files to the `.nemo`.

    Raises:
        ConfigError: the folder has no tokenizer, or a damaged one.
    """
    try:
        section = _section(folder)
        if section["library"] == "huggingface":
            _theirs(folder)
    except ConfigError:
        raise
    except Exception as error:  # whatever tokenizers raise for a damaged file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError([f"path={folder}: its tokenizer cannot be read: {reason}; copy it again"]) from error
    return section


def _section(folder: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"type": None, "model": None, "vocab_file": None, "merge_file": None}
    found = {key: str(folder / name) for key, name in STORED_FILES.items() if (folder / name).is_file()}
    if "sentencepiece" in found and _has_every_token(folder):
        return {"library": "sentencepiece", **empty, "model": found["sentencepiece"], "sentencepiece_legacy": False}
    if "tokenizer" in found or {"vocab", "merges"} <= found.keys():
        return {"library": "huggingface", **empty, "type": folder.name, "use_fast": True, "stored": found}
    known = "tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
    raise ConfigError([f"path={folder}: has no tokenizer ({known}); save it there: tokenizer.save_pretrained(...)"])


def _has_every_token(folder: Path) -> bool:
    """Returns whether the sentencepiece model has all tokens of tokenizer.json: NeMo's sentencepiece cannot add any."""
    import sentencepiece

    if not (folder / "tokenizer.json").is_file():
        return True
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens") or ()
    return all(token["id"] < pieces for token in added)


def differing_texts(folder: Path, tokenizer: Any) -> tuple[str, ...]:
    """The sample texts for which NeMo's tokenizer and Hugging Face's give different ids.

    Raises:
        RuntimeError: Hugging Face's tokenizer cannot be built here; slow Llama tokenizers need more packages.
    """
    try:
        theirs = _theirs(folder)
    except Exception as error:  # whatever its packages raise
        raise RuntimeError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    pairs = [(t, theirs(t, add_special_tokens=False)["input_ids"]) for t in _TEXTS]
    return tuple(text for text, ids in pairs if list(tokenizer.text_to_ids(text)) != ids)


def texts_not_given_back(folder: Path) -> tuple[str, ...]:
    """The sample texts that Hugging Face's tokenizer does not decode again from their ids, except for blanks at the ends."""
    theirs = _theirs(folder)
    ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in _TEXTS]
    decoded = [theirs.decode(one, clean_up_tokenization_spaces=False).strip() for one in ids]
    return tuple(text for text, back in zip(_TEXTS, decoded, strict=True) if back != text.strip())


def _theirs(folder: Path) -> Any:
    """Hugging Face's tokenizer. Runs no code from the folder."""
    import transformers

    options = {"use_fast": (folder / "tokenizer.json").is_file(), "local_files_only": True, "trust_remote_code": False}
    return transformers.AutoTokenizer.from_pretrained(str(folder), **options)
