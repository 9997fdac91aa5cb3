# SPDX-License-Identifier: Apache-2.0
"""Running Megatron and NeMo on machines that lack what NVIDIA's containers have.

One call, :func:`prepare`, before any NeMo or Megatron model is built. Each thing that may be lacking has a
switch of its own, in a module of its own: a GPU, apex, Transformer Engine, the container. A switch does
nothing where the real thing is there. No other part of the package knows about any of this.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_tied_lora.platform import detect, no_apex, no_container, no_gpu, no_transformer_engine

__all__ = ["PlatformReport", "prepare"]


@dataclass(frozen=True, kw_only=True)
class PlatformReport:
    """What was found, and what was replaced for want of it."""

    gpu: bool
    """torch finds a CUDA device."""
    apex: bool
    """NVIDIA's apex imports."""
    transformer_engine: bool
    """Transformer Engine imports."""
    replaced: tuple[str, ...]
    """The upstream names that this call replaced: empty when a call before it did the work."""


def prepare(*, nemo: bool = False) -> PlatformReport:
    """Make Megatron run on this machine; with ``nemo=True``, NeMo too, which imports it.

    Call it once per process, children included, before a model is built. Calling it again does nothing more.

    Raises:
        ImportError: megatron-core, or NeMo where it is asked for, is not installed.
    """
    replaced: tuple[str, ...] = ()
    for switch in (no_gpu, no_apex, no_transformer_engine, no_container):
        replaced += switch.enable(nemo=nemo)
    return PlatformReport(
        gpu=detect.has_gpu(),
        apex=detect.has_apex(),
        transformer_engine=detect.has_transformer_engine(),
        replaced=replaced,
    )
