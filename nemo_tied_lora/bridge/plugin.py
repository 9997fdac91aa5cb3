# SPDX-License-Identifier: Apache-2.0
"""`TiedLoRA`, a PEFT method of Megatron-Bridge, and its learning rates. The one module of this package that imports Bridge.

Checked with megatron-bridge 0.6.2 and megatron-core 0.19.2.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.peft.base import PEFT
from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.utils import unwrap_model
from torch import nn

try:
    from megatron.bridge.training.config import OptimizerConfigOverrideProvider
except ImportError:  # needs packages that a stack with a training loop of its own leaves out
    OptimizerConfigOverrideProvider = object

from nemo_tied_lora.adapter.inject import inject
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.lr_multipliers import factor_multipliers, multiplier_problems
from nemo_tied_lora.adapter.rate_groups import megatron_overrides
from nemo_tied_lora.adapter.target_modules import gpt_model
from nemo_tied_lora.bridge.hugging_face_adapter import write_peft_folder
from nemo_tied_lora.bridge.hugging_face_guard import hidden_factors, refuse_unmerged
from nemo_tied_lora.bridge.load_check import refuse_partial_states
from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.checkpoint.save_load_on_any_layout import load_adapter
from nemo_tied_lora.config import FACTORS, TARGETS, TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, Problems

__all__ = ["FactorRates", "TiedLoRA"]

_Model = Any
"""A Megatron module, or the list of a stage's chunks."""


@dataclass
class TiedLoRA(PEFT):
    """``y = W x + scale * diag(v) B diag(u) A x``, with A and B shared by all layers: `cfg.peft = TiedLoRA(rank=8)`.

    The fields are those of `TiedLoraConfig`, with the same defaults. `TiedLoRA.preset("vera", rank=64)` sets the fields of
    a preset. A field may be changed until the method is applied.

    Raises:
        ConfigError: lists every field that is unknown (with what to write instead) or out of bounds.
    """

    rank: int = 8
    alpha: float | None = None
    alpha_rule: str = "rank"
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    layers: list[int] | None = None
    trained: list[str] = field(default_factory=lambda: list(FACTORS))
    tied: list[str] = field(default_factory=lambda: ["A", "B"])
    experts: str = "per_expert"
    init_A: str | None = None
    init_B: str | None = None
    init_u: float | None = None
    init_v: float | None = None
    init_std: float = 0.02
    seed: int = 1234
    frozen_factors: str = "tensor"
    dtype: str | None = None
    rank_budget: dict[str, Any] | None = None
    """Refused: Bridge's checkpoints would not hold what is pruned. A pruned adapter's file can be trained further."""
    restore_from_path: str | None = None
    """An adapter's `.nemo` file, from any training framework and layout: training starts from its tensors. A field that is
    not at its default must then have the file's value."""

    def __new__(cls, *_positional: Any, **given: Any) -> TiedLoRA:
        """Names what to write instead of another adapter's key. `__init__` would only call it unexpected."""
        known = {one.name for one in dataclasses.fields(cls) if one.init}
        if unknown := {key: value for key, value in given.items() if key not in known}:
            TiedLoraConfig.from_mapping(unknown)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.adapter: Adapter | None = None
        """The adapter, once the method was applied to a model. For `save_adapter`, `merge` and the rest."""
        self.config()

    def __getstate__(self) -> dict[str, Any]:
        """Without the adapter: Bridge sends a model's configuration, with its hooks, to the other stages."""
        return {**vars(self), "adapter": None}

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TiedLoRA:
        """Returns the named configuration (lora, vera, tl5, tl6), with any field overridden.

        Raises:
            ConfigError: the preset or a field is unknown, or a value is out of bounds.
        """
        path = overrides.pop("restore_from_path", None)
        return cls(**TiedLoraConfig.preset(name, **overrides).as_dict(), restore_from_path=path)

    def config(self) -> TiedLoraConfig:
        """The adapter's configuration, from the fields.

        Raises:
            ConfigError: lists every field that is out of bounds.
        """
        if self.rank_budget:
            raise ConfigError(
                [
                    f"rank_budget={self.rank_budget!r}: not with Megatron-Bridge, whose checkpoints would not hold what is pruned; "
                    "train on plain megatron-core or NeMo, and restore the file here"
                ]
            )
        return TiedLoraConfig(**{one.name: getattr(self, one.name) for one in dataclasses.fields(TiedLoraConfig)})

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Returns the module unchanged: factors are shared by all layers, so `__call__` adapts the model as a whole."""
        return module

    def __call__(self, model: _Model, training: bool = True) -> _Model:
        """Adapts the model in place, freezes the base, and returns the model. All ranks must call it.

        Bridge calls it after the base was loaded and before Float16Module and DDP wrap the model.

        Args:
            model: one Megatron module, or the list of a stage's chunks.
            training: False freezes the adapter too, and sets the model to evaluation.

        Raises:
            ConfigError: as `inject`: the model is wrapped in DDP already, a target or layer matches nothing, and others.
            AdapterFileError, BaseMismatchError: as `load_adapter`, with `restore_from_path`.
            RuntimeError: the model has an adapter already, or another rank failed.
        """
        config = self.config()
        if self.restore_from_path is None:
            adapter = inject(model, config)
        else:
            _check_file(config, self.restore_from_path)
            adapter = load_adapter(model, self.restore_from_path)
        refuse_partial_states(adapter)
        for chunk in adapter.chunks:
            for linear in chunk.linears:
                AutoMapping.register_module_type(type(linear.module).__name__, linear.kind)
            chunk.outer.train(mode=training)
            if not training:
                chunk.factors.requires_grad_(False)
        self.adapter = adapter
        return model

    def adapter_key_filter(self, key: str | tuple[str, Any]) -> bool:
        """Whether a checkpoint of the adapter holds this key: every stored factor, also a frozen one as VeRA's A and B.

        Args:
            key: a name, or a name with its parameter.
        """
        return "tied_lora" in (key[0] if isinstance(key, tuple) else key).split(".")

    def set_params_to_save(self, model: _Model) -> None:
        """Notes the names of all stored factors, trained or frozen."""
        super().set_params_to_save(model)
        chunks = model if isinstance(model, list) else [model]
        names = (name for chunk in chunks for name, _ in chunk.named_parameters())
        self.params_to_save |= {name for name in names if self.adapter_key_filter(name)}

    def disable_adapter_layers(self, model: _Model) -> None:
        """Gives the model the base's forward pass, as for the reference policy of reinforcement learning.

        `disable_adapter(model)` does so inside a `with`. Parameters and optimizer keep their state.

        Raises:
            RuntimeError: no adapter is on this model, or it is merged.
        """
        self._on(model).detach()

    def enable_adapter_layers(self, model: _Model) -> None:
        """Puts the adapter back, after `disable_adapter_layers`.

        Raises:
            RuntimeError: no adapter is on this model.
        """
        self._on(model).attach()

    def save_hf_adapter(self, model: _Model, path: str | os.PathLike, bridge: AutoBridge) -> Path:
        """Writes the adapter as plain LoRA, in a folder that peft loads. All ranks must call it; rank 0 writes.

        The same function in every layer, as `untie_to_lora` explains. `bridge.save_hf_adapter` cannot: it finds no adapter.

        Args:
            model: the model, wrapped or not.
            path: the folder. An earlier export is replaced.
            bridge: the `AutoBridge` of the Hugging Face base.

        Raises:
            RuntimeError: no adapter is on this model.
            ConfigError: lists each linear that Bridge cannot map, or maps to something that no plain LoRA can express; or
                the folder holds something else. Raised on every rank, before anything is written.
        """
        adapter, chunks = self._on(model), unwrap_model(model if isinstance(model, list) else [model])
        base_model = getattr(bridge.hf_pretrained, "model_name_or_path", None)
        with hidden_factors(chunks):
            tasks = bridge.get_conversion_tasks(chunks)
        name = None if base_model is None else str(base_model)
        return write_peft_folder(adapter, tasks, Path(path), name, getattr(bridge.hf_pretrained, "config", None))

    def _on(self, model: _Model) -> Adapter:
        """The adapter of this model."""
        chunks = model if isinstance(model, Sequence) else [model]
        if self.adapter is None or not _same_model(self.adapter, chunks):
            raise RuntimeError("TiedLoRA: it is not applied to this model; call it with the model first: peft(model)")
        return self.adapter


@dataclass
class FactorRates(OptimizerConfigOverrideProvider):
    """The learning rate of each factor: `cfg.optimizer_config_override_provider = FactorRates({"B": 4.0})`.

    `cfg.optimizer.lr` and `min_lr` are those of a factor whose multiplier is 1; the scheduler scales the warm-up too.
    """

    lr_multipliers: dict[str, float] | None = None
    """Any of A, B, u, v to a multiplier, as `model.optim.lr_multipliers` of `tied-lora finetune`. A factor that is missing
    has the default of its preset."""

    def __post_init__(self) -> None:
        """Raises ConfigError with every name that is no factor, and every value that is no rate."""
        Problems(multiplier_problems(self.lr_multipliers)).raise_if_any()

    def build_config_overrides(self, context: Any) -> dict[Any, Any]:
        """What Bridge passes to megatron-core: its own overrides, and ours for the factors of `context.model`.

        Raises:
            ConfigError: the model has no adapter.
        """
        multiplier_of: dict[nn.Parameter, float] = {}
        for chunk in context.model if isinstance(context.model, list) else [context.model]:
            factors = getattr(gpt_model(chunk).decoder, "tied_lora", None)
            if factors is None:
                raise ConfigError(
                    ["optimizer_config_override_provider: the model has no adapter; set cfg.peft = TiedLoRA(...)"]
                )
            multipliers = factor_multipliers(factors.adapter_config, self.lr_multipliers)
            named = ((name, parameter) for name, parameter in factors.named_factors() if parameter.requires_grad)
            multiplier_of |= {parameter: multipliers[name.factor] for name, parameter in named}
        options = context.optimizer_config
        return {**get_standard_config_overrides(options), **megatron_overrides(multiplier_of, options)}


def _same_model(adapter: Adapter, chunks: Iterable[nn.Module]) -> bool:
    bodies = {id(chunk.body) for chunk in adapter.chunks}
    return all(any(id(module) in bodies for module in chunk.modules()) for chunk in chunks)


def _check_file(config: TiedLoraConfig, path: str) -> None:
    """Refuses fields that were set to something else than the file has."""
    found, default = read_adapter(path).config.as_dict(), TiedLoraConfig().as_dict()
    problems = [
        f"{name}={value!r}: the adapter in {path} has {found[name]!r}; leave the field out, or set it to that"
        for name, value in config.as_dict().items()
        if value != default[name] and value != found[name]
    ]
    if problems:
        raise ConfigError(problems)


def _refusing_unmerged(save: Callable[..., None]) -> Callable[..., None]:
    """Wraps Bridge's method that writes a whole model, which writes a tokenizer before it comes to the weights."""

    @functools.wraps(save)
    def checked(bridge: Any, model: _Model, *args: Any, **kwargs: Any) -> None:
        refuse_unmerged(model if isinstance(model, list) else [model])
        save(bridge, model, *args, **kwargs)

    return checked


def _of_the_base(stream: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
    """Wraps Bridge's method under every export of whole weights, which looks for Bridge's own LoRA alone.

    It would write the base without our update, and it fails at weights that it does not know.
    """

    def with_hidden_factors(chunks: list[Any], *args: Any, **kwargs: Any) -> Iterable[Any]:
        with hidden_factors(chunks):
            yield from stream(*args, **kwargs)

    @functools.wraps(stream)
    def checked(bridge: Any, model: _Model, *args: Any, **kwargs: Any) -> Iterable[Any]:
        chunks = model if isinstance(model, list) else [model]
        refuse_unmerged(chunks)
        return with_hidden_factors(chunks, bridge, model, *args, **kwargs)

    return checked


AutoBridge.save_hf_pretrained = _refusing_unmerged(AutoBridge.save_hf_pretrained)
MegatronModelBridge.stream_weights_megatron_to_hf = _of_the_base(MegatronModelBridge.stream_weights_megatron_to_hf)
