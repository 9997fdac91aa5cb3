# SPDX-License-Identifier: Apache-2.0
"""Reads a Hugging Face model's folder: its description for NeMo, and its weights, compared with each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_tied_lora.conversion.hf_config import NemoKeys, nemo_keys
from nemo_tied_lora.conversion.hf_config_file import read_hf_config
from nemo_tied_lora.conversion.hf_families import BaseSizes, Family, family_of_model_type
from nemo_tied_lora.conversion.hf_stored_check import check_stored, storage_dtype
from nemo_tied_lora.conversion.hf_weights import HfWeights
from nemo_tied_lora.errors import ConfigError

__all__ = ["HfFolder", "read_hf_folder"]


@dataclass(frozen=True)
class HfFolder:
    """A model that can be imported."""

    described: Any
    """transformers' config."""
    keys: NemoKeys
    weights: HfWeights
    family: Family
    sizes: BaseSizes
    dtype: torch.dtype
    """In which the weights are stored."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json with the defaults of its model type."""
        return self.described.to_dict()


def read_hf_folder(folder: Path, vocab_multiple: int = 128) -> HfFolder:
    """Reads config.json, and the names, shapes and dtypes of the weights. Never runs code from the folder.

    Args:
        vocab_multiple: see `nemo_keys`.

    Raises:
        ConfigError: the model cannot be imported, or its weights are damaged, or are not those that config.json describes.
    """
    described = _described(folder)
    config = described.to_dict()
    keys = nemo_keys(config, vocab_multiple=vocab_multiple)
    family = family_of_model_type(config["model_type"], "config.json")
    sizes = BaseSizes.from_model_config(keys.model, "config.json")
    weights = HfWeights(folder)
    keys.notes += check_stored(weights, family, sizes, keys.model, config)
    return HfFolder(described, keys, weights, family, sizes, storage_dtype(weights))


def _described(folder: Path) -> Any:
    import transformers

    raw = read_hf_config(folder)
    try:
        return transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # whatever wrong values raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError([f"{folder / 'config.json'}: cannot be read: {reason}"]) from error
