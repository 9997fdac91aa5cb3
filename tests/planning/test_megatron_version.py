# SPDX-License-Identifier: Apache-2.0
"""No rank: which release of megatron-core is there, and what is said of it. tests/parity shows that it is so."""

from __future__ import annotations

import pytest

from nemo_tied_lora.planning.megatron_version import counts_repeated_gradients, megatron_version, splits_query_groups


def test_the_release_is_one_of_the_two_that_are_tested() -> None:
    assert megatron_version() in ((0, 13), (0, 16))


@pytest.mark.parametrize(("release", "can"), [((0, 13), False), ((0, 15), False), ((0, 16), True), ((0, 17), True)])
def test_what_a_release_can_do_is_told_from_its_number(release: tuple[int, ...], can: bool) -> None:
    assert counts_repeated_gradients(release) is splits_query_groups(release) is can
    if release == megatron_version():
        assert counts_repeated_gradients() is splits_query_groups() is can
