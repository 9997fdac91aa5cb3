# SPDX-License-Identifier: Apache-2.0
"""One process, then two ranks (one start): mixtures of experts on megatron-core's own MoE layer; refusals, training, files."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn
from torch.nn import functional

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter.experts import refused_layouts
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.planning.adapter_cost import rank_share
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.parallel_layout import Layout, check
from tests.harness.ranks import run_ranks, single_process
from tests.harness.relayout import relayout
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt
from tests.parity.runs import Run
from tests.parity.training import Record, randomise, train

# Sums are only reordered: float64 leaves about 1e-13. The router's softmax is float32 in megatron-core: its logits
# agree, so it rounds to the same bits.
RELATIVE = 1e-9
EXPERTS = 4
# Layer 1 is dense, so of two stages both have experts and only the first has a dense layer. Expert 2 gets no token.
MIXTURE: dict[str, Any] = {
    "llama": True,
    "groups": 2,
    "num_moe_experts": EXPERTS,
    "moe_layer_freq": [1, 0, 1, 1],
    "moe_ffn_hidden_size": 28,
    "moe_shared_expert_intermediate_size": 16,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "idle_expert": 2,
}
# (in, out) of each group, and how many layers and experts have it.
GROUPS = {
    "linear_qkv": (24, 48, 4, 1),
    "linear_proj": (24, 24, 4, 1),
    "linear_fc1": (24, 80, 1, 1),
    "experts.linear_fc1": (24, 56, 3, EXPERTS),
    "shared_experts.linear_fc1": (24, 32, 3, 1),
    "linear_fc2": (40, 24, 1, 1),
    "experts.linear_fc2": (28, 24, 3, EXPERTS),
    "shared_experts.linear_fc2": (16, 24, 3, 1),
}
RUNS: dict[str, dict[str, Any]] = {
    "tl6, per expert": {"preset": "tl6", "rank": 3, "alpha": 5.0},
    "tl6, tied": {"preset": "tl6", "rank": 3, "alpha": 5.0, "experts": "tied"},
    "vera, tied": {"preset": "vera", "rank": 3, "experts": "tied"},
    "B tied": {"rank": 2, "tied": ["B"], "experts": "tied", "targets": ["mlp"], "layers": [0, 1, 3]},
}
SHORT = {"steps": 3, "microbatches": 2}
# The replicated factors: sequence parallelism and the dispatcher leave their gradients partial.
PARTIAL = {("linear_qkv", f) for f in "Au"} | {("linear_fc1", f) for f in "Au"}
PARTIAL |= {(target, f) for target in ("linear_proj", "linear_fc2") for f in "Buv"}


def randomised(model: nn.Module, config: dict[str, Any]) -> Adapter:
    """Makes every stored factor random: a factor at 0 would hide errors in the others."""
    adapter = inject(model, TiedLoraConfig.from_mapping(config))
    randomise(adapter)
    return adapter


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (3, SEQUENCE), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return model(ids, torch.arange(SEQUENCE).expand(3, SEQUENCE), mask)


def linears(adapter: Adapter) -> dict[tuple[int, str], Any]:
    return {(linear.layer, linear.name): linear.module for chunk in adapter.chunks for linear in chunk.linears}


def wrong(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """The names whose tensors differ, relative to the largest element."""
    assert got.keys() <= expected.keys()
    return [
        name
        for name, tensor in got.items()
        if (tensor - expected[name]).abs().max() > RELATIVE * expected[name].abs().max().clamp_min(1e-12)
    ]


# One process


def planned(**changes: Any) -> Architecture:
    """The mixture, as a configuration file describes it."""
    keys = {
        "num_layers": 4,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 40,
        "encoder_seq_length": SEQUENCE,
        "override_vocab_size": VOCAB,
        "activation": "swiglu",
        "bias": False,
        "normalization": "rmsnorm",
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
    }
    return Architecture.from_model_config({**keys, **{k: v for k, v in MIXTURE.items() if "moe" in k}, **changes})


def test_a_plan_refuses_what_injection_refuses() -> None:
    config = TiedLoraConfig(rank=3)
    tensor, expert = Layout(tp_size=2, devices=2), Layout(tp_size=1, devices=2, ep_size=2)
    assert [p.split("=")[0] for p in check(planned(), tensor, config)] == ["model.sequence_parallel"]
    assert [p.split("=")[0] for p in check(planned(), expert, config)] == ["model.expert_model_parallel_size"]
    assert check(planned(), Layout(tp_size=2, devices=2, sequence_parallel=True), config) == []
    assert check(planned(), Layout(pp_size=2, devices=2), config) == []
    assert check(planned(), expert, TiedLoraConfig(rank=3, targets=["attention"])) == []


GOOD: dict[str, Any] = {
    "sequence_parallel": True,
    "moe_token_dispatcher_type": "alltoall",
    "moe_shared_expert_overlap": False,
}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "expert_model_parallel_size=2": ({}, {"ep_size": 2}),
    "expert_tensor_parallel_size=1: .* set it to 2": ({}, {"etp_size": 1}),
    "sequence_parallel=False": ({"sequence_parallel": False}, {}),
    "moe_token_dispatcher_type='flex'": ({"moe_token_dispatcher_type": "flex"}, {}),
    "moe_shared_expert_overlap=True": ({"moe_shared_expert_overlap": True}, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_layouts_that_are_not_right_yet_are_refused_by_name(message: str) -> None:
    options, sizes = REFUSED[message]
    sizes = {"tp_size": 2, "ep_size": 1, "etp_size": 2, **sizes}
    problems = list(refused_layouts(SimpleNamespace(**{**GOOD, **options}), GROUPS, **sizes))
    assert len(problems) == 1
    assert re.match(message, problems[0])
    assert "set it to" in problems[0]
    assert "leave linear_fc1 and linear_fc2 out of targets" in problems[0]


def test_what_does_not_touch_experts_is_never_refused() -> None:
    bad = SimpleNamespace(sequence_parallel=False, moe_token_dispatcher_type="flex", moe_shared_expert_overlap=True)
    assert list(refused_layouts(bad, ["linear_qkv", "linear_fc1"], tp_size=2, ep_size=2, etp_size=1)) == []


def test_grouped_experts_are_refused_by_name_and_attention_beside_them_is_not() -> None:
    """Uses a stand-in with the real class's attributes: megatron-core's needs Transformer Engine or a CUDA extension."""

    class TEGroupedMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_fc1, self.linear_fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    single_process()
    model = build_gpt(**MIXTURE)
    model.decoder.layers[2].mlp.experts = TEGroupedMLP()
    with pytest.raises(ConfigError) as refusal:
        inject(model, TiedLoraConfig(rank=3))
    assert list(refusal.value.problems) == [
        "moe_grouped_gemm=True: layer 2 mlp.experts: a TEGroupedMLP holds all experts in one tensor, which cannot be "
        "adapted yet; build the model with moe_grouped_gemm=False, or drop linear_fc1 and linear_fc2"
    ]
    assert len(linears(inject(model, TiedLoraConfig(rank=3, targets=["attention"])))) == 8


# Two ranks


def with_megatrons_ddp(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """On a rank: the gradients after `finalize_model_grads`."""
    model = build_gpt(**MIXTURE)
    adapter = randomised(model, config)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()

    def step(data: Any, module: nn.Module) -> tuple[torch.Tensor, Any]:
        return logits(module), partial(loss, next(data))

    def loss(labels: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return functional.cross_entropy(output.reshape(-1, VOCAB), labels), {}

    generator = torch.Generator().manual_seed(3)
    labels = iter([torch.randint(0, VOCAB, (3 * SEQUENCE,), generator=generator) for _ in range(2)])
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=labels,
        model=wrapped,
        num_microbatches=2,
        seq_length=SEQUENCE,
        micro_batch_size=3,
        forward_only=False,
    )
    finalize_model_grads([wrapped])
    return {name: p.main_grad.clone() for name, p in adapter.named_parameters()}  # type: ignore[attr-defined]


def refusal(**options: Any) -> list[str]:
    try:
        inject(build_gpt(**{**MIXTURE, **options}), TiedLoraConfig(rank=3))
    except ConfigError as error:
        return list(error.problems)
    return []


def dropout_masks() -> dict[str, list[float]]:
    """On a rank: the result of dropout on ones, for an expert's linears."""
    adapter = inject(build_gpt(**MIXTURE, sequence_parallel=True), TiedLoraConfig(rank=3, dropout=0.5))
    masks = {}
    for name in ("experts.0.linear_fc1", "experts.0.linear_fc2"):
        torch.manual_seed(11)
        masks[name] = linears(adapter)[0, name].tied_lora.dropped_out(torch.ones(64)).tolist()
    return masks


def held(experts: str, **options: Any) -> int:
    """On a rank: the number of the adapter's elements."""
    adapter = inject(build_gpt(**MIXTURE, **options), TiedLoraConfig(rank=3, experts=experts))
    return sum(parameter.numel() for parameter in adapter.parameters())


def saved(folder: str) -> dict[str, torch.Tensor]:
    """On a rank: the state that was written to the adapter's own file and to Megatron's checkpoint."""
    from megatron.core import dist_checkpointing

    model = build_gpt(**MIXTURE, sequence_parallel=True)
    adapter = randomised(model, RUNS["tl6, per expert"])
    save_adapter(adapter, Path(folder) / "moe.nemo")
    (Path(folder) / "megatron").mkdir(exist_ok=True)
    torch.distributed.barrier()
    state = {k: v for k, v in model.sharded_state_dict().items() if "tied_lora" in k}
    dist_checkpointing.save(state, str(Path(folder) / "megatron"))
    return adapter.full_state()


def loaded(folder: str) -> list[dict[str, torch.Tensor]]:
    from megatron.core import dist_checkpointing

    adapter = load_adapter(build_gpt(**MIXTURE), Path(folder) / "moe.nemo")
    other = build_gpt(**MIXTURE)
    empty = inject(other, TiedLoraConfig.from_mapping(RUNS["tl6, per expert"]))
    state = {k: v for k, v in other.sharded_state_dict().items() if "tied_lora" in k}
    other.load_state_dict(dist_checkpointing.load(state, str(Path(folder) / "megatron")), strict=False)
    return [adapter.full_state(), empty.full_state()]


def on_a_rank(folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {"runs": {}}
    sharded = {**MIXTURE, "sequence_parallel": True}
    for dispatcher in ("allgather", "alltoall"):
        model = {**sharded, "moe_token_dispatcher_type": dispatcher}
        for name, config in RUNS.items():
            results["runs"]["tp2", dispatcher, name] = train(Run(config=config, model=model, **SHORT))
    results["no sum"] = train(Run(config=RUNS["tl6, tied"], model=sharded, steps=1, microbatches=2, fault="no sum"))
    results["refused"] = refusal()
    results["dropout"] = dropout_masks()
    results["held"] = {("tp2", experts): held(experts, sequence_parallel=True) for experts in ("per_expert", "tied")}
    results["saved"] = saved(folder)
    relayout(pp=2)
    for name, config in RUNS.items():
        results["runs"]["pp2", "allgather", name] = train(Run(config=config, model=MIXTURE, **SHORT))
    results["ddp"] = {name: with_megatrons_ddp(RUNS[name]) for name in ("tl6, per expert", "tl6, tied")}
    results["held"] |= {("pp2", experts): held(experts) for experts in ("per_expert", "tied")}
    results["loaded"] = loaded(folder)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    results["expert parallel"] = refusal(expert_model_parallel_size=2)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_a_rank, str(tmp_path_factory.mktemp("moe")), world_size=2, tp=2)


@pytest.fixture(scope="module")
def oracle() -> dict[str, Record]:
    single_process()
    return {name: train(Run(config=config, model=MIXTURE, **SHORT)) for name, config in RUNS.items()}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("layout", [("tp2", "allgather"), ("tp2", "alltoall"), ("pp2", "allgather")], ids="-".join)
def test_training_matches_the_single_process(
    layout: tuple[str, str], run: str, ranks: list[dict[str, Any]], oracle: dict[str, Record]
) -> None:
    expected = oracle[run]
    for rank in ranks:
        got: Record = rank["runs"][layout[0], layout[1], run]
        for gradients, single in zip(got.gradients, expected.gradients, strict=True):
            assert gradients.keys() == single.keys()
            assert wrong(gradients, single) == []
        assert got.norms == pytest.approx(expected.norms, rel=RELATIVE)
        assert got.state.keys() == expected.state.keys()
        assert wrong(got.state, expected.state) == []
    assert ranks[1]["runs"][layout[0], layout[1], run].losses == pytest.approx(expected.losses, rel=RELATIVE)


def test_gradients_without_the_sum_are_noticed(ranks: list[dict[str, Any]], oracle: dict[str, Record]) -> None:
    """Exactly the replicated factors are wrong, also those of experts, except the idle expert's, which are always 0."""
    for rank in ranks:
        names = wrong(rank["no sum"].gradients[0], oracle["tl6, tied"].gradients[0])
        assert {tuple(name.split(".")[-2:]) for name in names} == PARTIAL
        assert {name for name in names if ".experts.1." in name}
        assert not {name for name in names if ".experts.2." in name}


def test_replicas_hold_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["runs"]["tp2", "alltoall", "tl6, tied"].bits[-1] for rank in ranks)
    replicated = [(chunk, name) for chunk, name in first if tuple(name.split(".")[-2:]) in PARTIAL]
    assert len(replicated) > 50
    assert [key for key in replicated if first[key] != second[key]] == []


@pytest.mark.parametrize("run", ["tl6, per expert", "tl6, tied"])
def test_megatrons_own_loop_sums_experts_over_two_stages(run: str, ranks: list[dict[str, Any]]) -> None:
    single_process()
    expected = with_megatrons_ddp(RUNS[run])
    stages = [rank["ddp"][run] for rank in ranks]
    assert stages[0].keys() | stages[1].keys() == expected.keys()
    assert [wrong(gradients, expected) for gradients in stages] == [[], []]


def test_tensor_parallel_experts_need_sequence_parallelism_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["refused"]) == 1
        assert rank["refused"][0].startswith("sequence_parallel=False with tensor_model_parallel_size=2")


def test_experts_on_different_ranks_are_refused_on_each_of_them(ranks: list[dict[str, Any]]) -> None:
    problems = [rank["expert parallel"] for rank in ranks]
    assert problems[0] == problems[1]
    assert [problem.partition(":")[0] for problem in problems[0]] == ["expert_model_parallel_size=2"]


@pytest.mark.parametrize(("linear", "replicated"), [("linear_fc1", True), ("linear_fc2", False)])
def test_an_experts_dropout_masks_agree_exactly_where_its_tokens_do(
    linear: str, replicated: bool, ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank["dropout"][f"experts.0.{linear}"] for rank in ranks)
    assert set(first) == set(second) == {0.0, 2.0}
    assert (first == second) is replicated


@pytest.mark.parametrize("experts", ["per_expert", "tied"])
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_a_plans_fullest_rank_is_the_real_one(layout: str, experts: str, ranks: list[dict[str, Any]]) -> None:
    sizes: dict[str, Any] = {"tp2": {"tp_size": 2, "sequence_parallel": True}, "pp2": {"pp_size": 2}}[layout]
    share = rank_share(planned(), Layout(devices=2, **sizes), TiedLoraConfig(rank=3, experts=experts))
    assert share.held == share.trained == max(rank["held"][layout, experts] for rank in ranks)


def test_files_change_the_layout_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for state in rank["loaded"]:
            assert state.keys() == rank["saved"].keys()
            assert [name for name, tensor in state.items() if not torch.equal(tensor, rank["saved"][name])] == []
