# SPDX-License-Identifier: Apache-2.0
"""NeMo's LoRA layer under sequence parallelism, where it depends on the version of Transformer Engine.

For a column-parallel linear, NeMo's layer has two ways. Before Transformer Engine 1.5, and with overlapped communication,
the layer gathers its input itself, at full width. From 1.5 on, Transformer Engine passes the input that the base has
gathered, and adds the layer's gradient to the one that the base scatters. Without Transformer Engine the layer cannot be
built. This module fakes a version, and does Transformer Engine's part without counting it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from adapted_models import NemoLora
from collectives import uncounted

__all__ = ["NemoLoraAfterGather", "transformer_engine"]


@contextmanager
def transformer_engine(version: str) -> Iterator[None]:
    """Inside this context `importlib.metadata` reports this version of Transformer Engine as installed."""
    original = importlib.metadata.version

    def fake(distribution_name: str) -> str:
        return version if distribution_name == "transformer-engine" else original(distribution_name)

    with patch("importlib.metadata.version", fake):
        yield


class NemoLoraAfterGather(NemoLora):
    """`NemoLora` with a column's input gathered by the base, as Transformer Engine does from 1.5 on."""

    def adapter_input(self, input_: torch.Tensor) -> torch.Tensor:
        return input_ if self.nemo_lora.input_is_parallel else _GatheredByTheBase.apply(input_)


class _GatheredByTheBase(torch.autograd.Function):
    """x (s/T, b, in) -> (s, b, in); backward reduce-scatters. Not counted, because the base does both anyway."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        with uncounted():
            return gather_from_sequence_parallel_region(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region

        with uncounted():
            return reduce_scatter_to_sequence_parallel_region(grad.contiguous())
