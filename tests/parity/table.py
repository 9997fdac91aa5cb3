# SPDX-License-Identifier: Apache-2.0
"""Writes docs/parallelism.md, if the results of all releases' tests prove every cell.

python -m tests.parity.table [--check [FILE ...]]

With --check it writes nothing, and reports a page that differs. FILE is the name of a file of results; the others are not
read then. `make test` and `make test-bridge` run it so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from nemo_tied_lora.tables import markdown_table
from tests.harness.paths import ROOT
from tests.parity.cells import NEWER, NEWEST, OLDER, Table, tables
from tests.parity.recording import RUNS

__all__ = ["PAGE", "main", "page", "unproven"]

PAGE = ROOT / "docs" / "parallelism.md"
RESULTS = {"parity.json": OLDER, "parity-mcore016.json": NEWER, "parity-mcore019.json": NEWEST}
"""Files of results, and the release that each must have tested."""

_HEAD = """\
# The same adapter on every parallel layout

`make test-parity` trains the same adapter, on the same base, with the same data, on each layout below. It runs real
megatron-core over gloo, on CPUs. It compares each run with the single-process run:

- before the first step: the model's output is the base's, bit for bit;
- in each of two clipped steps of Adam: the loss, the whole gradient of every trained tensor, and the gradient norm;
- after each step: all ranks that hold the same element hold the same bits;
- at the end: the adapter.

TP, PP, DP and CP are the tensor, pipeline, data and context parallel sizes. Each cell is one of these:

- *tested*, with the largest relative error that is allowed (of a whole tensor by its 2-norm); *equal bits* is stricter,
  and explained with its table;
- *refused*, by name, before training;
- *untested*, because it needs a GPU.

Three bounds are used:

- 1e-9 in float64. Layouts sum in another order, which changes results by about 1e-14. The loss is computed in
  float64, because megatron-core's own is always float32.
- 5e-4 in float32, against the float64 run. Each product rounds by 6e-8, and some hundreds of these add up in a
  gradient. The gradient of a u is a small sum of large terms.
- 2e-1 in bfloat16, against the single-process bfloat16 run. Each product rounds by 4e-3 (8 bits), and each layout
  rounds other sums. For u the same holds as in float32.

The suite runs on two releases: megatron-core 0.13.1 with NeMo 2.4.1, and 0.16.1 without NeMo. A cell that names no
release holds for both; *NeMo 2.4's loops* hold for 0.13.1. A part of the suite runs on a third release: the last table
is for 0.19.2. `make test` runs the first two, `make test-bridge` the third. They keep each test's result in
`runs/parity.json`, `runs/parity-mcore016.json` and `runs/parity-mcore019.json`. They fail if these do not prove a cell,
or if this page differs from the cells.

megatron-core's own attention for the CPU refuses context parallelism ("only supported by TEDotProductAttention"). The
suite uses its own attention instead, which gathers keys and values. Everything else is the code of megatron-core and
of this project.
"""


def page() -> str:
    """The text of the page."""
    return _HEAD + "".join(_section(table) for table in tables())


def unproven(outcomes: Mapping[str, str], release: tuple[int, ...]) -> list[str]:
    """One line per test that a cell needs and that has not passed on the release."""
    cells = {cell for table in tables() for row in table.rows.values() for cell in row}
    wanted = {test: cell.text for cell in cells for test in cell.proof(release)}
    return [
        f"{text}: {test}: {outcomes.get(test, 'not run')}"
        for test, text in sorted(wanted.items())
        if outcomes.get(test) != "passed"
    ]


def _section(table: Table) -> str:
    lines = ["", f"## {table.title}", "", *([table.intro, ""] if table.intro else [])]
    rows = [["", *table.columns], *([label, *(cell.text for cell in row)] for label, row in table.rows.items())]
    return "\n".join([*lines, markdown_table(rows)]) + "\n"


def _problems(name: str, release: tuple[int, ...]) -> list[str]:
    """One line per problem of a file of results."""
    path = RUNS / name
    if not path.exists():
        return [f"{path}: not found"]
    results = json.loads(path.read_text())
    version = results["versions"]["megatron-core"]
    if not version.startswith(".".join(map(str, release)) + "."):
        return [f"{path}: was made with megatron-core {version}"]
    return [f"{path}: does not prove: {line}" for line in unproven(results["tests"], release)]


def main() -> None:
    """Writes the page, or checks it. Exits with all problems if the results do not prove it."""
    check, names = "--check" in sys.argv[1:], [name for name in sys.argv[1:] if name != "--check"]
    problems = [line for name in names or RESULTS for line in _problems(name, RESULTS[name])]
    if check and PAGE.read_text() != page():
        problems.append(f"{PAGE}: differs from the cells; make parallelism-page writes it again")
    if problems:
        sys.exit("\n".join(problems))
    if not check:
        PAGE.write_text(page())
    print(f"{PAGE}: every cell of {', '.join(names or RESULTS)} proven")


if __name__ == "__main__":
    main()
