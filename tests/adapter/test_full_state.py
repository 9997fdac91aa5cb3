# SPDX-License-Identifier: Apache-2.0
"""Two ranks (one start): the whole state at TP 2, at PP 2 and on one process, bit for bit."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from nemo_tied_lora import TiedLoraConfig, inject
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.config import TARGETS
from tests.harness.ranks import run_ranks, single_process
from tests.harness.relayout import relayout
from tests.harness.tiny_gpt import build_gpt, full_tensor

LAYERS, RANK = 4, 3
LAYOUTS: dict[str, dict[str, int]] = {"tp2": {"tp": 2}, "pp2": {"pp": 2}}
LLAMA: dict[str, Any] = {"llama": True, "groups": 2}
# (in, out) at hidden 24, 4 heads of 6 and 2 groups of keys and values, ffn 40 (gate and up: 80).
LLAMA_SHAPES = {"linear_qkv": (24, 48), "linear_proj": (24, 24), "linear_fc1": (24, 80), "linear_fc2": (40, 24)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and an adapter on it."""

    config: dict[str, Any]
    model: dict[str, Any]

    def build(self) -> Adapter:
        return inject(
            build_gpt(num_layers=LAYERS, **self.model), TiedLoraConfig.from_mapping({"rank": RANK, **self.config})
        )


CASES = {
    "tl6": Case(config={"preset": "tl6"}, model={}),
    "llama tl6": Case(config={"preset": "tl6"}, model=LLAMA),
    "llama lora": Case(config={"preset": "lora"}, model=LLAMA),
    "vera": Case(config={"preset": "vera"}, model={}),
    "u alone, B tied": Case(config={"trained": ["u"], "tied": ["B"]}, model={}),
    "one stage": Case(config={"preset": "tl6", "layers": [3], "targets": ["linear_qkv", "linear_fc2"]}, model={}),
    "one stage, nothing tied": Case(config={"preset": "lora", "layers": [0]}, model=LLAMA),
    "bfloat16": Case(config={"preset": "lora", "layers": [3]}, model={"dtype": torch.bfloat16}),
}

State = dict[str, torch.Tensor]


@dataclass
class Record:
    """Of one rank: the state as injected, a loaded state read back, and this rank's own parts of the loaded one."""

    start: State
    loaded: State
    local: State
    tp_rank: int
    logits_stage: bool


def whole_state(case: Case, start: State) -> State:
    """Random numbers that depend only on the name, so a swapped tensor is noticed."""
    return {name: full_tensor(f"state {name}", tuple(t.shape)).to(t.dtype) for name, t in start.items()}


def record(case: Case) -> Record:
    adapter = case.build()
    start = adapter.full_state()
    adapter.load_full_state(whole_state(case, start))
    return Record(
        start=start,
        loaded=adapter.full_state(),
        local={name: p.detach().clone() for c in adapter.chunks for name, p in c.factors.named_parameters()},
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        logits_stage=parallel_state.is_pipeline_last_stage(),
    )


TwoRanks = list[dict[str, dict[str, Record]]]


def record_layouts() -> dict[str, dict[str, Record]]:
    """On a rank: every case on every layout."""
    records = {}
    for layout, sizes in LAYOUTS.items():
        relayout(**sizes)
        records[layout] = {name: record(case) for name, case in CASES.items()}
    return records


@pytest.fixture(scope="module")
def two_ranks() -> TwoRanks:
    """The ranks are started once, even if they fail."""
    return run_ranks(record_layouts, world_size=2, tp=2)


@functools.cache
def one_process(case: str) -> Record:
    single_process()
    return record(CASES[case])


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def assert_same(got: State, expected: State) -> None:
    """Checks that names, their order, dtypes, shapes and bits are the same."""
    assert list(got) == list(expected)
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        assert got[name].shape == expected[name].shape, name
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_every_rank_starts_from_the_bits_of_the_single_process(case: str, layout: str, two_ranks: TwoRanks) -> None:
    for rank in two_ranks:
        assert_same(rank[layout][case].start, one_process(case).start)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_loaded_state_is_read_back_whole_on_every_rank(case: str, layout: str, two_ranks: TwoRanks) -> None:
    expected = whole_state(CASES[case], one_process(case).start)
    assert_same(one_process(case).loaded, expected)
    for rank in two_ranks:
        assert_same(rank[layout][case].loaded, expected)


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_state_of_two_ranks_loads_on_one(case: str, source: str, two_ranks: TwoRanks) -> None:
    state = two_ranks[0][source][case].loaded
    adapter = CASES[case].build()
    adapter.load_full_state(state)
    assert_same(adapter.full_state(), state)
    own = {name: p.detach() for name, p in adapter.chunks[0].factors.named_parameters()}
    assert own.keys() == state.keys()
    assert [name for name in own if not torch.equal(own[name], state[name])] == []


def test_each_tensor_parallel_rank_holds_the_part_that_the_table_says(two_ranks: TwoRanks) -> None:
    """The expected parts are written out here: reading back what was loaded would not notice a wrong part."""
    state = one_process("llama tl6").loaded
    for rank in two_ranks:
        held = rank["tp2"]["llama tl6"]
        k = held.tp_rank
        gate, up = slice(20 * k, 20 * k + 20), slice(40 + 20 * k, 60 + 20 * k)
        for name, whole in state.items():
            target, factor = name.split(".")[-2:]
            part = {
                ("linear_qkv", "B"): whole[24 * k : 24 * k + 24],
                ("linear_qkv", "v"): whole[24 * k : 24 * k + 24],
                ("linear_fc1", "B"): torch.cat([whole[gate], whole[up]]),
                ("linear_fc1", "v"): torch.cat([whole[gate], whole[up]]),
                ("linear_proj", "A"): whole[:, 12 * k : 12 * k + 12] if factor == "A" else None,
                ("linear_fc2", "A"): whole[:, 20 * k : 20 * k + 20] if factor == "A" else None,
            }.get((target, factor), whole)
            assert torch.equal(held.local[name], part), name
    assert sorted(rank["tp2"]["llama tl6"].tp_rank for rank in two_ranks) == [0, 1]


def test_each_pipeline_rank_holds_its_own_layers_and_all_tied_tensors(two_ranks: TwoRanks) -> None:
    tied = {f"{target}.{factor}" for target in TARGETS for factor in "AB"}
    for stage, rank in enumerate(two_ranks):
        held = set(rank["pp2"]["tl6"].local)
        assert {name for name in held if not name.startswith("layers.")} == tied
        assert {int(name.split(".")[1]) for name in held - tied} == {2 * stage, 2 * stage + 1}
    assert set(two_ranks[0]["pp2"]["one stage"].local) == {
        f"{t}.{f}" for t in ("linear_qkv", "linear_fc2") for f in "AB"
    }
    assert two_ranks[1]["pp2"]["one stage, nothing tied"].local == {}


def test_names_and_shapes_are_the_contract() -> None:
    state = one_process("llama tl6").loaded
    expected: dict[str, tuple[int, ...]] = {}
    for target, (inputs, outputs) in LLAMA_SHAPES.items():
        expected |= {f"{target}.A": (RANK, inputs), f"{target}.B": (outputs, RANK)}
        for layer in range(LAYERS):
            expected |= {f"layers.{layer}.{target}.u": (RANK,), f"layers.{layer}.{target}.v": (outputs,)}
    assert {name: tuple(t.shape) for name, t in state.items()} == expected
    assert {t.device.type for t in state.values()} == {"cpu"}


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("llama lora", {f"layers.{i}.{t}.{f}" for i in range(LAYERS) for t in TARGETS for f in "AB"}),
        (
            "vera",
            {f"{t}.{f}" for t in TARGETS for f in "AB"}
            | {f"layers.{i}.{t}.{f}" for i in range(LAYERS) for t in TARGETS for f in "uv"},
        ),
        (
            "u alone, B tied",
            {f"{t}.B" for t in TARGETS}
            | {f"layers.{i}.{t}.{f}" for i in range(LAYERS) for t in TARGETS for f in "Au"},
        ),
        ("one stage, nothing tied", {f"layers.0.{t}.{f}" for t in TARGETS for f in "AB"}),
    ],
)
def test_what_is_stored(case: str, names: set[str]) -> None:
    """Frozen A and B are stored; a frozen u or v is 1 and is not."""
    assert set(one_process(case).loaded) == names


def test_the_state_is_a_copy() -> None:
    adapter = CASES["tl6"].build()
    state = adapter.full_state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in adapter.parameters():
        tensor.data.add_(1.0)
    assert_same(state, kept)


def test_a_loaded_state_stays_the_callers_own() -> None:
    adapter = CASES["tl6"].build()
    state = whole_state(CASES["tl6"], adapter.full_state())
    kept = {name: tensor.clone() for name, tensor in state.items()}
    adapter.load_full_state(state)
    for tensor in adapter.parameters():
        tensor.data.add_(1.0)
    assert_same(state, kept)


def test_loading_keeps_the_parameters_that_an_optimizer_holds() -> None:
    adapter = CASES["tl6"].build()
    before = [(id(p), p.data_ptr(), p.requires_grad) for p in adapter.parameters()]
    adapter.load_full_state(whole_state(CASES["tl6"], adapter.full_state()))
    assert [(id(p), p.data_ptr(), p.requires_grad) for p in adapter.parameters()] == before


def test_a_float32_state_loads_into_a_bfloat16_adapter() -> None:
    adapter = CASES["bfloat16"].build()
    state = {name: tensor.float() + 0.25 for name, tensor in adapter.full_state().items()}
    adapter.load_full_state(state)
    assert_same(adapter.full_state(), {name: tensor.bfloat16() for name, tensor in state.items()})


BAD: dict[str, tuple[Any, str]] = {
    "missing": (lambda s: s.pop("linear_qkv.A"), "state: linear_qkv.A is missing"),
    "unexpected": (lambda s: s.update({"linear_qkv.C": torch.ones(1)}), "state: linear_qkv.C is unexpected"),
    "of a layer that does not exist": (
        lambda s: s.update({"layers.4.linear_qkv.u": torch.ones(RANK)}),
        "state: layers.4.linear_qkv.u is unexpected",
    ),
    "misshapen": (
        lambda s: s.update({"linear_proj.B": s["linear_proj.B"].t()}),
        "state: linear_proj.B has shape (3, 24), the adapter needs (24, 3)",
    ),
    "NaN": (lambda s: s["linear_fc1.A"][0].fill_(float("nan")), "state: linear_fc1.A holds NaN or infinity"),
    "infinite": (lambda s: s["linear_fc2.B"][1].fill_(float("inf")), "state: linear_fc2.B holds NaN or infinity"),
    "of integers": (
        lambda s: s.update({"layers.3.linear_fc2.u": torch.ones(RANK, dtype=torch.int64)}),
        "state: layers.3.linear_fc2.u is torch.int64, not a floating-point tensor",
    ),
}


@pytest.mark.parametrize(
    "kinds", [*[[kind] for kind in BAD], list(BAD)], ids=lambda kinds: kinds[0] if len(kinds) == 1 else "all"
)
def test_a_bad_state_is_refused_with_every_reason_and_nothing_is_changed(kinds: list[str]) -> None:
    adapter = CASES["tl6"].build()
    before = adapter.full_state()
    state = whole_state(CASES["tl6"], before)
    for kind in kinds:
        BAD[kind][0](state)
    with pytest.raises(ValueError, match="state: ") as error:
        adapter.load_full_state(state)
    assert sorted(str(error.value).splitlines()) == sorted(BAD[kind][1] for kind in kinds)
    assert_same(adapter.full_state(), before)
