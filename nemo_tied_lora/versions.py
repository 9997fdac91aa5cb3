# SPDX-License-Identifier: Apache-2.0
"""The versions of installed packages. No package is imported for it."""

from __future__ import annotations

import importlib.metadata

__all__ = ["installed_version"]


def installed_version(package: str) -> str | None:
    """The version of a package, by the name that it is installed under ("megatron-core"); None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
