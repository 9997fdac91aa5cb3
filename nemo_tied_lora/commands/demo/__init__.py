# SPDX-License-Identifier: Apache-2.0
"""The stages and the data of the quickstart."""

__all__: list[str] = []
