# SPDX-License-Identifier: Apache-2.0
"""`tied-lora <command> key=value ...`"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys

from nemo_tied_lora.commands.registry import command_module

__all__ = ["COMMANDS", "entry", "main"]

COMMANDS = (
    "plan",
    "finetune",
    "generate",
    "pretrain",
    "quickstart",
    "compare",
    "show",
    "merge",
    "export",
    "import",
    "launch",
    "report",
    "convert-checkpoint",
    "status",
)


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: list[str]) -> int:
    """Runs one command; returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(importlib.metadata.version("nemo_tied_lora"))
        return 0
    if argv[0] not in COMMANDS:
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
        print(f"tied-lora: {argv[0]!r} is not a command; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(command_module(argv[0])).main(argv[1:])


def _help() -> str:
    lines = ["usage: tied-lora <command> [key=value ...]", "", "commands:"]
    for name in COMMANDS:
        summary = importlib.import_module(command_module(name)).SUMMARY
        lines.append(f"  {name:<20}{summary}")
    return "\n".join([*lines, "", "tied-lora <command> --help says more."])


if __name__ == "__main__":
    entry()
