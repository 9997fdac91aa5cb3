# SPDX-License-Identifier: Apache-2.0
"""A sequence-parallel LayerNorm and RMSNorm for megatron-core's local spec.

Under sequence parallelism a norm gets (s/TP, b, h). The rank that holds a token normalises it, so forward needs no
communication. Weight and bias are replicated, and their gradients are partial over the sequence. Megatron and NeMo sum
them over the tensor-parallel group for every parameter with ``sequence_parallel=True``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["allow_sequence_parallel"]


def allow_sequence_parallel(new: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """``WrappedTorchNorm.__new__`` (megatron/core/transformer/torch_norm.py) without two of its refusals.

    It sets ``sequence_parallel`` on the parameters. For ``persist_layer_norm``, a kernel of apex, it uses torch's norm.
    It still refuses zero-centred gamma, which would change the result.
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
