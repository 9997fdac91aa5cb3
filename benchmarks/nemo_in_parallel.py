# SPDX-License-Identifier: Apache-2.0
"""NeMo's LoRA layer where NeMo asks which Transformer Engine is installed: under sequence parallelism.

Its layer then takes one of two ways for a column-parallel linear. Before Transformer Engine 1.5, and with its overlapped
communication, the layer gathers its input, full width, itself. From 1.5 on Transformer Engine hands out the input that the
base has gathered, and adds the layer's gradient to the one that the base scatters. Without Transformer Engine the layer
does not build at all. Here it is told a version, and what Transformer Engine would do for it is done uncounted.
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
    """Inside, `importlib.metadata` says that this version of Transformer Engine is installed."""
    original = importlib.metadata.version

    def told(distribution_name: str) -> str:
        return version if distribution_name == "transformer-engine" else original(distribution_name)

    with patch("importlib.metadata.version", told):
        yield


class NemoLoraAfterGather(NemoLora):
    """As `NemoLora`, with a column's input gathered for it by the base, as Transformer Engine does from 1.5 on."""

    def adapter_input(self, input_: torch.Tensor) -> torch.Tensor:
        return input_ if self.nemo_lora.input_is_parallel else _GatheredByTheBase.apply(input_)


class _GatheredByTheBase(torch.autograd.Function):
    """x (s/T, b, in) -> (s, b, in); its gradient is reduce-scattered. Neither is counted: the base does both anyway."""

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
