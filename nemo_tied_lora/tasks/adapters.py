# SPDX-License-Identifier: Apache-2.0
"""The adapters that are evaluated together: their list, and a short name for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["BASE", "adapter_list", "adapter_list_problems", "adapter_names"]

BASE = "base"
"""The name of the base without an adapter."""


def adapter_list(value: object) -> list[str | None]:
    """The adapters that the key `adapter` names: a path, null for the base alone, or a list of both."""
    return [None if one is None else str(one) for one in (value if isinstance(value, list) else [value])]


def adapter_list_problems(value: object) -> Iterator[str]:
    """Yields what is wrong with the list itself. The files are not opened."""
    if value == []:
        yield 'adapter=[]: names nothing to evaluate; write adapter=null for the base, or "adapter=[null,a.nemo]"'
    for one in value if isinstance(value, list) else [value]:
        if one is not None and not isinstance(one, str):
            yield f"adapter={one!r}: must be a path, null, or a list of both"
            return
    known: set[str | None] = set()
    for path in adapter_list(value):
        place = None if path is None else str(Path(path).resolve())
        if place in known:
            yield f"adapter: {path or 'null'} is there twice; leave one out"
        known.add(place)


def adapter_names(paths: Sequence[str | None]) -> list[str]:
    """Short names: "german" for runs/german/adapter.nemo, "a" for a.nemo, "base" for None.

    As many folders are added as tell all apart.
    """
    parts = [_parts(path) for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same adapter twice: {paths}")


def _parts(path: str | None) -> tuple[str, ...]:
    if path is None:
        return (BASE,)
    whole = Path(path).resolve().with_suffix("").parts[1:]
    return whole[:-1] if whole[-1] == "adapter" and len(whole) > 1 else whole
