# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the name ``torch`` in upstream modules that write ``device="cuda"``.

Megatron and NeMo write the device literally in a few modules. Replacing the name ``torch`` there does not change torch
itself and costs other modules nothing. It also works in every thread and in backward, where a ``TorchFunctionMode``
would not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

__all__ = ["NoStream", "cuda_type_names", "no_gpu_torch", "no_streams", "stand_in", "with_cuda_type_names"]

_FACTORIES = ("arange", "as_tensor", "empty", "full", "ones", "tensor", "zeros")


class NoStream:
    """A stream, and its event, for the CPU, where work is done when its call returns."""

    def wait_stream(self, _stream: object) -> None: ...

    def wait_event(self, _event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> NoStream:
        return self


def no_streams(torch_: ModuleType) -> ModuleType:
    """Returns ``torch`` with streams that do nothing."""
    only = NoStream()
    cuda = stand_in(
        torch_.cuda, Stream=lambda: only, current_stream=lambda: only, stream=lambda _stream: nullcontext(only)
    )
    return stand_in(torch_, cuda=cuda)


class _StandIn(ModuleType):
    """A module with some names replaced. Copying the dictionary keeps attribute look-ups fast."""

    def __init__(self, original: ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(original.__name__)
        self.__dict__.update(vars(original))
        self.__dict__.update(replaced)
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:
        # torch imports some submodules on first use, after the copy was made.
        return getattr(self.__dict__["_original"], name)


def stand_in(original: ModuleType, **replaced: Any) -> ModuleType:
    """Returns a copy of a module with the given names replaced; the module itself is unchanged."""
    return _StandIn(original, replaced)


@functools.cache
def no_gpu_torch() -> ModuleType:
    """Returns ``torch`` whose tensor factories and ``autocast`` take ``"cuda"`` as ``"cpu"``, and pin no memory."""
    replaced: dict[str, Any] = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return stand_in(torch, autocast=_cpu_autocast, **replaced)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # only a GPU's driver can pin
        return factory(*args, **kwargs)

    return create


def _cpu_autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
    return torch.autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Makes ``tensor.type()`` return ``torch.cuda.FloatTensor`` for a ``torch.FloatTensor`` inside the context.

    The optimizers compare this string instead of the dtype.
    """
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that it runs inside :func:`cuda_type_names`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with cuda_type_names():
            return function(*args, **kwargs)

    return run
