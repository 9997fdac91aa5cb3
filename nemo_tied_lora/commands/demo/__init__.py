# SPDX-License-Identifier: Apache-2.0
"""The stages and the data of quickstart and compare."""

__all__: list[str] = []
