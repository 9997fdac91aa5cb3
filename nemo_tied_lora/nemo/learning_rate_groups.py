# SPDX-License-Identifier: Apache-2.0
"""The optimizer's parameter groups of an adapter: one learning rate for all of its factors."""

from __future__ import annotations

from typing import Any

from nemo_tied_lora.adapter.injected_adapter import Adapter

__all__ = ["learning_rate_groups"]


def learning_rate_groups(adapter: Adapter) -> tuple[dict[str, Any], ...]:
    """Returns one group with each trained tensor once, in the form that NeMo's `_optimizer_param_groups` has.

    A tied tensor that is listed once per layer would be stepped once per layer. A pipeline stage that trains nothing
    gets an empty group, so that it still takes part in every sum.
    """
    return ({"params": list(adapter.parameters())},)
