# SPDX-License-Identifier: Apache-2.0
"""Pure: which tests also run on megatron-core alone, by what their files import, directly or through others."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import WITH_NEMO_ONLY

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
# What only NeMo's environment has.
OF_NEMO = {"lightning", "nemo", "num2words", "peft", "sentencepiece", "tokenizers", "tqdm", "transformers"}
# They import NeMo where they are asked to, and nothing else does.
WITH_BOTH = ("nemo_tied_lora.platform",)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file names: imported, in functions too, or run as a program of its own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith(("nemo_tied_lora.", "tests.")):
                yield node.value.partition(":")[0]
            elif node.value.startswith("test_") and ".py::" in node.value:
                yield f"tests.{node.value.partition('.py')[0]}"


@functools.cache
def reached(module: str) -> frozenset[str]:
    """The module's file, and from there every module of others, by its first name."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name.startswith(WITH_BOTH):
            continue
        seen.add(name)
        stem = ROOT / name.replace(".", "/")
        path = next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()), None)
        waiting += [] if path is None else imported(path)
    return frozenset(name.split(".")[0] for name in seen)


def module_of(file: str) -> str:
    return f"tests.{file.removesuffix('.py').replace('/', '.')}"


@pytest.mark.parametrize("file", WITH_NEMO_ONLY)
def test_a_file_that_is_left_out_without_nemo_needs_it_or_has_no_megatron(file: str) -> None:
    assert file in FILES
    names = reached(module_of(file))
    assert "megatron" not in names or names & OF_NEMO


def test_what_runs_on_both_releases_is_not_nothing() -> None:
    """The walk over imports sees what it is to see: in files that are known, both ways."""
    on_both = set(FILES) - set(WITH_NEMO_ONLY)
    assert {"test_linear.py", "test_gradients.py", "test_dist_checkpoint.py", "parity/test_layouts.py"} <= on_both
    for file in ("parity/test_layouts.py", "test_moe.py", "test_tie_guard.py"):
        assert "megatron" in reached(module_of(file))
        assert not reached(module_of(file)) & OF_NEMO
    assert {"nemo", "megatron"} <= reached("tests.test_nemo_loops")
