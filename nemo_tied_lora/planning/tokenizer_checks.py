# SPDX-License-Identifier: Apache-2.0
"""Checks a section `model.tokenizer` that is given to a fine-tuning: NeMo puts it in place of the base's whole section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["tokenizer_problems"]

# Library of NeMo -> the key without which it has no tokenizer.
_NEEDED = {"sentencepiece": "model", "huggingface": "type", "tabular": "vocab_file", "tiktoken": "vocab_file"}
_FIX = "or leave model.tokenizer out: the base's .nemo holds its tokenizer"


def tokenizer_problems(section: object) -> Iterator[str]:
    """Yields what a section lacks. None, or an empty one: the base's own is used."""
    if not section:
        return
    if not isinstance(section, Mapping):
        yield f"model.tokenizer={section!r}: must be a section of keys, {_FIX}"
        return
    library = section.get("library")
    needed = _NEEDED.get(str(library))
    if library is None:
        key, value = next(iter(section.items()))
        yield f"model.tokenizer.{key}={value}: needs model.tokenizer.library too; add it, {_FIX}"
    elif needed is not None and not section.get(needed):
        yield f"model.tokenizer.library={library}: needs model.tokenizer.{needed} too; add it, {_FIX}"
    elif needed in ("model", "vocab_file") and not Path(str(section[needed])).is_file():
        yield f"model.tokenizer.{needed}={section[needed]}: no such file; name one, {_FIX}"
