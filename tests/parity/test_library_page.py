# SPDX-License-Identifier: Apache-2.0
"""Several ranks: the Python of docs/library.md and README.md runs, and its loops train the same adapter on every layout.

The tests execute the code blocks of the pages. The oracle is the page's loop in one process.
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from nemo_tied_lora.adapter.replica_check import check_ties
from tests.harness.paths import ROOT
from tests.harness.ranks import run_ranks, single_process
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt
from tests.parity.layouts import LAYOUTS
from tests.parity.training import randomise

ADD, SHARED, SAVE = "Add an adapter", "What both loops share", "Save, load, merge, remove"
OWN, MEGATRON, SHORT = "A loop of your own", "Megatron's DDP and optimizer", "README.md"
MICROBATCHES, SAMPLES, STEPS = 4, 2, 3
# float32, with sums in another order: 1e-7 per product.
TOLERANCE = 1e-5
# README's loop has neither a pipeline nor several data-parallel ranks.
RUNS = [(loop, layout) for loop in (OWN, MEGATRON) for layout in ("tp2", "tp2 sp", "pp2", "dp2")]
RUNS += [(SHORT, "tp2"), (SHORT, "tp2 sp")]
# Adam divides a gradient by its size, so it hides a factor of two, unless eps is as large as the gradient. The bounds are
# below each step's norm, so that each step is clipped.
VISIBLE = {
    OWN: {"(lr=1e-3), ": "(lr=2.5e-3), eps=1e-3, ", "max_norm=1.0": "max_norm=0.05"},
    MEGATRON: {"lr=1e-3": "lr=2.5e-3, adam_eps=1e-3", "clip_grad=1.0": "clip_grad=0.05"},
    SHORT: {"(lr=1e-3)": "(lr=2.5e-3), eps=1e-3"},
}
_SUM = "adapter.reduce_gradients()"
# Fault: (loop, layout that shows it, beginning of the line that is replaced, its replacement).
FAULTS = {
    "no sum over stages": (OWN, "pp2", _SUM, "pass"),
    "summed twice": (OWN, "pp2", _SUM, f"{_SUM}; {_SUM}"),
    "no sum under sequence parallelism": (OWN, "tp2 sp", _SUM, "pass"),
    "no mean over data-parallel ranks": (OWN, "dp2", "torch.distributed.all_reduce(parameter.grad, ", "pass"),
    "each rank clips by its own norm": (
        *(OWN, "tp2", "adapter.clip_gradients("),
        "torch.nn.utils.clip_grad_norm_(parameters, 0.05)",
    ),
    "each stage clips by its own norm": (
        *(OWN, "pp2", "adapter.clip_gradients("),
        "torch.nn.utils.clip_grad_norm_(parameters, 0.05)",
    ),
    "README without the sum": (SHORT, "tp2 sp", _SUM, "pass"),
    "Megatron does not sum": (MEGATRON, "pp2", "config.finalize_model_grads_func = ", "pass"),
    "torch's AdamW around Megatron's DDP": (
        *(MEGATRON, "dp2", "optimizer = adapter.megatron_optimizer("),
        "import torch; optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)",
    ),
}
# Variants that the page allows.
HARMLESS = {"reduce_gradients in Megatron's loop": (MEGATRON, "pp2", "optimizer.step()", f"{_SUM}; optimizer.step()")}
State = dict[str, torch.Tensor]


@pytest.mark.parametrize(("loop", "layout"), RUNS)
def test_each_loop_of_the_pages_trains_the_single_process_adapter(loop: str, layout: str) -> None:
    for state in on_two_ranks()[loop, layout, None]:
        assert not isinstance(state, str), state
        assert error(state, oracle(loop)) < TOLERANCE


def test_both_loops_of_the_page_train_the_same_adapter_on_one_process(tmp_path: Path) -> None:
    single_process()
    assert error(trained(MEGATRON, str(tmp_path)), oracle(OWN)) < TOLERANCE


@pytest.mark.parametrize("variant", HARMLESS)
def test_a_variant_that_the_page_allows_trains_the_same_adapter(variant: str) -> None:
    loop, layout, *_ = HARMLESS[variant]
    for state in on_two_ranks()[loop, layout, variant]:
        assert not isinstance(state, str), state
        assert error(state, oracle(loop)) < TOLERANCE


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_loop_is_noticed(fault: str) -> None:
    loop, layout, *_ = FAULTS[fault]
    states = on_two_ranks()[loop, layout, fault]
    assert all(isinstance(state, str) or error(state, oracle(loop)) > 10 * TOLERANCE for state in states)


def test_torchs_optimizer_with_megatrons_ddp_changes_nothing() -> None:
    """The page warns of it."""
    (fault,) = [name for name in FAULTS if "AdamW" in name]
    for state in on_two_ranks()[MEGATRON, "dp2", fault]:
        assert error(state, oracle("no step")) == 0


def block(heading: str) -> str:
    """The first Python block under a heading of the page; for `SHORT`, the first of README.md."""
    if heading == SHORT:
        text = (ROOT / "README.md").read_text()
    else:
        text = (ROOT / "docs" / "library.md").read_text().partition(f"\n## {heading}\n")[2]
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)[0]


def loop_code(heading: str, line: str = "", replacement: str = "") -> str:
    """A loop's block, with numbers that make errors visible, and with one line replaced."""
    code = block(heading)
    # All factors start at random values: a zero would hide errors.
    for old, new in {**VISIBLE[heading], "\noptimizer = ": "\nrandomise(adapter)\noptimizer = "}.items():
        assert code.count(old) == 1, f"{heading}: {old}"
        code = code.replace(old, new)
    if line:
        code, count = re.subn(rf"^( *){re.escape(line)}.*$", rf"\1{replacement}", code, flags=re.M)
        assert count == 1, f"{heading}: {line}"
    return code


def trained(
    loop: str, folder: str, line: str = "", replacement: str = "", *, sequence_parallel: bool = False
) -> State:
    """Runs the loop, then the page's code that saves, removes and loads the adapter. Returns the whole adapter."""
    model = build_gpt(dtype=torch.float32, sequence_parallel=sequence_parallel)
    steps = list(microbatches())
    names: dict[str, Any] = {"models": [model], "model": model, "steps": steps, "randomise": randomise}
    names |= {"batches": [step[0] for step in steps], "compute_loss": mean_loss}
    before = "" if loop == SHORT else block(ADD) + block(SHARED)
    for code in (before, loop_code(loop, line, replacement)):
        exec(code.replace("adapter.nemo", f"{folder}/adapter.nemo"), names)
    check_ties(names["adapter"])
    state: State = names["adapter"].full_state()
    exec(block(SAVE).replace("adapter.nemo", f"{folder}/adapter.nemo"), names)
    assert error(names["adapter"].full_state(), state) == 0
    return state


def microbatches() -> Any:
    """Yields this data-parallel rank's microbatches of each step."""
    generator = torch.Generator().manual_seed(7)
    fixed = {
        "positions": torch.arange(SEQUENCE).expand(SAMPLES, -1),
        "mask": torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool(),
    }
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for step in torch.randint(0, VOCAB, (STEPS, MICROBATCHES, SAMPLES, SEQUENCE + 1), generator=generator):
        yield [{"tokens": tokens[:, :-1], "labels": tokens[:, 1:], **fixed} for tokens in step[rank::size]]


def mean_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(batch["tokens"], batch["positions"], batch["mask"], labels=batch["labels"]).mean()


@functools.cache
def oracle(loop: str) -> State:
    """The single process's adapter after the loop. "no step": the adapter from which all loops start."""
    single_process()
    with tempfile.TemporaryDirectory() as folder:
        if loop == "no step":
            return trained(OWN, folder, "optimizer.step()", "pass")
        return trained(SHORT if loop == SHORT else OWN, folder)


@functools.cache
def on_two_ranks() -> dict[tuple[str, str, str | None], list[State | str]]:
    """Each rank's adapter, or the guard's error, for every loop, layout and change. The ranks start once."""
    wanted: list[tuple[str, str, str | None, str, str]] = [(loop, layout, None, "", "") for loop, layout in RUNS]
    for name, (loop, layout, line, replacement) in {**HARMLESS, **FAULTS}.items():
        wanted.append((loop, layout, name, line, replacement))
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(_on_a_rank, wanted, folder, world_size=2)
    return {key: [rank[key] for rank in ranks] for key in ranks[0]}


def _on_a_rank(
    wanted: list[tuple[str, str, str | None, str, str]], folder: str
) -> dict[tuple[str, str, str | None], State | str]:
    results: dict[tuple[str, str, str | None], State | str] = {}
    for loop, layout, change, line, replacement in wanted:
        LAYOUTS[layout].enter()
        sequence_parallel = LAYOUTS[layout].sequence_parallel
        try:
            state: State | str = trained(loop, folder, line, replacement, sequence_parallel=sequence_parallel)
        except RuntimeError as drift:  # raised on every rank: replicas differ, or their gradients
            state = str(drift)
        results[loop, layout, change] = state
    return results


def error(state: State, expected: State) -> float:
    """The largest relative error of a tensor, by its 2-norm."""
    assert state.keys() == expected.keys()
    return max(((state[name] - tensor).norm() / tensor.norm()).item() for name, tensor in expected.items())
