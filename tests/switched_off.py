# SPDX-License-Identifier: Apache-2.0
"""Switches a guard off for a whole run of tests, in the ranks that they spawn too.

    SWITCHED_OFF=nemo_tied_lora.tie_guard:check_ties python -m pytest tests/test_tie_guard.py

The named function then does nothing. `tests` is imported before anything that could have taken the function by name.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__all__ = ["VARIABLE", "switch_off"]

VARIABLE = "SWITCHED_OFF"


def switch_off(place: str) -> None:
    """Replaces `module:function` or `module:Class.method`; a generator's name ends in "()" and it yields nothing."""
    from nemo_tied_lora.platform import prepare

    prepare()
    module, _, name = place.removesuffix("()").partition(":")
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    assert callable(getattr(owner, last)), place
    nothing = () if place.endswith("()") else None

    def do_nothing(*args: Any, **kwargs: Any) -> Any:
        return nothing

    setattr(owner, last, do_nothing)


if os.environ.get(VARIABLE):
    switch_off(os.environ[VARIABLE])
