# SPDX-License-Identifier: Apache-2.0
"""A frozen random A or B stored as the seed that it was drawn from (`frozen_factors: seed`).

torch does not promise that another release's generator draws the same numbers, so the file holds a checksum of what it
drew: a different generator is an error, never a different adapter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from nemo_tied_lora.adapter.full_state import expected_shapes
from nemo_tied_lora.adapter.shapes import TargetSpec
from nemo_tied_lora.adapter.tied_factors import initial_tensor
from nemo_tied_lora.checkpoint.nemo_adapter_format import raw_bytes
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError

__all__ = ["FrozenFactors"]

_MAX_ELEMENTS = 1 << 32


class FrozenFactors:
    """The tensors that a file holds as their seed; none unless the configuration asks for it.

    `check` or `draw` must be called for each of `shapes`, in their order, before `facts`.
    """

    def __init__(self, config: TiedLoraConfig, specs: Mapping[str, TargetSpec]):
        frozen = [f for f in ("A", "B") if f not in config.trained and config.frozen_factors == "seed"]
        shapes = expected_shapes(config, specs)
        self.shapes = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in frozen}
        """Name in the state to whole shape."""
        self._config = config
        self._hash = hashlib.sha256()

    def draw(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor, from the seed.

        Raises:
            ConfigError: larger than any model's.
        """
        shape = self.shapes[name]
        if math.prod(shape) > _MAX_ELEMENTS:
            raise ConfigError([f"frozen_factors=seed: {name} would have shape {shape}: no model has that"])
        holder, _, factor = name.rpartition(".")
        layer: int | None = None
        if holder.startswith("layers."):
            _, number, holder = holder.split(".", 2)
            layer = int(number)
        tensor = initial_tensor(factor, holder, layer, shape, self._config).to(dtype)
        self._hash.update(raw_bytes(tensor))
        return tensor

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """That the seed stands for this tensor.

        Raises:
            ConfigError: it draws another one.
        """
        if not torch.equal(self.draw(name, tensor.dtype), tensor):
            raise ConfigError(
                [f"frozen_factors=seed: {name} is not what seed={self._config.seed} draws; set frozen_factors=tensor"]
            )

    def facts(self) -> dict[str, Any]:
        """What the YAML says of them."""
        return {"seed": self._config.seed, "sha256": self._hash.hexdigest()}

    def compare(self, recorded: object) -> None:
        """What was drawn, with what the YAML says.

        Raises:
            ConfigError: this generator draws other numbers than the one that the file was made with.
        """
        if self.shapes and self.facts() != recorded:
            raise ConfigError(
                [
                    f"frozen_factors=seed: torch {torch.__version__} draws other numbers from seed={self._config.seed} "
                    "than the file was made with; where it was made, load it and save it with frozen_factors=tensor"
                ]
            )
