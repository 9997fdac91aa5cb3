# SPDX-License-Identifier: Apache-2.0
"""The NeMo side: `peft_scheme: tied_lora`, a model mixin, and what a fine-tuning run records."""
