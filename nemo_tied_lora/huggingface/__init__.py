# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's models beside Megatron's: what each part is called, and in which order its rows lie."""

__all__: list[str] = []
