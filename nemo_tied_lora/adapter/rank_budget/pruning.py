# SPDX-License-Identifier: Apache-2.0
"""The rank budget of an injected adapter: it follows an optimizer, and writes the masks that the forward pass reads.

At each optimizer step, every rank fills a vector of zeros with the products u g of the entries that it steps. Each entry has
one owner, so the sum over the ranks is exact, and every rank gets the same bits and chooses the same entries:

==========================================  ====================================================================
u of a layer                                its products come from
==========================================  ====================================================================
held by every tensor-parallel rank          tensor-parallel rank 0, whose gradient is complete by now
                                            (under sequence parallelism: after the sum over these ranks)
held by one pipeline stage                  that stage
equal on all data-parallel ranks            each of them, for its own model-parallel group
split by the distributed optimizer          the data-parallel rank that steps the slice; a second sum joins them
==========================================  ====================================================================

It sends 2 n float64 numbers over the model-parallel group, and with the distributed optimizer over the data-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from nemo_tied_lora.adapter.rank_budget.importance import Importance
from nemo_tied_lora.adapter.rank_budget.masks import by_name, u_names
from nemo_tied_lora.adapter.rank_budget.schedule import BudgetSchedule
from nemo_tied_lora.adapter.rank_budget.stepped import call_at_each_step, is_distributed, slices_of
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.tied_factors import ChunkFactors, Factors
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.platform.devices import collective_device

__all__ = ["RankPruning"]

_FOLLOW = "call adapter.follow_optimizer(optimizer, max_steps=...) once, after you have made the optimizer"


class RankPruning:
    """The masks of one adapter's u, the same on every rank and layout.

    Args:
        config: with a rank budget.
        shapes: group to whole shape, the same on every rank.
        chunks: this stage's factors.
    """

    def __init__(self, config: TiedLoraConfig, shapes: Mapping[str, LinearShape], chunks: Sequence[ChunkFactors]):
        self._config, self._shapes = config, dict(shapes)
        self.names = u_names(self._shapes)
        """The u of every linear, in the order of the vectors."""
        places = {name: index for index, name in enumerate(self.names)}
        self._own: list[tuple[int, Factors, nn.Parameter]] = []
        for chunk in chunks:
            for path, parameter in chunk.named_parameters():
                if path in places:
                    holder: Any = chunk.get_submodule(path.rpartition(".")[0])
                    self._own.append((places[path] * config.rank, holder, parameter))
        # Where A or B belongs to one layer, a pruned entry's row gets no gradient, so the entry cannot improve meanwhile.
        returns = set(config.tied) == {"A", "B"}
        self._returns = returns
        self._importance = Importance(len(places) * config.rank, returns=returns, device=torch.device("cpu"))
        self.schedule: BudgetSchedule | None = None
        self._fixed = False
        self._stop_following: Callable[[], None] | None = None
        self._optimizer: Any = None
        self._checked = False
        self._seen: tuple[int, tuple[int, ...]] | None = None
        self._apply()

    @property
    def done(self) -> int:
        """The optimizer steps that the budget has observed."""
        return self._importance.done

    def follow(self, optimizer: Any, max_steps: int) -> None:
        """See `Adapter.follow_optimizer`."""
        if self._fixed:
            return
        budget = self._config.budget
        assert budget is not None
        if self.schedule is None:
            self.schedule = BudgetSchedule.of_run(budget, self._config.rank, self._shapes.values(), max_steps)
        self.stop()
        self._optimizer, self._checked, self._seen = optimizer, False, None
        self._stop_following = call_at_each_step(optimizer, self._observe)
        held = slices_of(optimizer, [parameter for *_, parameter in self._own])
        missing = len(self._own) - len(held)
        if missing and not is_distributed(optimizer):  # of which this rank may step no part
            self.stop()
            raise ConfigError(
                [
                    f"rank_budget: the optimizer does not hold {missing} of this rank's {len(self._own)} u; pass the one that "
                    "steps adapter.parameters()"
                ]
            )

    def stop(self) -> None:
        """Follows no optimizer any more."""
        if self._stop_following is not None:
            self._stop_following()
        self._stop_following = self._optimizer = None

    def check_followed(self) -> None:
        """Runs before each forward pass that trains.

        Raises:
            RuntimeError: no optimizer is followed; or u has changed since the last pass, and not by the one that is.
        """
        if self._fixed:
            return
        if self._stop_following is None:
            raise RuntimeError(f"rank_budget: no optimizer is followed, so nothing would be pruned; {_FOLLOW}")
        versions = tuple(parameter._version for *_, parameter in self._own)
        if self._seen is not None and self._seen[0] == self.done and self._seen[1] != versions:
            raise RuntimeError(
                f"rank_budget: u has changed, but the followed optimizer has made no step since; {_FOLLOW}. If you have "
                "changed u yourself, call it again"
            )
        self._seen = (self.done, versions)

    def forget_versions(self) -> None:
        """u is about to change, and not by a step."""
        self._seen = None

    def masks(self) -> dict[str, torch.Tensor]:
        """Name of each u of the whole model to its mask, (r,) bool on the CPU."""
        return by_name(self._importance.mask, self._shapes)

    def fix(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Takes the masks of a finished adapter. They no longer change.

        Args:
            masks: as `masks` returns them. Empty: every entry stays.
        """
        if masks:
            self._importance.mask = torch.cat([masks[name] for name in self.names])
        self._fixed = True
        self.stop()
        self._apply()

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(plain values, vectors of n) that `load` reads on any layout, the same on every rank."""
        schedule = None if self.schedule is None else self.schedule.as_dict()
        return {"done": self.done, "fixed": self._fixed, "schedule": schedule}, self._importance.state()

    def load(self, values: Mapping[str, Any], vectors: Mapping[str, torch.Tensor]) -> None:
        """Loads what `state` returned.

        Raises:
            ConfigError: it is not the state of such an adapter.
        """
        schedule = None if values.get("schedule") is None else BudgetSchedule.from_dict(values["schedule"])
        if schedule is not None and schedule.entries != len(self._importance.mask):
            raise ConfigError([f"rank_budget: the state has {schedule.entries} entries of u, the adapter has others"])
        self._importance.load(vectors, int(values["done"]))
        self.schedule, self._fixed, self._seen = schedule or self.schedule, bool(values["fixed"]), None
        self._apply()

    def _observe(self) -> None:
        """Runs at each step of the optimizer, before it changes anything."""
        assert self.schedule is not None
        products = self._summed_products()
        if self._importance.observe(products, self.schedule):
            self._apply()

    def _summed_products(self) -> torch.Tensor:
        """u g of every entry, (n,) float64, the same bits on every rank."""
        distributed, device = is_distributed(self._optimizer), self._device()
        table = torch.zeros(2, len(self._importance.mask), dtype=torch.float64, device=device)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
            held = slices_of(self._optimizer, [parameter for *_, parameter in self._own])
            for offset, _, parameter in self._own:
                part = held.get(parameter)
                if part is not None and (part.is_shared_out or first or not distributed):
                    span = slice(offset + part.start, offset + part.start + part.value.numel())
                    table[1, span] = 1.0
                    if part.gradient is not None:
                        table[0, span] = part.value.double() * part.gradient.double()
        if distributed:
            torch.distributed.all_reduce(
                table, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
            )
        torch.distributed.all_reduce(table, group=parallel_state.get_model_parallel_group())
        if not self._checked:
            self._check_owners(table[1])
        return table[0]

    def _check_owners(self, owners: torch.Tensor) -> None:
        wrong = (owners != 1).nonzero().flatten().tolist()
        if wrong:
            name = self.names[wrong[0] // self._config.rank]
            raise RuntimeError(
                f"rank_budget: {len(wrong)} entries of u, first in {name}, are stepped by {int(owners[wrong[0]])} ranks of a "
                "model-parallel group, not by 1; pass the optimizer that steps adapter.parameters() on every rank"
            )
        self._checked = True

    def _device(self) -> torch.device:
        return self._own[0][2].device if self._own else collective_device()

    def _apply(self) -> None:
        """Writes the masks into the buffers that the forward pass reads, in place."""
        fixed = self._fixed or (self.schedule is not None and self.schedule.is_fixed(self.done))
        for offset, factors, _ in self._own:
            assert factors.u_mask is not None
            factors.u_mask.copy_(self._importance.mask[offset : offset + self._config.rank])
            factors.pruned_return = self._returns and not fixed
