# SPDX-License-Identifier: Apache-2.0
"""Pure Python: the pre-flight's groups are those of Megatron, on both releases; tests/resilience/test_ranks_in_trouble.py tries
them on ranks."""

from __future__ import annotations

import pytest

from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.resilience.group_check import group_ranks


@pytest.mark.parametrize(
    ("kind", "pipeline_before_data", "expected"),
    [
        ("tp", False, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("dp", False, [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("pp", False, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("dp", True, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("pp", True, [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_the_groups_are_megatrons(kind: str, pipeline_before_data: bool, expected: list[list[int]]) -> None:
    layout = Layout(tp_size=2, pp_size=2, devices=8)
    assert group_ranks(layout, kind, pipeline_before_data=pipeline_before_data) == expected
