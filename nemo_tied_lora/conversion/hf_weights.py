# SPDX-License-Identifier: Apache-2.0
"""Reads the weights of a Hugging Face folder tensor by tensor, and makes Megatron's tensors of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from nemo_tied_lora.conversion.hf_families import BaseSizes, Family, join_rows
from nemo_tied_lora.errors import ConfigError

__all__ = ["HfWeights", "megatron_tensors"]

_IGNORED = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
"""Constants that old versions of transformers stored with the weights."""


class HfWeights:
    """The tensors in a folder of safetensors or legacy .bin files. Never runs code from a pickle.

    Raises:
        ConfigError: the folder has neither, or a shard is missing or damaged.
    """

    def __init__(self, folder: Path):
        self._files = _files_of_tensors(folder)
        self._taken: set[str] = set()
        self._legacy: tuple[Path | None, dict[str, torch.Tensor]] = (None, {})

    def take(self, name: str) -> torch.Tensor:
        """Reads a tensor by its name in the whole model. Also finds it without the first word, as in a bare body.

        Raises:
            ConfigError: the tensor is missing, unreadable, or holds NaN or infinity.
        """
        known = next((n for n in (name, name.partition(".")[2]) if n in self._files), None)
        if known is None:
            raise ConfigError([f"{name}: missing in the folder's weights"])
        self._taken.add(known)
        path = self._files[known]
        try:
            tensor = self._read(path, known)
        except Exception as error:  # whatever a damaged file raises
            raise ConfigError([f"{path}: {known} cannot be read: {type(error).__name__}: {error}"]) from error
        if not torch.isfinite(tensor).all():
            raise ConfigError([f"{path}: {known} holds NaN or infinity"])
        return tensor

    def left_over(self) -> list[str]:
        """Names of the weights that `take` has not read."""
        return sorted(name for name in self._files.keys() - self._taken if not _IGNORED.search(name))

    def _read(self, path: Path, name: str) -> torch.Tensor:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                return tensors.get_tensor(name)
        if self._legacy[0] != path:
            self._legacy = (path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        return self._legacy[1][name]


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    for index, whole in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).is_file():
            try:
                files = {
                    n: folder / Path(f).name for n, f in json.loads((folder / index).read_text())["weight_map"].items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError([f"{folder / index}: cannot be read: {error}"]) from error
            missing = sorted({path for path in files.values() if not path.is_file()})
            if missing:
                raise ConfigError([f"{path}: missing, though {index} names it" for path in missing])
            return files
        if (folder / whole).is_file():
            try:
                return dict.fromkeys(_names(folder / whole), folder / whole)
            except Exception as error:  # whatever a damaged file raises
                raise ConfigError([f"{folder / whole}: cannot be read: {type(error).__name__}: {error}"]) from error
    raise ConfigError([f"path={folder}: holds neither model.safetensors nor pytorch_model.bin, whole or in shards"])


def _names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as tensors:
            return list(tensors.keys())
    return list(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def megatron_tensors(
    weights: HfWeights, family: Family, sizes: BaseSizes, *, qkv_bias: bool, bias: bool, shared: bool, vocab_rows: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Megatron's name, whole tensor) for every parameter, in the model's order, one at a time.

    Args:
        qkv_bias, bias: whether linear_qkv, and whether every linear, has a bias.
        shared: whether the output layer is the embedding.
        vocab_rows: the number of rows of the padded embedding.
    """
    whole = {name: source for name, source in family.whole.items() if not (shared and name == "output_layer.weight")}
    for name, source in whole.items():
        if not name.startswith(("decoder.", "output_layer.")):
            yield name, _padded(weights.take(source), vocab_rows, name)
    for layer in range(sizes.num_layers):
        prefix = f"decoder.layers.{layer}."
        for norm, source in family.norms.items():
            for kind in ("weight", "bias") if family.nemo["normalization"] == "layernorm" else ("weight",):
                yield f"{prefix}{norm}.{kind}", weights.take(f"{family.layer(layer)}.{source}.{kind}")
        for target, parts in family.targets.items():
            block = "self_attention" if target in ("linear_qkv", "linear_proj") else "mlp"
            for kind in ("weight", "bias") if bias or (qkv_bias and target == "linear_qkv") else ("weight",):
                tensors = [weights.take(f"{family.layer(layer)}.{part.name}.{kind}") for part in parts]
                if family.transposed and kind == "weight":
                    tensors = [tensor.T for tensor in tensors]
                yield f"{prefix}{block}.{target}.{kind}", join_rows(tensors, target, parts, sizes)
    for name, source in whole.items():
        if name.startswith(("decoder.", "output_layer.")):
            yield name, _padded(weights.take(source), vocab_rows, name)


def _padded(tensor: torch.Tensor, rows: int, name: str) -> torch.Tensor:
    """Pads an embedding with rows that are the mean of the others.

    The softmax over the padded vocabulary then gives the padding at most its share of the rows, because the exponential
    of a mean is at most the mean of the exponentials. Zeros would get nearly all of the softmax in a model like GPT-2,
    whose logits are all far below zero.
    """
    if name not in ("embedding.word_embeddings.weight", "output_layer.weight") or len(tensor) == rows:
        return tensor
    mean = tensor.double().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])
