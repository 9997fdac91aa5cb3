# SPDX-License-Identifier: Apache-2.0
"""Registers `model.peft.peft_scheme=tied_lora` in NeMo's map of PEFT schemes."""

from __future__ import annotations

from typing import Any

from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP, PEFTConfig
from omegaconf import DictConfig, OmegaConf

from nemo_tied_lora.planning.base_config import adapter_section

__all__ = ["SCHEME", "TiedLoraPEFTConfig", "register"]

SCHEME = "tied_lora"


class TiedLoraPEFTConfig(PEFTConfig):
    """The Tied-LoRA configuration of `model.peft.tied_lora`, as one of NeMo's PEFT configs.

    Args:
        cfg: the model's config.

    Raises:
        ConfigError: lists every problem of the section.
    """

    def __init__(self, cfg: DictConfig) -> None:
        section = cfg.peft.get(SCHEME)
        values = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
        self.tied_lora = adapter_section({SCHEME: values})
        super().__init__({}, name_key_to_cfg={})

    def get_config_dict(self) -> dict[str, Any]:
        """Raises TypeError: only NeMo's own injection calls it, and would silently train nothing."""
        raise TypeError(
            "peft_scheme=tied_lora needs a model with TiedLoraModelMixin: "
            "use nemo_tied_lora.nemo.model.MegatronGPTTiedLoraModel in place of MegatronGPTSFTModel"
        )


def register() -> None:
    """Puts `tied_lora` into NeMo's map, once."""
    PEFT_CONFIG_MAP[SCHEME] = TiedLoraPEFTConfig
