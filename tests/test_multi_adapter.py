# SPDX-License-Identifier: Apache-2.0
"""One process, then TP 2 and PP 2: several adapters on one model give the same bits as each alone."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.multi_adapter import Adapters
from nemo_tied_lora.planning.adapter_cost import Precision, several_adapters
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.parallel_layout import Layout
from tests.harness.ranks import run_ranks, single_process
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt, full_tensor

# All of them differ; only the first two share something: the same frozen A and B.
CONFIGS: dict[str, dict[str, Any]] = {
    "vera": {"preset": "vera", "rank": 4, "seed": 7},
    "vera_too": {"preset": "vera", "rank": 4, "seed": 7},
    "vera_of_another_seed": {"preset": "vera", "rank": 4, "seed": 8},
    "tl6": {"preset": "tl6", "rank": 2, "alpha": 6.0},
    "lora": {"preset": "lora", "rank": 3, "targets": ["linear_qkv", "linear_fc2"], "layers": [1, 2]},
    "tl5": {"preset": "tl5", "rank": 8, "targets": ["linear_fc1"]},
}


def randomize(adapter: Any, name: str) -> None:
    """Makes trained factors random and different in each adapter; keeps frozen ones as drawn."""
    shapes = expected_shapes(adapter.config, adapter.shapes)
    drawn = adapter.full_state()
    trained = adapter.config.trained
    random = {key: full_tensor(f"{name} {key}", shape) for key, shape in shapes.items()}
    adapter.load_full_state({k: random[k] if k.rpartition(".")[2] in trained else drawn[k] for k in shapes})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name to the `.nemo` file of each adapter, written on one rank."""
    single_process()
    folder = tmp_path_factory.mktemp("adapters")
    paths = {}
    for name, config in CONFIGS.items():
        model = build_gpt()
        adapter = inject(model, TiedLoraConfig.from_mapping(config))
        randomize(adapter, name)
        paths[name] = str(save_adapter(adapter, folder / f"{name}.nemo"))
    model = build_gpt(hidden=32)
    paths["of_another_base"] = str(save_adapter(inject(model, TiedLoraConfig()), folder / "other.nemo"))
    return paths


@pytest.fixture
def model() -> Any:
    single_process()
    return build_gpt()


@pytest.fixture
def adapters(model: Any, files: dict[str, str]) -> Adapters:
    """Has all adapters of CONFIGS; none is active."""
    several = Adapters(model)
    for name in CONFIGS:
        several.load(name, files[name])
    return several


def logits(model: Any) -> bytes:
    """The bits of the last stage's logits for a fixed batch; empty on other stages."""
    tokens = torch.randint(0, VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(SEQUENCE).expand(2, SEQUENCE)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]

    def forward_step(_batches: Any, part: Any) -> Any:
        output = part(tokens, positions, mask)
        return output, lambda out: (out.sum(), {"bits": out.detach().numpy().tobytes()})

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=model,
        num_microbatches=1,
        seq_length=SEQUENCE,
        micro_batch_size=2,
        forward_only=True,
    )
    return outputs[0]["bits"] if outputs else b""


def alone(path: str) -> bytes:
    """The logits of a new model with only this adapter."""
    model = build_gpt()
    load_adapter(model, path)
    return logits(model)


def frozen(adapters: Adapters, name: str) -> dict[str, torch.nn.Parameter]:
    parameters = adapters[name].chunks[0].factors.named_parameters()
    return {path: parameter for path, parameter in parameters if not parameter.requires_grad}


def test_each_adapter_gives_the_bits_that_it_gives_alone(
    model: Any, adapters: Adapters, files: dict[str, str]
) -> None:
    base, wanted = logits(build_gpt()), {name: alone(files[name]) for name in CONFIGS}
    assert len({base, *wanted.values()}) == len(CONFIGS) + 1, "the outputs must tell the adapters apart"
    assert logits(model) == base
    for name in (*CONFIGS, *reversed(CONFIGS)):
        adapters.switch(name)
        assert adapters.active == name
        assert logits(model) == wanted[name], name
    adapters.disable()
    assert (adapters.active, logits(model)) == (None, base)
    adapters.enable()
    assert (adapters.active, logits(model)) == ("vera", wanted["vera"])


def test_a_disabled_model_is_the_unchanged_base(files: dict[str, str]) -> None:
    single_process()
    plain, model = build_gpt(), build_gpt()
    model.decoder.final_layernorm.requires_grad_(False)
    adapters = Adapters(model)
    adapters.load("tl6", files["tl6"])
    adapters.switch("tl6")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "tied_lora" not in n)
    adapters.disable()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in plain.named_parameters() if "final_layernorm" not in name}
    assert getattr(model.config, "has_cond_embedder", None) == getattr(plain.config, "has_cond_embedder", None)


def test_switching_copies_nothing(model: Any, adapters: Adapters) -> None:
    def storages() -> dict[str, list[int]]:
        return {n: [p.data_ptr() for p in adapters[n].chunks[0].factors.parameters()] for n in adapters}

    before, base = storages(), [parameter.data_ptr() for parameter in model.parameters()]
    with _Allocations() as allocated:
        for name in CONFIGS:
            adapters.switch(name)
        adapters.disable()
    assert allocated.operators == []
    assert storages() == before
    assert [parameter.data_ptr() for parameter in model.parameters()] == base


class _Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Records every tensor operator that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func.name())
        return func(*args, **(kwargs or {}))


def test_frozen_factors_with_the_same_bits_are_one_tensor(adapters: Adapters) -> None:
    first, second, other = (frozen(adapters, name) for name in ("vera", "vera_too", "vera_of_another_seed"))
    assert len(first) == 8, "A and B of four targets"
    for path, parameter in first.items():
        assert second[path] is parameter
        assert other[path] is not parameter
    own = {id(p) for n in adapters for p in adapters[n].parameters()}
    assert len(own) == sum(len(list(adapters[n].parameters())) for n in adapters), "what is trained is shared by none"


def test_a_thousand_customers_cost_a_thousand_pairs_of_vectors(model: Any, files: dict[str, str]) -> None:
    adapters = Adapters(model)
    adapters.load("0", files["vera"])
    one = adapters.num_bytes()
    vectors = sum(p.numel() * p.element_size() for p in adapters["0"].parameters())
    assert vectors == 4 * (4 * 4 + 72 + 24 + 40 + 24) * 8, "4 layers of u and v, float64"
    for number in range(1, 20):
        adapters.load(str(number), files["vera_too"])
    assert adapters.num_bytes() == one + 19 * vectors


def test_loading_values_into_one_adapter_changes_no_other(
    model: Any, adapters: Adapters, files: dict[str, str]
) -> None:
    state = {name: tensor + 1 for name, tensor in adapters["vera"].full_state().items()}
    adapters["vera_too"].load_full_state(state)
    adapters.switch("vera")
    assert logits(model) == alone(files["vera"])
    loaded = adapters["vera_too"].full_state()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert frozen(adapters, "vera_too")["linear_qkv.B"].partition_dim == 0, "Megatron's marks stay"


def test_a_deleted_adapters_memory_is_freed_and_what_it_shared_stays(model: Any, adapters: Adapters) -> None:
    shared = weakref.ref(frozen(adapters, "vera")["linear_qkv.A"])
    own = [weakref.ref(parameter) for name in ("vera", "tl6") for parameter in adapters[name].parameters()]
    before = adapters.num_bytes()
    adapters.switch("tl6")
    adapters.delete("tl6")
    adapters.delete("vera")
    gc.collect()
    assert [each() for each in own] == [None] * len(own)
    assert adapters.num_bytes() < before
    assert adapters.active is None
    assert shared() is frozen(adapters, "vera_too")["linear_qkv.A"]
    adapters.delete("vera_too")
    gc.collect()
    assert shared() is None
    assert list(adapters) == ["vera_of_another_seed", "lora", "tl5"]
    assert logits(model) == logits(build_gpt())


@pytest.mark.parametrize("active", [None, "tl6"])
def test_a_refused_adapter_changes_nothing(
    model: Any, adapters: Adapters, files: dict[str, str], tmp_path: Path, active: str | None
) -> None:
    if active:
        adapters.switch(active)
    before, names = logits(model), list(adapters)
    damaged = tmp_path / "damaged.nemo"
    damaged.write_bytes(Path(files["tl6"]).read_bytes()[:2000])
    with pytest.raises(ConfigError, match="32"):  # the width of that base
        adapters.load("new", files["of_another_base"])
    with pytest.raises(ConfigError, match="damaged"):
        adapters.load("new", damaged)
    with pytest.raises(FileNotFoundError):
        adapters.load("new", tmp_path / "none.nemo")
    with pytest.raises(ConfigError, match="rank=99"):
        adapters.add("new", TiedLoraConfig(rank=99))
    with pytest.raises(ConfigError, match="'tl6': the name is taken"):
        adapters.load("tl6", files["lora"])
    with pytest.raises(ConfigError, match="non-empty"):
        adapters.load("", files["lora"])
    assert (adapters.active, list(adapters), logits(model)) == (active, names, before)


def test_an_unknown_name_is_refused_with_the_known_ones(model: Any, adapters: Adapters) -> None:
    for call in (adapters.switch, adapters.delete, adapters.__getitem__):
        with pytest.raises(ConfigError, match=r"'nobody'.*'vera', 'vera_too'"):
            call("nobody")
    with pytest.raises(ConfigError, match="no adapter was active"):
        adapters.enable()
    assert "nobody" not in adapters
    assert "tl5" in adapters


def test_a_merged_adapter_is_not_switched_away(model: Any, adapters: Adapters) -> None:
    adapters.switch("tl6")
    adapters["tl6"].merge()
    merged = logits(model)
    for call in (lambda: adapters.switch("vera"), adapters.disable, lambda: adapters.delete("tl6")):
        with pytest.raises(RuntimeError, match="call unmerge"):
            call()
    assert (adapters.active, logits(model)) == ("tl6", merged)
    with pytest.raises(RuntimeError, match="not attached"):
        adapters["vera"].merge()
    adapters["tl6"].unmerge()
    adapters.switch("vera")


def test_a_new_adapter_is_trained_beside_the_loaded_ones(
    model: Any, adapters: Adapters, files: dict[str, str]
) -> None:
    adapter = adapters.add("mine", TiedLoraConfig.preset("vera", rank=4, seed=7))
    assert frozen(adapters, "mine")["linear_fc1.A"] is frozen(adapters, "vera")["linear_fc1.A"]
    adapters.switch("mine")
    assert logits(model) == logits(build_gpt()), "a new adapter starts at the base"
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    positions, mask = (
        torch.arange(SEQUENCE)[None],
        torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None],
    )
    model(torch.arange(SEQUENCE)[None] % VOCAB, positions, mask).square().mean().backward()
    optimizer.step()
    assert logits(model) != logits(build_gpt())
    adapters.switch("vera")
    assert logits(model) == alone(files["vera"])


def _on_a_rank(files: dict[str, str]) -> dict[str, Any]:
    """On a rank: the bits with all adapters and with each alone, what is shared, and the state after a refusal."""
    model = build_gpt()
    adapters = Adapters(model)
    for name in CONFIGS:
        adapters.load(name, files[name])
    base = logits(model)
    together = {}
    for name in CONFIGS:
        adapters.switch(name)
        together[name] = logits(model)
    refused = ""
    try:
        adapters.load("wrong", files["of_another_base"])
    except ConfigError as error:
        refused = str(error)
    after = logits(model)
    adapters.delete("tl5")
    two = Adapters(build_gpt())
    two.load("vera", files["vera"])
    two.load("vera_too", files["vera_too"])
    return {
        "bytes_of_two": two.num_bytes(),
        "base": (base, logits(build_gpt()), logits(model)),
        "together": together,
        "alone": {name: alone(files[name]) for name in CONFIGS},
        "shared": all(p is frozen(adapters, "vera_too")[path] for path, p in frozen(adapters, "vera").items()),
        "states": {name: adapters[name].full_state() for name in adapters},
        "refused": (refused, after == together["tl5"], "wrong" in adapters),
        "last": parallel_state.is_pipeline_last_stage(),
    }


def planned_bytes_of_two(layout: dict[str, int]) -> int:
    """The bytes on one rank that `tied-lora plan` reports for two such adapters in float64."""
    sizes = {"num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 40, "kv_channels": 6, "seq_length": SEQUENCE}
    arch = Architecture(**sizes, num_attention_heads=4, num_query_groups=4)
    ranks = Layout(tp_size=layout.get("tp", 1), pp_size=layout.get("pp", 1), devices=2)
    eight = dataclasses.replace(Precision.from_names("32", amp_O2=False), weights=8)
    planned = several_adapters(arch, ranks, TiedLoraConfig.from_mapping(CONFIGS["vera"]), eight, [2])
    assert planned["adapters"]["this adapter"] == planned["adapters"]["vera"]
    return int(planned["adapters"]["vera"]["bytes_per_rank"][0])


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_it_works_on_parallel_layouts(files: dict[str, str], layout: dict[str, int]) -> None:
    ranks = run_ranks(_on_a_rank, files, world_size=2, **layout)
    single_process()
    for result in ranks:
        assert result["bytes_of_two"] == planned_bytes_of_two(layout)
        assert len(set(result["base"])) == 1
        assert result["together"] == result["alone"]
        if result["last"]:
            assert len({result["base"][0], *result["together"].values()}) == len(CONFIGS) + 1
        assert result["shared"]
        message, unchanged, kept = result["refused"]
        assert "32" in message, "the width of that base"
        assert (unchanged, kept) == (True, False)
        for name, state in result["states"].items():
            wanted = load_adapter(build_gpt(), files[name]).full_state()
            assert all(torch.equal(state[key], wanted[key]) for key in wanted), name


# Negative controls: a fault in sharing or switching makes the tests above fail.


def test_control_loading_into_shared_memory_would_change_the_other(
    model: Any, adapters: Adapters, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_tied_lora.adapter.injected_adapter.own_frozen", lambda factors: None)
    with pytest.raises(AssertionError):
        test_loading_values_into_one_adapter_changes_no_other(model, adapters, files)


def test_control_sharing_without_comparing_would_change_outputs(
    model: Any, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nemo_tied_lora.adapter.tied_factors._same_bits", lambda first, second: first.shape == second.shape
    )
    adapters = Adapters(model)
    for name in CONFIGS:
        adapters.load(name, files[name])
    with pytest.raises(AssertionError):
        test_each_adapter_gives_the_bits_that_it_gives_alone(model, adapters, files)


def test_control_a_linear_left_detached_would_show(
    model: Any, adapters: Adapters, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = type(adapters["lora"].chunks[0]).attach

    def attach_all_but_one(chunk: Any) -> None:
        chunk.adapters.pop(next(iter(chunk.adapters)))
        attach(chunk)

    monkeypatch.setattr("nemo_tied_lora.adapter.injected_chunk.Chunk.attach", attach_all_but_one)
    with pytest.raises(AssertionError):
        test_each_adapter_gives_the_bits_that_it_gives_alone(model, adapters, files)
