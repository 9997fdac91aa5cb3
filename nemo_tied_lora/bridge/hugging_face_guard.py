# SPDX-License-Identifier: Apache-2.0
"""Refuses to write a whole model for Hugging Face while an adapter is on it and not merged. Imports no Bridge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from nemo_tied_lora.adapter.target_modules import wrappers
from nemo_tied_lora.errors import ConfigError

__all__ = ["hidden_factors", "of_the_base", "refuse_unmerged", "refusing_unmerged"]


def refuse_unmerged(chunks: Sequence[nn.Module]) -> None:
    """Checks a model before its base weights are written.

    Raises:
        ConfigError: it has an adapter that is not merged: the file would hold the base without the update. On every rank
            alike, also on a stage that has no linear of the adapter.
    """
    if any(not decoder.tied_lora.merged for decoder in _adapted(chunks)):
        raise ConfigError(
            [
                "model: it has a Tied-LoRA adapter that is not merged, so the export would be the base without the update; "
                "call peft.adapter.merge() first, or export inside peft.disable_adapter(model)"
            ]
        )


@contextmanager
def hidden_factors(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """In this context the model does not name the adapter's factors, for which Bridge knows no Hugging Face weight."""
    found = [(decoder, decoder.tied_lora) for decoder in _adapted(chunks)]
    for decoder, _ in found:
        del decoder._modules["tied_lora"]
    try:
        yield
    finally:
        for decoder, factors in found:
            decoder._modules["tied_lora"] = factors


def refusing_unmerged(save: Callable[..., None]) -> Callable[..., None]:
    """Wraps Bridge's method that writes a whole model, which writes a tokenizer before it comes to the weights."""

    @functools.wraps(save)
    def checked(bridge: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        refuse_unmerged(model if isinstance(model, list) else [model])
        save(bridge, model, *args, **kwargs)

    return checked


def of_the_base(stream: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
    """Wraps Bridge's method under every export of whole weights, which looks for Bridge's own LoRA alone.

    It would write the base without our update, and it fails at weights that it does not know.
    """

    def with_hidden_factors(chunks: list[Any], *args: Any, **kwargs: Any) -> Iterable[Any]:
        with hidden_factors(chunks):
            yield from stream(*args, **kwargs)

    @functools.wraps(stream)
    def checked(bridge: Any, model: Any, *args: Any, **kwargs: Any) -> Iterable[Any]:
        chunks = model if isinstance(model, list) else [model]
        refuse_unmerged(chunks)
        return with_hidden_factors(chunks, bridge, model, *args, **kwargs)

    return checked


def _adapted(chunks: Sequence[nn.Module]) -> list[Any]:
    """The decoders that have an adapter's factors."""
    bodies: list[Any] = [[chunk, *(wrapper.module for wrapper in wrappers(chunk))][-1] for chunk in chunks]
    decoders = [getattr(body, "decoder", None) for body in bodies]
    return [decoder for decoder in decoders if hasattr(decoder, "tied_lora")]
