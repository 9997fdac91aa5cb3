# SPDX-License-Identifier: Apache-2.0
"""Finds the folder of the shipped YAMLs."""

from __future__ import annotations

from pathlib import Path

__all__ = ["config_folder"]


def config_folder() -> Path:
    """Returns `configs/`: inside an installed package, or at the top of a source checkout.

    Raises:
        FileNotFoundError: neither exists, so the installation is incomplete.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / "configs", package.parent / "configs")
    for place in places:
        if (place / "plan.yaml").is_file():
            return place
    raise FileNotFoundError(f"no configs in {places[0]} or {places[1]}: install the package again")
