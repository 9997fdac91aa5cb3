# SPDX-License-Identifier: Apache-2.0
"""The quickstart: its data, made offline from number words, and what runs on it."""

__all__: list[str] = []
