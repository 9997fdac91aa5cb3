# SPDX-License-Identifier: Apache-2.0
"""Reads the weights of a Hugging Face folder tensor by tensor, and makes Megatron's tensors of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_tied_lora.conversion.hf_families import BaseSizes, Family, join_rows
from nemo_tied_lora.conversion.stored_tensors import StoredTensors
from nemo_tied_lora.errors import ConfigError

__all__ = ["HfWeights", "megatron_tensors"]


class HfWeights(StoredTensors):
    """The tensors in a model's folder, by their names in the whole model. A bare body's names lack the first word.

    Raises:
        ConfigError: the folder has no weights, or a shard is missing or damaged.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._taken: set[str] = set()
        self.spare: set[str] = set()
        """Stored names that need not be taken: copies and constants whose values are right."""

    def stored_name(self, name: str) -> str | None:
        """The name under which a tensor is stored, if it is."""
        return next((n for n in (name, name.partition(".")[2]) if n in self.files), None)

    def take(self, name: str) -> torch.Tensor:
        """Reads a tensor by its name in the whole model.

        Raises:
            ConfigError: the tensor is missing, unreadable, not of a floating-point type, or holds NaN or infinity.
        """
        known = self.stored_name(name)
        if known is None:
            raise ConfigError([f"{name}: missing in the folder's weights"])
        self._taken.add(known)
        tensor = self.read(known)
        if not tensor.is_floating_point():
            raise ConfigError([f"{self.files[known]}: {known} has dtype {tensor.dtype}; save it unquantized"])
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            raise ConfigError(
                [f"{self.files[known]}: {known}: {wrong} of {tensor.numel()} numbers are NaN or infinity"]
            )
        return tensor

    def left_over(self) -> list[str]:
        """Names of the weights that `take` has not read and that are not `spare`."""
        return sorted(self.files.keys() - self._taken - self.spare)


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
