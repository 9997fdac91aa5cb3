# SPDX-License-Identifier: Apache-2.0
"""The `tied-lora` commands, one module per command."""
