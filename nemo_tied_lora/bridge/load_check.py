# SPDX-License-Identifier: Apache-2.0
"""Notices a state dict that lacks some of an adapter's tensors, whoever loads it.

Bridge resumes with ``strict=False``, because its checkpoints of an adapter lack the base. A missing factor would silently
keep its initial value.
"""

from __future__ import annotations

from typing import Any

from nemo_tied_lora.adapter.injected_adapter import Adapter

__all__ = ["refuse_partial_states"]

_PREFIX = "tied_lora."
_MOST_NAMED = 4


def refuse_partial_states(adapter: Adapter) -> None:
    """From now on, `load_state_dict` of the adapter's model raises RuntimeError if it lacks a stored tensor of the adapter.

    This holds with ``strict=False`` too. While the adapter is detached, nothing is checked.
    """
    for chunk in adapter.chunks:
        chunk.factors.register_load_state_dict_post_hook(_raise_if_missing)


def _raise_if_missing(_factors: Any, found: Any) -> None:
    missing = [key for key in found.missing_keys if _PREFIX in key]
    if not missing:
        return
    more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
    raise RuntimeError(
        f"state dict: it lacks {', '.join(missing[:_MOST_NAMED])}{more} of the adapter, which would keep their initial values; "
        "load a checkpoint that was saved with TiedLoRA's adapter_key_filter. A base is loaded before TiedLoRA is applied, or "
        "inside disable_adapter(model)"
    )
