# SPDX-License-Identifier: Apache-2.0
"""Tied-LoRA in NeMo: the PEFT scheme, the model, the trainer's checkpoints and the callbacks of a run."""
