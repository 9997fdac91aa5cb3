# SPDX-License-Identifier: Apache-2.0
"""What a rank budget has pruned, in an adapter's file: u is multiplied by its mask, and dead atoms are left out of A and B.

`linear_qkv.mask` (layers, r) holds 1 for the entries that stay. A tied A or B holds the atoms that at least one linear uses:
A (live, in), B (out, live). Reading puts zeros in the place of the others, so the update is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from nemo_tied_lora.adapter.factor_names import FactorName
from nemo_tied_lora.adapter.rank_budget.masks import live_atoms, u_names
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.checkpoint.nemo_adapter_packing import mask_name, tensors_in_file
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["PrunedTensors", "masks_in"]


class PrunedTensors:
    """Changes tensors of the state to those of the file, and back.

    Args:
        masks: name of each u to its mask, (rank,) bool. Empty: nothing was pruned, and nothing is changed.
    """

    def __init__(self, config: TiedLoraConfig, shapes: Mapping[str, LinearShape], masks: Mapping[str, torch.Tensor]):
        self._config, self._masks, self._live = config, masks, live_atoms(config, masks)
        counts = {name: int(atoms.sum()) for name, atoms in self._live.items()} if masks else None
        self.shapes = tensors_in_file(config, shapes, counts)
        """Name to shape of the tensors that the file holds."""

    def packed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The file's form of a tensor of the state."""
        if name in self._masks:
            return torch.where(self._masks[name], tensor, torch.zeros_like(tensor))
        atoms, dim = self._atoms(name)
        return tensor if atoms is None else tensor.index_select(dim, atoms)

    def restored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of the state, from the file's form."""
        if name in self._masks:
            return self.packed(name, tensor)
        atoms, dim = self._atoms(name)
        if atoms is None:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = self._config.rank
        return tensor.new_zeros(shape).index_copy_(dim, atoms, tensor)

    def mask_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """The masks, in the file's order and form."""
        by_stack: dict[str, list[str]] = {}
        for name in self._masks:
            by_stack.setdefault(FactorName.parse(name).stacked, []).append(name)
        for names in by_stack.values():
            yield from ((mask_name(name), self._masks[name].to(dtype)) for name in names)

    def _atoms(self, name: str) -> tuple[torch.Tensor | None, int]:
        """The live atoms of a tied A or B that the file holds, and the dim that they are on."""
        parsed = FactorName.parse(name)
        if parsed.layer is not None or parsed.factor in self._config.seeded or not self._masks:
            return None, 0
        return self._live[parsed.linear].nonzero().flatten(), 0 if parsed.factor == "A" else 1


def masks_in(
    shapes: Mapping[str, LinearShape], rank: int, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The masks that a file's tensors hold, by the name of each u.

    Raises:
        ValueError: a mask is missing, has another shape, or holds something other than 0 and 1.
    """
    stacks: dict[str, list[str]] = {}
    for name in u_names(shapes):
        stacks.setdefault(FactorName.parse(mask_name(name)).stacked, []).append(name)
    masks: dict[str, torch.Tensor] = {}
    problems = []
    for stack, names in stacks.items():
        tensor, shape = tensors.get(stack), (len(names), rank)
        if tensor is None or tuple(tensor.shape) != shape or not ((tensor == 0) | (tensor == 1)).all():
            problems.append(f"state: {stack} is missing, or is not a mask of shape {shape}")
        else:
            masks |= {name: row.bool() for name, row in zip(names, tensor, strict=True)}
    if problems:
        raise ValueError("\n".join(problems))
    return {name: masks[name] for name in u_names(shapes)}
