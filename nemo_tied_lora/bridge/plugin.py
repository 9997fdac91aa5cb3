# SPDX-License-Identifier: Apache-2.0
"""`TiedLoRA`, a PEFT method of Megatron-Bridge, and its learning rates. The one module of this package that imports Bridge.

Checked with megatron-bridge 0.6.2 and megatron-core 0.19.2.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.bridge.models.conversion.auto_bridge import AutoBridge
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.model_provider import ModelProviderMixin
from megatron.bridge.peft.base import PEFT
from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.utils import unwrap_model
from torch import nn

try:
    from megatron.bridge.training.config import ConfigContainer, OptimizerConfigOverrideProvider
except ImportError:  # needs packages that a stack with a training loop of its own leaves out
    ConfigContainer, OptimizerConfigOverrideProvider = None, object

from nemo_tied_lora.adapter.agreement import raise_together
from nemo_tied_lora.adapter.inject import inject
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.lr_multipliers import factor_multipliers, multiplier_problems
from nemo_tied_lora.adapter.rate_groups import megatron_overrides
from nemo_tied_lora.adapter.target_modules import gpt_model
from nemo_tied_lora.bridge.hugging_face_adapter import write_peft_folder
from nemo_tied_lora.bridge.hugging_face_guard import hidden_factors, of_the_base, refusing_unmerged
from nemo_tied_lora.bridge.load_check import refuse_partial_states
from nemo_tied_lora.bridge.run_check import build_problems, pipeline_problems, run_problems
from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.checkpoint.save_load_on_any_layout import load_adapter
from nemo_tied_lora.config import FACTORS, PRESETS, TARGETS, TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, Problems

__all__ = ["FactorRates", "TiedLoRA", "check_run"]

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
    """An adapter's `.nemo` file, from any training framework and layout: training starts from its tensors, and the fields
    above become the file's. One that was set, in whichever way, must have the file's value."""
    allow_other_base: bool = False
    """With `restore_from_path`: only warn if that adapter was trained on a base with other weights."""

    def __new__(cls, *positional: Any, **given: Any) -> TiedLoRA:
        """Names what to write instead of another adapter's key. `__init__` would only call it unexpected."""
        known = [one.name for one in dataclasses.fields(cls) if one.init]
        if unknown := {key: value for key, value in given.items() if key not in known}:
            TiedLoraConfig.from_mapping(unknown)
        made = super().__new__(cls)
        object.__setattr__(made, "_set", {*known[: len(positional)], *given})
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field, or what Bridge keeps in a PEFT method.

        Raises:
            ConfigError: there is no such field. Says what to write instead.
        """
        bridges = name.startswith("_") or hasattr(PEFT, name)
        if not bridges and name not in (*(one.name for one in dataclasses.fields(self)), "adapter"):
            TiedLoraConfig.from_mapping({name: value})
            known = ", ".join(one.name for one in dataclasses.fields(self) if one.init)
            raise ConfigError([f"{name}={value!r}: not a field of TiedLoRA; the fields are {known}"])
        if name in vars(self):  # `__init__` sets each field once, also one that was not given
            self._set.add(name)
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        self.adapter: Adapter | None = None
        """The adapter, once the method was applied to a model. For `save_adapter`, `merge` and the rest."""
        self._set: set[str]
        """The fields that were given or set later."""
        self.config()

    def __getstate__(self) -> dict[str, Any]:
        """Without the adapter: Bridge sends a model's configuration, with its hooks, to the other stages."""
        return {**vars(self), "adapter": None, "_set": set(self._set)}

    @classmethod
    def preset(cls, name: str | None, **overrides: Any) -> TiedLoRA:
        """Returns the named configuration (lora, vera, tl5, tl6), with any field overridden.

        Args:
            name: None: the defaults, which are those of tl6. A file in `restore_from_path` may then have any preset.
            overrides: the value None means the preset's.

        Raises:
            ConfigError: the preset or a field is unknown, or a value is out of bounds.
        """
        given = {key: value for key, value in overrides.items() if value is not None}
        own = {key: given.pop(key) for key in ("restore_from_path", "allow_other_base") if key in given}
        made = cls(**TiedLoraConfig.from_mapping({"preset": name, **given}).as_dict(), **own)
        made._set = {*(PRESETS[name] if name else ()), *given}
        return made

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

    def read_file(self) -> None:
        """Sets the fields to those of the file in `restore_from_path`. Does nothing without one.

        `rank_budget` stays None: what the file has pruned stays pruned, and nothing more is.

        Raises:
            ConfigError: the file is missing or no adapter, or lists every field that was set to something else.
        """
        if self.restore_from_path is None:
            return
        problems, path = Problems(), self.restore_from_path
        problems.file("restore_from_path", path, "name the .nemo file of an adapter")
        problems.raise_if_any()
        found, default = read_adapter(path).config.as_dict(), TiedLoraConfig().as_dict()
        del found["rank_budget"]
        own = self.config().as_dict()
        problems += [
            f"{name}={own[name]!r}: the adapter in {path} has {value!r}; leave the field out, or set it to that"
            for name, value in found.items()
            if own[name] != value and (name in self._set or own[name] != default[name])
        ]
        problems.raise_if_any()
        self.__dict__.update(found)  # not as set by the user

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
            ConfigError: as `inject`: the model is wrapped in DDP already, a target or layer matches nothing, and others. Also
                as `read_file`, and for an interleaved pipeline of two stages without `overlap_p2p_comm`, for training.
            AdapterFileError, BaseMismatchError: as `load_adapter`, with `restore_from_path`.
            RuntimeError: the model has an adapter already, or another rank failed.
        """
        failure: Exception | None = None
        try:
            self.read_file()
            if training:
                first = next(iter(model), None) if isinstance(model, Sequence) else model
                Problems(pipeline_problems(getattr(first, "config", None))).raise_if_any()
        except Exception as error:
            failure = error
        raise_together("TiedLoRA", failure)
        if self.restore_from_path is None:
            adapter = inject(model, self.config())
        else:
            adapter = load_adapter(model, self.restore_from_path, allow_other_base=self.allow_other_base)
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

    def save_hf_adapter(
        self, model: _Model, path: str | os.PathLike, bridge: AutoBridge, base_model: str | None = None
    ) -> Path:
        """Writes the adapter as plain LoRA, in a folder that peft loads. All ranks must call it; rank 0 writes.

        The same function in every layer, as `untie_to_lora` explains. `bridge.save_hf_adapter(model, path, peft)` calls it.

        Args:
            model: the model, wrapped or not.
            path: the folder. An earlier export is replaced.
            bridge: the `AutoBridge` of the Hugging Face base.
            base_model: what the folder names as its base. None: the name or path that `bridge` has.

        Raises:
            RuntimeError: no adapter is on this model.
            ConfigError: lists each linear that Bridge cannot map, or maps to something that no plain LoRA can express; or
                the folder holds something else. Raised on every rank, before anything is written.
        """
        adapter, chunks = self._on(model), unwrap_model(model if isinstance(model, list) else [model])
        base_model = base_model or getattr(bridge.hf_pretrained, "model_name_or_path", None)
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


def check_run(cfg: Any) -> None:
    """Checks a run of Bridge's own loop before anything is built. Does nothing without a `TiedLoRA`.

    Bridge's own `cfg.validate()` ends with it, so every training run is checked.

    Args:
        cfg: a `ConfigContainer`. The fields of its `TiedLoRA` become those of `restore_from_path`.

    Raises:
        ConfigError: lists what would be trained wrongly or cannot be trained: an interleaved pipeline of two stages, FSDP,
            layers that the model does not have, a file that does not fit, a resume with other fields of the adapter.
    """
    if isinstance(cfg.peft, TiedLoRA):
        run_problems(cfg, cfg.peft).raise_if_any()


def _checking_the_run(validate: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(validate)
    def checked(cfg: Any) -> None:
        validate(cfg)
        check_run(cfg)

    return checked


def _checking_the_hooks(build: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(build)

    @functools.wraps(build)
    def checked(provider: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(provider, *args, **kwargs).arguments
        Problems(build_problems(provider, TiedLoRA, arguments)).raise_if_any()
        return build(provider, *args, **kwargs)

    return checked


def _writing_ours(save: Callable[..., None]) -> Callable[..., None]:
    """Wraps Bridge's method that writes an adapter for peft. Bridge's checkpoints call it with `also_save_hf_checkpoint`."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def written(bridge: AutoBridge, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(bridge, *args, **kwargs).arguments
        peft = given["peft_config"]
        if not isinstance(peft, TiedLoRA):
            save(bridge, *args, **kwargs)
            return
        if given.get("exclude_adapter_base_prefixes"):
            raise ConfigError(["exclude_adapter_base_prefixes: not with TiedLoRA, which writes all its linears"])
        peft.save_hf_adapter(given["model"], given["path"], bridge, given.get("base_model_name_or_path"))

    return written


AutoBridge.save_hf_pretrained = refusing_unmerged(AutoBridge.save_hf_pretrained)
MegatronModelBridge.stream_weights_megatron_to_hf = of_the_base(MegatronModelBridge.stream_weights_megatron_to_hf)
MegatronModelBridge.stream_weights_megatron_to_hf_quant = of_the_base(
    MegatronModelBridge.stream_weights_megatron_to_hf_quant
)
AutoBridge.save_hf_adapter = _writing_ours(AutoBridge.save_hf_adapter)
ModelProviderMixin.provide_distributed_model = _checking_the_hooks(ModelProviderMixin.provide_distributed_model)
if ConfigContainer is not None:
    ConfigContainer.validate = _checking_the_run(ConfigContainer.validate)
