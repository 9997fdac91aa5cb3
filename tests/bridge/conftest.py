# SPDX-License-Identifier: Apache-2.0
"""Prepares the machine before the tests of this folder import Bridge."""

import pytest

from nemo_tied_lora.platform import prepare

__all__: list[str] = []

prepare(bridge=True)


@pytest.fixture(autouse=True)
def attention_is_chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core keeps the choice of a model for the whole process, in the environment."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
