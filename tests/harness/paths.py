# SPDX-License-Identifier: Apache-2.0
"""The path of the checkout."""

from pathlib import Path

__all__ = ["ROOT"]

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds README.md."""
