# SPDX-License-Identifier: Apache-2.0
"""Changes values of a run's composed configuration."""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["changed"]


def changed(composed: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The configuration with other values: __ in a name is a dot."""
    result = copy.deepcopy(composed)
    for name, value in values.items():
        section, *names = result, *name.replace("__", ".").split(".")
        for key in names[:-1]:
            section = section.setdefault(key, {})
        section[names[-1]] = value
    return result
