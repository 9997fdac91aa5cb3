# SPDX-License-Identifier: Apache-2.0
"""Pure Python: what is said of a package's version, and by whom."""

from __future__ import annotations

import torch

from nemo_tied_lora.versions import installed_version


def test_the_version_of_a_package_that_is_installed() -> None:
    assert installed_version("torch") == torch.__version__
    assert installed_version("Megatron_Core") == installed_version("megatron-core")


def test_a_package_that_is_absent_has_no_version() -> None:
    assert installed_version("a-package-that-nobody-has") is None
