# SPDX-License-Identifier: Apache-2.0
"""`tied-lora <command> key=value ...`: finds the command's module and runs it."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import keyword
import sys
from typing import Any

from nemo_tied_lora.commands.program import run_program

__all__ = ["COMMANDS", "entry", "main"]

COMMANDS = (
    "plan",
    "finetune",
    "generate",
    "evaluate",
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
    run_program(main, sys.argv[1:])


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit code."""
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
    return _module(argv[0]).main(argv[1:])


def _module(command: str) -> Any:
    """The module of a command. Its name ends in _ if the command's is a keyword of Python."""
    name = command.replace("-", "_")
    return importlib.import_module(f"nemo_tied_lora.commands.{name}{'_' if keyword.iskeyword(name) else ''}")


def _help() -> str:
    lines = ["usage: tied-lora <command> [key=value ...]", "", "commands:"]
    lines += [f"  {name:<20}{_module(name).SUMMARY}" for name in COMMANDS]
    return "\n".join([*lines, "", "tied-lora <command> --help shows its options and examples."])


if __name__ == "__main__":
    entry()
