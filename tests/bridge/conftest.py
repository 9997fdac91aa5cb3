# SPDX-License-Identifier: Apache-2.0
"""Prepares the machine before the tests of this folder import Bridge."""

from nemo_tied_lora.platform import prepare

__all__: list[str] = []

prepare(bridge=True)
