# SPDX-License-Identifier: Apache-2.0
"""Stores a frozen random A or B as the seed from which it was drawn (`frozen_factors: seed`).

torch does not promise that the generator of another release draws the same numbers. So the file holds a checksum of the
drawn tensors, and another generator causes an error, never a different adapter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from nemo_tied_lora.adapter.factor_names import FactorName, factor_names
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.tied_factors import initial_tensor
from nemo_tied_lora.checkpoint.nemo_adapter_format import raw_bytes
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError

__all__ = ["FrozenFactors"]

_MAX_ELEMENTS = 1 << 32


class FrozenFactors:
    """The tensors that a file holds as their seed; none if the configuration does not ask for it.

    Call `check` or `draw` for each of `names`, in the file's order, before `facts` or `compare`.
    """

    def __init__(self, config: TiedLoraConfig, shapes: Mapping[str, LinearShape]):
        self.names = {str(name) for name in factor_names(config, shapes) if name.factor in config.seeded}
        """Their names in the state."""
        self._config, self._shapes = config, shapes
        self._hash = hashlib.sha256()

    def draw(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Draws the whole tensor from the seed.

        Raises:
            ConfigError: the tensor would be larger than any model's.
        """
        parsed = FactorName.parse(name)
        shape = self._shapes[parsed.group].factor_shape(parsed.factor, self._config.rank)
        if math.prod(shape) > _MAX_ELEMENTS:
            raise ConfigError([f"frozen_factors=seed: {name} would have shape {shape}: no model has that"])
        tensor = initial_tensor(parsed, shape, self._config).to(dtype)
        self._hash.update(raw_bytes(tensor))
        return tensor

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Checks that the seed gives this tensor.

        Raises:
            ConfigError: the seed gives another one.
        """
        if not torch.equal(self.draw(name, tensor.dtype), tensor):
            raise ConfigError(
                [f"frozen_factors=seed: {name} is not what seed={self._config.seed} draws; set frozen_factors=tensor"]
            )

    def facts(self) -> dict[str, Any]:
        """What the YAML records about them."""
        return {"seed": self._config.seed, "sha256": self._hash.hexdigest()}

    def compare(self, recorded: object) -> None:
        """Compares what was drawn with what the YAML records.

        Raises:
            ConfigError: the generator of this torch draws other numbers than the one that wrote the file.
        """
        if self.names and self.facts() != recorded:
            raise ConfigError(
                [
                    f"frozen_factors=seed: torch {torch.__version__} draws other numbers from seed={self._config.seed} "
                    "than the file was made with; where it was made, load it and save it with frozen_factors=tensor"
                ]
            )
