# SPDX-License-Identifier: Apache-2.0
"""Several named adapters on one model; at most one is active at a time.

    adapters = Adapters(model)
    adapters.load("customer", "customer.nemo")
    adapters.switch("customer")

The adapters may have different ranks, targets, layers, trained and tied factors. Switching detaches one adapter from the
model's linears and attaches another; it copies no tensor. Frozen factors with the same bits are in memory once, as in
all VeRA adapters of one seed and rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from nemo_tied_lora.adapter.inject import inject
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.tied_factors import share_frozen
from nemo_tied_lora.checkpoint.save_load_on_any_layout import load_adapter
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError

__all__ = ["Adapters"]


class Adapters:
    """Named adapters on one base model.

    All ranks make the same calls in the same order. Without an active adapter the model is the unchanged base, including
    its trainable parameters. Move or cast the model before you load adapters. Megatron's DDP allocates memory for the
    parameters that it finds: before you wrap the model, switch to the adapter that you train, and do not switch again.

    Args:
        model: one Megatron module, or the list of a stage's chunks, without an adapter.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]):
        self._model = model
        self._adapters: dict[str, Adapter] = {}
        self._chosen: str | None = None
        self._enabled = True

    @property
    def active(self) -> str | None:
        """The name of the active adapter; None if the model is the base."""
        return self._chosen if self._enabled else None

    def load(self, name: str, path: str | os.PathLike, **options: Any) -> Adapter:
        """Loads a `.nemo` adapter under a name. The active adapter stays active.

        Args:
            options: as for `load_adapter`.

        Raises:
            ConfigError: the name is taken or empty, the file is not a complete adapter, or it was trained on another
                base. Model and adapters are unchanged.
            FileNotFoundError: the file does not exist.
        """
        self._check_new(name)
        with self._bare():
            return self._keep(name, load_adapter(self._model, path, **options))

    def add(self, name: str, config: TiedLoraConfig) -> Adapter:
        """Adds a new adapter for training. The active adapter stays active.

        Raises:
            ConfigError: the name is taken or empty, or as `inject`. Model and adapters are unchanged.
        """
        self._check_new(name)
        with self._bare():
            return self._keep(name, inject(self._model, config))

    def switch(self, name: str) -> None:
        """Makes this adapter the active one, also after `disable`.

        Raises:
            ConfigError: no adapter has this name. RuntimeError: the active adapter is merged.
        """
        adapter = self[name]
        if self.active != name:
            self._detach()
            adapter.attach()
        self._chosen, self._enabled = name, True

    def disable(self) -> None:
        """Makes the model the base, until `enable` or `switch`.

        Raises:
            RuntimeError: the active adapter is merged.
        """
        self._detach()
        self._enabled = False

    def enable(self) -> None:
        """Makes the adapter active again that was active before `disable`.

        Raises:
            ConfigError: no adapter was active, or it was deleted.
        """
        if self._chosen is None:
            raise ConfigError([f"enable: no adapter was active; switch to one of {self._known()}"])
        self.switch(self._chosen)

    def delete(self, name: str) -> None:
        """Removes an adapter and frees its memory. If it was active, the model becomes the base.

        Raises:
            ConfigError: no adapter has this name. RuntimeError: it is merged.
        """
        adapter = self[name]
        adapter.detach()
        del self._adapters[name]
        adapter.remove()
        if self._chosen == name:
            self._chosen, self._enabled = None, True

    def num_bytes(self) -> int:
        """Bytes of all adapters' tensors on this rank; shared ones count once."""
        factors = [chunk.factors for adapter in self._adapters.values() for chunk in adapter.chunks]
        parameters = {id(parameter): parameter for each in factors for parameter in each.parameters()}
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise ConfigError([f"adapter {name!r}: unknown; the adapters are {self._known()}"])
        return self._adapters[name]

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def _known(self) -> str:
        return ", ".join(map(repr, self._adapters)) or "none; load one first"

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError([f"adapter {name!r}: the name must be a non-empty string"])
        if name in self._adapters:
            raise ConfigError([f"adapter {name!r}: the name is taken; delete it first, or choose another"])

    def _detach(self) -> None:
        if self.active is not None:
            self._adapters[self.active].detach()

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Detaches the active adapter meanwhile, and attaches it again even after an exception."""
        active = self.active
        self._detach()
        try:
            yield
        finally:
            if active is not None:
                self._adapters[active].attach()

    def _keep(self, name: str, adapter: Adapter) -> Adapter:
        """Shares frozen factors with the other adapters, and keeps the adapter detached."""
        adapter.detach()
        for index, chunk in enumerate(adapter.chunks):
            share_frozen(chunk.factors, (other.chunks[index].factors for other in self._adapters.values()))
        self._adapters[name] = adapter
        return adapter
