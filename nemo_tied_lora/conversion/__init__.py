# SPDX-License-Identifier: Apache-2.0
"""Converts bases and adapters between our formats and those of Hugging Face, peft and stock NeMo."""

__all__: list[str] = []
