# SPDX-License-Identifier: Apache-2.0
"""The optimizer's parameter groups of an adapter: all factors share one learning rate."""

from __future__ import annotations

from typing import Any

from nemo_tied_lora.adapter.injected_adapter import Adapter

__all__ = ["learning_rate_groups"]


def learning_rate_groups(adapter: Adapter) -> tuple[dict[str, Any], ...]:
    """Returns one group that lists each trained tensor once, in the form of NeMo's `_optimizer_param_groups`.

    If a tied tensor were listed once per layer, the optimizer would step it once per layer. A pipeline stage that
    trains nothing gets an empty group, so that it still takes part in every collective.
    """
    return ({"params": list(adapter.parameters())},)
