# SPDX-License-Identifier: Apache-2.0
"""Draws the diagram of rooms in docs/architecture.md from the package's imports.

python -m tests.project.room_diagram          prints it
python -m tests.project.room_diagram --write  puts it into the page
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

import grimp

from tests.harness.paths import ROOT

__all__ = ["PAGE", "diagram", "in_page", "room_imports", "without_detours"]

PAGE = ROOT / "docs" / "architecture.md"
_PACKAGE = "nemo_tied_lora"
_BETWEEN = re.compile(r"(<!-- rooms: [^\n]*-->\n).*?(<!-- end of the rooms -->)", flags=re.S)


def room_imports() -> dict[str, set[str]]:
    """Maps each folder and each top-level module to those that it imports."""
    graph = grimp.build_graph(_PACKAGE)
    rooms: dict[str, set[str]] = {}
    for module in graph.modules - {_PACKAGE}:
        imported = rooms.setdefault(_room(module), set())
        imported |= {_room(name) for name in graph.find_modules_directly_imported_by(module) if name != _PACKAGE}
    return {room: imported - {room} for room, imported in rooms.items()}


def without_detours(imports: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the arrows that do not follow from others: no a -> c if there is a -> b -> c. Circles are not allowed."""

    def reached(room: str) -> set[str]:
        return {far for near in imports[room] for far in {near} | reached(near)}

    return [
        (room, target)
        for room in sorted(imports)
        for target in sorted(imports[room])
        if not any(target in reached(other) for other in imports[room] - {target})
    ]


def diagram() -> str:
    """Returns the diagram as Mermaid, which GitHub draws. An arrow means "imports"."""
    arrows = [f"    {room} --> {target}" for room, target in without_detours(room_imports())]
    return "\n".join(["```mermaid", "graph TD", *arrows, "```"])


def in_page(page: str) -> str:
    """Returns the page with the current diagram."""
    assert _BETWEEN.search(page), "the page has no place for the diagram"
    return _BETWEEN.sub(lambda match: f"{match[1]}\n{diagram()}\n\n{match[2]}", page)


def _room(module: str) -> str:
    return module.split(".")[1]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(diagram())
