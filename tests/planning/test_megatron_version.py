# SPDX-License-Identifier: Apache-2.0
"""The installed release of megatron-core and its abilities; tests/parity proves them. Pure Python."""

from __future__ import annotations

import pytest

from nemo_tied_lora.planning.megatron_version import counts_repeated_gradients, megatron_version, splits_query_groups


def test_the_release_is_one_of_the_three_that_are_tested() -> None:
    assert megatron_version() in ((0, 13), (0, 16), (0, 19))


@pytest.mark.parametrize(("release", "can"), [((0, 13), False), ((0, 15), False), ((0, 16), True), ((0, 19), True)])
def test_the_abilities_of_a_release_follow_from_its_number(release: tuple[int, ...], can: bool) -> None:
    assert counts_repeated_gradients(release) is splits_query_groups(release) is can
    if release == megatron_version():
        assert counts_repeated_gradients() is splits_query_groups() is can
