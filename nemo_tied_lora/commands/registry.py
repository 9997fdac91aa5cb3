# SPDX-License-Identifier: Apache-2.0
"""A command that runs on several ranks: started by torchrun as one of them, or alone, starting its own."""

from __future__ import annotations

import keyword

__all__ = ["command_module"]


def command_module(command: str) -> str:
    """The module of a command; its name ends in _ where the command's is a keyword of Python."""
    name = command.replace("-", "_")
    return f"nemo_tied_lora.commands.{name}{'_' if keyword.iskeyword(name) else ''}"
