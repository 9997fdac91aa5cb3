# SPDX-License-Identifier: Apache-2.0
"""Makes Megatron and NeMo run on machines without a GPU, apex, Transformer Engine or NVIDIA's container.

Call `prepare` before any NeMo, Megatron or Bridge model is built. It throws one switch per missing part, each in its own module.
A switch does nothing if the machine has the part. No other room of the package knows what a machine lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_tied_lora.platform import detect, no_apex, no_bridge_kernels, no_container, no_gpu, no_transformer_engine

__all__ = ["PlatformReport", "prepare"]


@dataclass(frozen=True, kw_only=True)
class PlatformReport:
    """What the machine has, and what was replaced because it lacks the rest."""

    gpu: bool
    """Whether torch finds a CUDA device."""
    apex: bool
    """Whether NVIDIA's apex can be imported."""
    transformer_engine: bool
    """Whether Transformer Engine can be imported."""
    replaced: tuple[str, ...]
    """The upstream names that this call replaced; empty if an earlier call replaced them."""


def prepare(*, nemo: bool = False, bridge: bool = False) -> PlatformReport:
    """Makes Megatron run on this machine.

    Call it once per process, including child processes, before a model is built. A second call does nothing.

    Args:
        nemo: whether to do the same for NeMo. This imports NeMo.
        bridge: whether to do the same for Megatron-Bridge. This does not import Bridge itself.

    Raises:
        ImportError: megatron-core, or NeMo or Bridge's megatron-core if asked for, is not installed.
    """
    replaced: tuple[str, ...] = ()
    for switch in (no_gpu, no_apex, no_transformer_engine, no_container):
        replaced += switch.enable(nemo=nemo)
    if bridge:
        replaced += no_gpu.enable_bridge() + no_bridge_kernels.enable()
    return PlatformReport(
        gpu=detect.has_gpu(),
        apex=detect.has_apex(),
        transformer_engine=detect.has_transformer_engine(),
        replaced=replaced,
    )
