# SPDX-License-Identifier: Apache-2.0
"""Runs a command's `main` as a program: every end is an exit code and at most one line, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from nemo_tied_lora.launching.local_ranks import follow_launcher
from nemo_tied_lora.planning.rank_variables import BROKEN_PIPE, INTERRUPTED
from nemo_tied_lora.resilience.unforeseen import describe, keep_traceback, say

__all__ = ["run_program"]

_FAILED = 1


def run_program(main: Callable[[list[str]], int], argv: list[str], command: str = "") -> NoReturn:
    """Calls `main(argv)` and exits with its code.

    - Nobody reads the output any more (`| head`): 141, without a word.
    - Ctrl-C: 130, without a word.
    - The output cannot be written (a full disk): 1, and a line that says why.
    - Another error that no check has foreseen: 1, and a line that says where its traceback is.

    Args:
        command: the command's name, for messages. "": the first argument.
    """
    _prepare_streams()
    follow_launcher()
    name = command or (argv[0] if argv and not argv[0].startswith("-") else "")
    sys.exit(_flushed(_code(main, argv, name), name))


def _code(main: Callable[[list[str]], int], argv: list[str], name: str) -> int:
    try:
        return main(argv)
    except SystemExit as end:  # argparse
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError as error:
        if error.filename is None:
            return BROKEN_PIPE
        return _unforeseen(error, name)
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, OSError) and error.filename is None and not _can_write():
            return _unwritable(error, name)
        return _unforeseen(error, name)


def _unforeseen(error: BaseException, name: str) -> int:
    where = keep_traceback(error, name or "command")
    say(f"{_prefix(name)}: {describe(error, name)}; {where}")
    return _FAILED


def _can_write() -> bool:
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return False
    return True


def _flushed(code: int, name: str) -> int:
    """Writes what is left of the output, and returns the exit code. Python itself would print an error at exit."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except BrokenPipeError:
            code = code or BROKEN_PIPE
            _discard(number)
        except OSError as error:
            code = code or (_unwritable(error, name) if number == 1 else _FAILED)
            _discard(number)
    return code


def _unwritable(error: OSError, name: str) -> int:
    full = "; free some space" if error.errno == errno.ENOSPC else ""
    say(f"{_prefix(name)}: standard output cannot be written: {error.strerror}{full}")
    _discard(1)
    return _FAILED


def _discard(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _prepare_streams() -> None:
    """Makes output go out line by line, and opens /dev/null where standard input, output or error is closed (`>&-`).

    Otherwise the next file that is opened would take the closed one's number, and get what is printed.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Whole lines, and at once: ranks that share a log must not write into each other's lines.
            stream.reconfigure(line_buffering=True, write_through=False)


def _prefix(name: str) -> str:
    return f"tied-lora {name}".rstrip()
