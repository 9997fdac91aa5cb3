# SPDX-License-Identifier: Apache-2.0
"""The layouts of the suite, in the fewest ranks that have them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAYOUTS", "Layout"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes as in Megatron; vp: chunks a stage. sequence_parallel goes with tp, over the same ranks."""

    tp: int = 1
    pp: int = 1
    vp: int | None = None
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def enter(self) -> None:
        """Makes Megatron's groups, in ranks that run already."""
        from tests.harness.relayout import relayout

        relayout(tp=self.tp, pp=self.pp, vp=self.vp, cp=self.cp)


LAYOUTS: dict[str, Layout] = {
    "single": Layout(),
    "tp2": Layout(tp=2),
    "tp2 sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "dp2": Layout(dp=2),
    "cp2": Layout(cp=2),
    "tp4": Layout(tp=4),
    "tp4 sp": Layout(tp=4, sequence_parallel=True),
    "pp4": Layout(pp=4),
    "pp4 vp2": Layout(pp=4, vp=2),
    "tp2 pp2": Layout(tp=2, pp=2),
    "tp2 dp2": Layout(tp=2, dp=2),
    "pp2 dp2": Layout(pp=2, dp=2),
    "tp2 sp pp2 dp2": Layout(tp=2, pp=2, dp=2, sequence_parallel=True),
}
