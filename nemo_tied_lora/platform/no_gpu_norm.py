# SPDX-License-Identifier: Apache-2.0
"""A sequence-parallel LayerNorm and RMSNorm for megatron-core's local spec.

Under sequence parallelism a norm sees (s/TP, b, h): each token is normalised on the rank that holds it, so the
forward needs nothing. Its weight and bias are replicated, and their gradients, partial over the sequence, are
summed over the tensor-parallel group by Megatron and NeMo, for every parameter with ``sequence_parallel=True``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["allow_sequence_parallel"]


def allow_sequence_parallel(new: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """``WrappedTorchNorm.__new__`` (megatron/core/transformer/torch_norm.py) without two of its refusals.

    ``sequence_parallel`` is carried by the parameters; ``persist_layer_norm`` names a kernel of apex's, and
    torch's own is used in its place. What would change the result (zero-centred gamma) is still refused.
    """

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        plain.persist_layer_norm = False
        norm = new(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    return build
