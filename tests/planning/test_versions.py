# SPDX-License-Identifier: Apache-2.0
"""Versions of packages, and git in a checkout. Pure Python."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from nemo_tied_lora.planning.versions import git, installed_version


def test_the_version_of_a_package_that_is_installed() -> None:
    installed = installed_version("torch")
    assert installed is not None
    assert torch.__version__.startswith(installed)  # a build for CUDA adds its kind, as in 2.13.0+cu130
    assert installed_version("Megatron_Core") == installed_version("megatron-core")


def test_a_package_that_is_absent_has_no_version() -> None:
    assert installed_version("a-package-that-nobody-has") is None


def test_git_prints_facts_of_a_checkout_or_returns_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git(tmp_path, "rev-parse", "HEAD") is None
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "new").touch()
    assert git(tmp_path, "status", "--porcelain") == "?? new"
    monkeypatch.setenv("PATH", "")
    assert git(tmp_path, "status", "--porcelain") is None
