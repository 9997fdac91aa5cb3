# SPDX-License-Identifier: Apache-2.0
"""Looks up the versions of installed packages without importing them, and runs git in a checkout."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

__all__ = ["git", "installed_version"]


def installed_version(package: str) -> str | None:
    """Returns the version of a package, by its distribution name ("megatron-core"). None: not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(checkout: Path, *arguments: str) -> str | None:
    """Returns the output of a git command, or None if git fails or is not installed.

    Args:
        checkout: the checkout's top folder. It may belong to another user, as on a shared file system or in a container.
    """
    command = ["git", "-c", f"safe.directory={checkout}", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
