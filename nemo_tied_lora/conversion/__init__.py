# SPDX-License-Identifier: Apache-2.0
"""What comes from elsewhere: a Hugging Face base, a LoRA adapter."""

__all__: list[str] = []
