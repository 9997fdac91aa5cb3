# SPDX-License-Identifier: Apache-2.0
"""Pure text: the pages in docs/ have the text of the programs in benchmarks/, except for the measured values."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.harness.paths import ROOT

PAGES = {
    "communication.md": "communication_page.py",
    "generation_speed.md": "generation_speed_page.py",
    "guards.md": "guard_cost.py",
    "step_overhead.md": "step_overhead_page.py",
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_text_of_its_program(page: str) -> None:
    assert differing(page, (ROOT / "docs" / page).read_text()) == []


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(
    ("old", "new"), [("\n    python benchmarks", "\n    python3 benchmarks"), ("\n| ", "\n| new | ")]
)
def test_a_changed_page_is_found(page: str, old: str, new: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert differing(page, text.replace(old, new)) != []


def differing(page: str, text: str) -> list[str]:
    """The parts of the program's text and the table heads that the page lacks, or has in another order."""
    tree = ast.parse((ROOT / "benchmarks" / PAGES[page]).read_text())
    parts = re.split(r"\{[^}]*\}", _template(tree))
    place, missing = 0, [] if text.startswith(parts[0]) and text.endswith(parts[-1]) else ["the beginning or the end"]
    for part in parts:
        found = text.find(part, place)
        missing += [part] if found < 0 else []
        place = max(place, found + len(part))
    return missing + [head for head in _heads(tree) if f"\n{head}\n" not in text]


def _template(tree: ast.Module) -> str:
    (value,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_PAGE"]
    return str(ast.literal_eval(value))


def _heads(tree: ast.Module) -> Iterator[str]:
    """The head of every table: the first row of each `rows = [...]`."""
    names = {ast.unparse(n.targets[0]): n.value for n in ast.walk(tree) if isinstance(n, ast.Assign)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "rows"
            and isinstance(node.value, ast.List)
        ):
            head = node.value.elts[0]
            cells = [names[ast.unparse(c.value)] if isinstance(c, ast.Starred) else c for c in head.elts]
            texts = [ast.literal_eval(cell) for cell in cells]
            flat = [text for found in texts for text in ([found] if isinstance(found, str) else found)]
            yield f"| {' | '.join(flat)} |"
