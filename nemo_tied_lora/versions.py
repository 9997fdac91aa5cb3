# SPDX-License-Identifier: Apache-2.0
"""The versions of installed packages, without importing them, and what git says of a checkout."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

__all__ = ["git", "installed_version"]


def installed_version(package: str) -> str | None:
    """The version of a package, by the name that it is installed under ("megatron-core"); None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(checkout: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails, or is absent.

    Args:
        checkout: its top folder. On a shared file system it often belongs to somebody else, in a container to nobody.
    """
    command = ["git", "-c", f"safe.directory={checkout}", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
