# SPDX-License-Identifier: Apache-2.0
"""Builds a Hugging Face tokenizer from files in the `.nemo`.

NeMo's own `library: huggingface` names a tokenizer on the hub. A machine without a network cannot download it, and it
may have changed. So the `.nemo` holds its files as artifacts under `tokenizer.stored`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["STORED_FILES", "StoredTokenizerMixin"]

STORED_FILES = {
    "tokenizer": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "special_tokens_map": "special_tokens_map.json",
    "added_tokens": "added_tokens.json",
    "vocab": "vocab.json",
    "merges": "merges.txt",
    "sentencepiece": "tokenizer.model",
    "model_config": "config.json",
}
"""Key of `tokenizer.stored` -> the file's name in a Hugging Face folder."""


class StoredTokenizerMixin:
    """A mixin in front of a NeMo model: builds the tokenizer from `tokenizer.stored` if it is set."""

    def _build_tokenizer(self) -> None:
        stored = self._cfg.tokenizer.get("stored")  # type: ignore[attr-defined]
        if not stored:
            super()._build_tokenizer()  # type: ignore[misc]
            return
        from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            for key, source in stored.items():
                if source is not None:
                    path = self.register_artifact(f"tokenizer.stored.{key}", source)  # type: ignore[attr-defined]
                    shutil.copyfile(path, Path(folder) / STORED_FILES[key])
            self.tokenizer: Any = get_nmt_tokenizer(library="huggingface", model_name=folder, use_fast=True)
