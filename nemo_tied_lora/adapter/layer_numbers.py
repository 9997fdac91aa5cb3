# SPDX-License-Identifier: Apache-2.0
"""Numbers the layers of a Megatron model, for `layers`, the names of factors, files and exports. Imports no Megatron.

In a GPTModel a layer has attention and MLP, and its number is Megatron's, from 0. In a HybridModel, from megatron-core 0.19
on, each of them is a layer of its own, and a pattern says which:

==================  =========================================  ===============================================
pattern             numbers                                    whose numbers these are
==================  =========================================  ===============================================
``*-*-*-``          0 0 1 1 2 2: a pair is one layer           GPTModel's, and Hugging Face's of such models
``M*-M*-``          0 1 2 3 4 5: the place in the pattern      Hugging Face's Nemotron-H's, and Megatron's less 1
==================  =========================================  ===============================================

A pattern is paired if it is an attention (``*``, ``D``, ``+``, ``G``), a feed-forward (``-``, ``E``), an attention, and so on.
So a paired HybridModel has the names of the GPTModel with the same weights, and its files are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["LayerNumbers"]

_ATTENTIONS, _FEED_FORWARDS = frozenset("*D+G"), frozenset("-E")
_LAYER_OF_KEY = re.compile(r"^decoder\.layers\.(\d+)\.")
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""A HybridModel's keys for norms that are modules of their own to GPTModel's, which are those of Transformer Engine's
fused linears."""


@dataclass(frozen=True)
class LayerNumbers:
    """How the layers of one model are numbered. The same on every rank.

    pattern: of a HybridModel's decoder, without marks of stages; None for a GPTModel. num_places: Megatron's layers.
    """

    pattern: str | None
    num_places: int

    @classmethod
    def of(cls, body: Any) -> LayerNumbers:
        """The numbers of a GPTModel or HybridModel."""
        pattern: str | None = getattr(body, "hybrid_layer_pattern", None)
        if pattern is None:
            return cls(None, body.config.num_layers)
        main = pattern.partition("/")[0].replace("|", "")  # after it come the layers of multi-token prediction
        return cls(main, len(main))

    @property
    def paired(self) -> bool:
        """Whether two places of the pattern are one layer."""
        pattern = self.pattern or ""
        pairs = set(pattern[::2]) <= _ATTENTIONS and set(pattern[1::2]) <= _FEED_FORWARDS
        return bool(pattern) and len(pattern) % 2 == 0 and pairs

    @property
    def own_pattern(self) -> str | None:
        """The pattern of a model that no GPTModel is equal to; None for others."""
        return None if self.paired else self.pattern

    @property
    def count(self) -> int:
        """The number of layers; they are numbered from 0."""
        return self.num_places // 2 if self.paired else self.num_places

    @property
    def note(self) -> str:
        """The end of a message about targets that a pattern lacks; empty for a GPTModel."""
        if self.pattern is None:
            return ""
        others = sorted(set(self.pattern) - set("*-E"))
        rest = f"; the linears of {', '.join(others)} are no targets" if others else ""
        return (
            f" (hybrid_layer_pattern={self.pattern}: * has linear_qkv and linear_proj, - and E have linear_fc1 and "
            f"linear_fc2{rest})"
        )

    def outside(self, layers: Iterable[int]) -> Iterator[str]:
        """Yields one line if the model does not have some of these layers."""
        beyond = [layer for layer in layers if layer >= self.count]
        if beyond:
            pairs = f" of two places each in the pattern {self.pattern}" if self.paired else ""
            yield f"layers: {beyond} do not exist; the model has layers 0 to {self.count - 1}{pairs}"

    def at(self, place: int) -> int:
        """The number of the layer at a place. place: Megatron's ``layer_number - 1``, over all stages."""
        return place // 2 if self.paired else place

    def key(self, key: str) -> str:
        """The name in a distributed checkpoint that GPTModel gives to a weight. A model that is not paired keeps its own."""
        found = _LAYER_OF_KEY.match(key)
        if not self.paired:
            return key
        if found is None:
            return key.replace("decoder.final_norm.", "decoder.final_layernorm.", 1)
        rest = key[found.end() :]
        if self.pattern is not None and self.pattern[int(found[1])] in "*-":
            for own, theirs in _NORMS.items():
                rest = theirs + rest.removeprefix(own) if rest.startswith(own) else rest
        return f"decoder.layers.{self.at(int(found[1]))}.{rest}"
