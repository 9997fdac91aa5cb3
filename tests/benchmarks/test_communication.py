# SPDX-License-Identifier: Apache-2.0
"""Several ranks: counts every collective of a step on each layout, and compares with hand counts. Finds planted faults.

One process counts everything, including the faults: NeMo's import takes longer than all the counting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.command_runs import user_environment
from tests.harness.forks import fork_program, fork_script, run_forked
from tests.harness.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "communication.py"

LAYERS, HIDDEN, FFN, TOKENS, RANK, MICROBATCHES = 4, 256, 512, 16, 4, 2
SIZES = {"layers": LAYERS, "hidden": HIDDEN, "ffn": FFN, "heads": 4, "sequence": TOKENS, "vocab": 32}
OPTIONS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
OPTIONS += ["--rank", str(RANK), "--microbatches", str(MICROBATCHES)]
TENSOR_PARALLEL = ("tp2", "tp2, sequence parallel", "tp4", "tp4, sequence parallel")
PIPELINE = ("pp2", "pp4", "tp2 pp2", "tp2 pp2, sequence parallel")

# Fault to (layout, the claim that must be missed).
FAULTS = {
    "full_width_exchange": ("tp2", "as wide as the rank"),
    "exchanged_twice": ("tp4, sequence parallel", "as `tied-lora plan` states"),
    "sum_tensor_by_tensor": ("pp2", "over PP, one all-reduce wanted: MISSED"),
    "sum_forgotten": ("tp2 pp2", "one all-reduce wanted: MISSED"),
    "sum_twice": ("tp2, sequence parallel", "over TP, one all-reduce wanted: MISSED"),
    "plan_is_wrong": ("tp2", "as `tied-lora plan` states"),
}

_DRIVER = """
import contextlib, io, json, sys
sys.path.insert(0, {benchmarks!r})
from unittest.mock import patch
import communication
options, folder, faults = {options!r}, {folder!r}, {faults!r}

def run(name, words):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = communication.main([*options, "--output", f"{{folder}}/{{name}}.json", *words])
    return {{"code": code, "printed": printed.getvalue()}}

done = {{"clean": run("clean", ["--page", f"{{folder}}/clean.md"])}}
from nemo_tied_lora.adapter import grad_allreduce, tied_linear
from nemo_tied_lora.adapter.injected_adapter import Adapter

forward, across, summed, reduce = (
    tied_linear.TiedLoraMixin.forward,
    tied_linear.LinearAdapter.across_ranks,
    grad_allreduce._all_reduce_coalesced,
    Adapter.reduce_gradients,
)
planned = communication.network_bytes

def full_width_exchange(self, x, *args, **kwargs):
    return forward(self, tied_linear.copy_to_tensor_model_parallel_region(x), *args, **kwargs)

def exchanged_twice(self, h, h_scale):
    return across(self, h, h_scale) + 0 * across(self, h, h_scale)

def sum_tensor_by_tensor(tensors, group):
    for tensor in tensors:
        summed([tensor], group)

def sum_twice(self, *args, **kwargs):
    reduce(self, *args, **kwargs)
    reduce(self, *args, **kwargs)

def plan_is_wrong(*args):
    return {{name: 2 * value for name, value in planned(*args).items()}}

places = {{
    "full_width_exchange": patch.object(tied_linear.TiedLoraMixin, "forward", full_width_exchange),
    "exchanged_twice": patch.object(tied_linear.LinearAdapter, "across_ranks", exchanged_twice),
    "sum_tensor_by_tensor": patch.object(grad_allreduce, "_all_reduce_coalesced", sum_tensor_by_tensor),
    "sum_forgotten": patch.object(Adapter, "reduce_gradients", lambda self: None),
    "sum_twice": patch.object(Adapter, "reduce_gradients", sum_twice),
    "plan_is_wrong": patch.object(communication, "network_bytes", plan_is_wrong),
}}
for name, (layout, _) in faults.items():
    with places[name]:
        done[name] = run(name, ["--layouts", layout])
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `clean.json` and `clean.md`."""
    return tmp_path_factory.mktemp("communication")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Exit code and output of the unchanged program ("clean") and of the program with each fault."""
    driver = _DRIVER.format(benchmarks=str(ROOT / "benchmarks"), options=OPTIONS, folder=str(folder), faults=FAULTS)
    done = run_forked(fork_program, driver, cwd=folder, env=user_environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def layouts(runs: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The layouts of the JSON."""
    assert runs["clean"]["code"] in (0, 1)
    return dict(json.loads((folder / "clean.json").read_text())["layouts"])


def local(split: int, tp_size: int) -> int:
    """A rank's part of a width that tensor parallelism splits."""
    return split // tp_size


def tied_elements(tp_size: int) -> int:
    """A and B of the four linears on one rank: qkv 256 -> 768, proj 256 -> 256, fc1 256 -> 512, fc2 512 -> 256."""
    columns = (HIDDEN + local(3 * HIDDEN, tp_size)) + (HIDDEN + local(FFN, tp_size))
    rows = (local(HIDDEN, tp_size) + HIDDEN) + (local(FFN, tp_size) + HIDDEN)
    return RANK * (columns + rows)


def partial_elements(layers: int) -> int:
    """Elements that are partial over the sequence: A and u of qkv and fc1; B, u and v of proj and fc2."""
    return 2 * (RANK * HIDDEN + layers * RANK) + 2 * (HIDDEN * RANK + layers * (RANK + HIDDEN))


def all_reduced(elements: int, ranks: int) -> int:
    """Bytes that one rank of a ring sends, float32."""
    return elements * 4 * 2 * (ranks - 1) // ranks


def test_a_microbatch_adds_one_exchange_as_wide_as_the_rank_per_linear(layouts: dict[str, Any]) -> None:
    for name in TENSOR_PARALLEL:
        entry = layouts[name]
        ours = entry["added"]["ours"]["microbatch"]
        assert ours["sent_bytes"] == all_reduced(LAYERS * 4 * TOKENS * RANK, entry["tp"])
        assert ours["calls"] == LAYERS * 4 * (2 if entry["sequence_parallel"] else 1)
        for message in ours["messages"]:
            assert (message["group"], message["ranks"]) == ("TP", entry["tp"])
            assert message["shape"] == [TOKENS, 1, RANK]


def test_nemos_layer_adds_what_its_code_sends(layouts: dict[str, Any]) -> None:
    # Numbers per token and layer, in units of (T-1)/T. A column gathers r, and sums 2 in and 2 r in backward. A row sums
    # 2 r, gathers out, and sums 2 r in backward. Under sequence parallelism a column gathers in, gathers r, scatters
    # in and sums 2 r; a row also gathers out in backward.
    plain, sequence_parallel, gathered = 6 * HIDDEN, 8 * HIDDEN, 4 * HIDDEN
    for name in TENSOR_PARALLEL:
        entry = layouts[name]
        wide = {"nemo": sequence_parallel if entry["sequence_parallel"] else plain, "nemo_te": gathered}
        for variant in entry["added"].keys() - {"ours"}:
            numbers = LAYERS * TOKENS * (wide[variant] + 14 * RANK)
            sent = entry["added"][variant]["microbatch"]["sent_bytes"]
            assert sent == numbers * 4 * (entry["tp"] - 1) // entry["tp"], (name, variant)
        assert ("nemo_te" in entry["added"]) == entry["sequence_parallel"]


def test_a_microbatch_adds_at_most_a_twentieth_of_nemos_layer(layouts: dict[str, Any]) -> None:
    for name in TENSOR_PARALLEL:
        added = {variant: phases["microbatch"]["sent_bytes"] for variant, phases in layouts[name]["added"].items()}
        for variant in added.keys() - {"ours"}:
            assert 0 < added["ours"] <= 0.05 * added[variant], (name, variant)


def test_a_step_sums_the_tied_gradients_in_one_all_reduce_across_the_pipeline(layouts: dict[str, Any]) -> None:
    for name in PIPELINE:
        entry = layouts[name]
        (message,) = [m for m in entry["added"]["ours"]["step"]["messages"] if m["group"] == "PP"]
        assert (message["operation"], message["calls"], message["ranks"]) == ("allreduce_", 1, entry["pp"])
        assert message["shape"] == [tied_elements(entry["tp"])]
        sent = entry["added"]["ours"]["step"]["sent_bytes_of_group"]["PP"]
        assert sent == all_reduced(tied_elements(entry["tp"]), entry["pp"])
        assert entry["base"]["microbatch"]["sent_bytes_of_group"]["PP"] > 0
        assert "PP" not in entry["added"]["ours"]["microbatch"]["sent_bytes_of_group"]


def test_sequence_parallelism_costs_one_all_reduce_of_partial_gradients_per_step(layouts: dict[str, Any]) -> None:
    for entry in layouts.values():
        messages = [m for m in entry["added"]["ours"]["step"]["messages"] if m["group"] == "TP"]
        shapes = [(m["shape"], m["calls"]) for m in messages]
        wanted = [([partial_elements(LAYERS // entry["pp"])], 1)] if entry["sequence_parallel"] else []
        assert shapes == wanted


def test_the_plan_states_the_counted_bytes(layouts: dict[str, Any]) -> None:
    for name, entry in layouts.items():
        counted = {phase: entry["added"]["ours"][phase]["sent_bytes"] for phase in ("microbatch", "step")}
        assert counted == {phase: entry["plan"][phase] for phase in counted}, name


def test_bytes_are_linear_in_tokens_and_the_same_for_every_microbatch(layouts: dict[str, Any]) -> None:
    for entry in layouts.values():
        for phases in entry["added"].values():
            assert phases["microbatch"]["sent_bytes"] == 2 * phases["microbatch"]["sent_bytes_of_half_the_tokens"]


def test_the_minimum_of_any_method_is_one_sum_per_step(layouts: dict[str, Any]) -> None:
    # 2 microbatches of 16 tokens in 4 layers: 128 r to exchange for each target, against 256 r or more to sum.
    assert layouts["tp2"]["least"]["any_method"] == {
        "microbatch": 0,
        "step": all_reduced(4 * MICROBATCHES * LAYERS * TOKENS * RANK, 2),
    }
    for entry in layouts.values():
        ours = {phase: entry["added"]["ours"][phase]["sent_bytes"] for phase in ("microbatch", "step")}
        assert ours == entry["least"]["beside_the_base"]


def test_both_adapters_compute_the_same_update(layouts: dict[str, Any]) -> None:
    for entry in layouts.values():
        losses = entry["losses"]
        for variant in losses.keys() - {"ours", "frozen"}:
            assert losses[variant] == pytest.approx(losses["ours"], rel=1e-5)  # float32, sums in another order
            assert losses[variant] != pytest.approx(losses["frozen"], rel=1e-5)


def test_every_claim_is_kept_and_the_exit_code_is_0(runs: dict[str, dict[str, Any]]) -> None:
    assert "MISSED" not in runs["clean"]["printed"]
    assert runs["clean"]["code"] == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(runs: dict[str, dict[str, Any]], fault: str) -> None:
    _, claim = FAULTS[fault]
    missed = [line for line in runs[fault]["printed"].splitlines() if line.endswith("MISSED")]
    assert runs[fault]["code"] == 1
    assert any(claim in line for line in missed), missed


def test_the_page_is_made_from_the_json_alone(runs: dict[str, dict[str, Any]], folder: Path) -> None:
    words = ["--from-json", str(folder / "clean.json"), "--page", str(folder / "again.md")]
    done = run_forked(fork_script, SCRIPT, words, cwd=folder, env=user_environment(), timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    page = (folder / "again.md").read_text()
    assert page == (folder / "clean.md").read_text()
    assert "missed**" not in page
    for missing in ("Time", "NCCL", "bfloat16", "Transformer Engine itself"):
        assert missing in page.split("## Not measured")[1]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "--output FILE is missing"),
        (("--output", "x.json", "--rank", "6"), "--rank 6: not divisible by 4"),
        (("--output", "x.json", "--layers", "6"), "--layers 6: not divisible by 4"),
        (("--output", "x.json", "--sequence", "12"), "--sequence 12: not divisible by 8"),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(tmp_path: Path, words: tuple[str, ...], problem: str) -> None:
    done = run_forked(fork_script, SCRIPT, words, cwd=tmp_path, env=user_environment(), timeout=120)
    assert done.returncode == 2
    assert problem in done.stderr
