# SPDX-License-Identifier: Apache-2.0
"""The layouts of the suite, each on the fewest ranks that it needs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAYOUTS", "Layout", "layouts_on"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes as in Megatron. vp: chunks per stage. Sequence parallelism uses the ranks of tp."""

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
        """Replaces Megatron's groups by those of this layout, in running ranks."""
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
    "pp2 vp2": Layout(pp=2, vp=2),
    "tp2 pp2": Layout(tp=2, pp=2),
    "tp2 dp2": Layout(tp=2, dp=2),
    "pp2 dp2": Layout(pp=2, dp=2),
    "tp2 sp pp2 dp2": Layout(tp=2, pp=2, dp=2, sequence_parallel=True),
}


def layouts_on(release: tuple[int, ...]) -> list[str]:
    """The layouts that the suite runs on a release of megatron-core: from 0.19 on, those of one and two ranks.

    There, `make test-bridge` is short. TP 2 x PP 2 is in tests/bridge.
    """
    return [name for name, layout in LAYOUTS.items() if release < (0, 19) or layout.world_size <= 2]
