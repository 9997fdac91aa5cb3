# SPDX-License-Identifier: Apache-2.0
"""The diagram of rooms in docs/architecture.md, drawn from the package's imports.

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
    """Each folder and each module at the top, to those that it imports from."""
    graph = grimp.build_graph(_PACKAGE)
    rooms: dict[str, set[str]] = {}
    for module in graph.modules - {_PACKAGE}:
        imported = rooms.setdefault(_room(module), set())
        imported |= {_room(name) for name in graph.find_modules_directly_imported_by(module) if name != _PACKAGE}
    return {room: imported - {room} for room, imported in rooms.items()}


def without_detours(imports: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others: a -> c is left out where a -> b -> c is there. No circles."""

    def reached(room: str) -> set[str]:
        return {far for near in imports[room] for far in {near} | reached(near)}

    return [
        (room, target)
        for room in sorted(imports)
        for target in sorted(imports[room])
        if not any(target in reached(other) for other in imports[room] - {target})
    ]


def diagram() -> str:
    """Mermaid, which GitHub draws; an arrow means "imports"."""
    arrows = [f"    {room} --> {target}" for room, target in without_detours(room_imports())]
    return "\n".join(["```mermaid", "graph TD", *arrows, "```"])


def in_page(page: str) -> str:
    """The page with the diagram of today."""
    assert _BETWEEN.search(page), "the page has no place for the diagram"
    return _BETWEEN.sub(lambda match: f"{match[1]}\n{diagram()}\n\n{match[2]}", page)


def _room(module: str) -> str:
    return module.split(".")[1]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(diagram())
