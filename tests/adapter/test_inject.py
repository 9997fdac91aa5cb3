# SPDX-License-Identifier: Apache-2.0
"""One process, a tiny real megatron-core GPT: what injection builds and trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from torch import nn
from torch.nn import functional

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.tied_linear import TiedLoraMixin, linear_kind
from nemo_tied_lora.config import FACTORS, TARGETS
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt, full_tensor

SUBSETS = [subset for size in range(5) for subset in itertools.combinations(FACTORS, size)]
TIES: list[tuple[str, ...]] = [(), ("A",), ("B",), ("A", "B")]
STYLES: dict[str, dict[str, Any]] = {"gpt": {}, "llama": {"llama": True, "groups": 2}}
# Whole shapes (in, out) of `tests.harness.tiny_gpt` at hidden 24, 4 heads of 6, ffn 40.
SHAPES = {
    "gpt": {"linear_qkv": (24, 72), "linear_proj": (24, 24), "linear_fc1": (24, 40), "linear_fc2": (40, 24)},
    # 2 groups: 4 queries, 2 keys and 2 values of 6; gate and up of 40.
    "llama": {"linear_qkv": (24, 48), "linear_proj": (24, 24), "linear_fc1": (24, 80), "linear_fc2": (40, 24)},
}


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """(batch, sequence, vocabulary)."""
    positions = torch.arange(SEQUENCE).expand(3, SEQUENCE)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return model(tokens(seed)[:, :-1], positions, mask)


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    return functional.cross_entropy(logits(model, seed).reshape(-1, VOCAB), tokens(seed)[:, 1:].reshape(-1))


def randomise(adapter: Adapter) -> None:
    """Makes every stored factor random: a factor at 0 would hide errors in the others."""
    shapes = expected_shapes(adapter.config, adapter.shapes)
    adapter.load_full_state({name: full_tensor(f"start {name}", shape) for name, shape in shapes.items()})


def stored(adapter: Adapter) -> dict[str, nn.Parameter]:
    return dict(adapter.chunks[0].factors.named_parameters())


def formula(
    shapes: dict[str, tuple[int, int]], layers: int, rank: int, trained: Sequence[str], tied: Sequence[str]
) -> int:
    """The paper's count, written independently."""
    total = 0
    for inputs, outputs in shapes.values():
        total += ("A" in trained) * rank * inputs * (1 if "A" in tied else layers)
        total += ("B" in trained) * outputs * rank * (1 if "B" in tied else layers)
        total += ("u" in trained) * layers * rank + ("v" in trained) * layers * outputs
    return total


@pytest.mark.parametrize("tied", TIES, ids=lambda t: "tied " + ("".join(t) or "none"))
@pytest.mark.parametrize("trained", SUBSETS, ids=lambda t: "train " + ("".join(t) or "none"))
def test_every_combination_builds_and_trains_or_is_refused(trained: tuple[str, ...], tied: tuple[str, ...]) -> None:
    if not trained:
        with pytest.raises(ConfigError, match=r"trained=\[\]: nothing would be trained"):
            TiedLoraConfig(trained=trained, tied=tied)
        return
    config = TiedLoraConfig(rank=3, trained=trained, tied=tied)
    model = build_gpt(num_layers=2)
    base_logits, base_keys, base_values = logits(model), list(model.state_dict()), values(model)
    adapter = inject(model, config)
    assert torch.equal(logits(model), base_logits)

    start = values(adapter.chunks[0].factors)
    losses, moved = train_two_steps(model, adapter)
    ones_trained = {name for name in start if name.rpartition(".")[2] in trained}
    # In step one all other gradients are products with the factor that is 0. Step two moves everything.
    assert moved[0] == {name for name in start if name.endswith(f".{config.zero_factor}")}
    assert moved[1] == ones_trained == {name for name, _ in adapter.named_parameters()}
    assert losses[0] == pytest.approx(loss_of_logits(base_logits), abs=0)
    assert len(set(losses)) == 3
    assert losses[2] < losses[0]

    count = formula(SHAPES["gpt"], 2, 3, trained, tied)
    assert sum(adapter.num_parameters().values()) == sum(p.numel() for p in adapter.parameters()) == count
    adapter.remove()
    assert list(model.state_dict()) == base_keys
    assert all(torch.equal(value, base_values[name]) for name, value in values(model).items())
    assert torch.equal(logits(model), base_logits)


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def loss_of_logits(output: torch.Tensor) -> float:
    return functional.cross_entropy(output.reshape(-1, VOCAB), tokens()[:, 1:].reshape(-1)).item()


def train_two_steps(model: nn.Module, adapter: Adapter) -> tuple[list[float], list[set[str]]]:
    """Returns the loss before each step and after the last, and after each step the names that differ from the start."""
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    start = values(adapter.chunks[0].factors)
    losses, moved = [], []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        adapter.reduce_gradients()
        optimizer.step()
        losses.append(loss.item())
        moved.append({name for name, p in stored(adapter).items() if not torch.equal(p, start[name])})
    return [*losses, loss_of(model).item()], moved


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("preset", ["lora", "vera", "tl5", "tl6"])
def test_whole_model_gradients_equal_the_formula_written_beside_the_base(style: str, preset: str) -> None:
    """The oracle is the base model with a hook on each linear. It uses none of this project's layers."""
    model, twin = (build_gpt(num_layers=2, **STYLES[style]) for _ in "12")
    adapter = inject(model, TiedLoraConfig.preset(preset, rank=3, alpha=5.0))
    randomise(adapter)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in stored(adapter).items()}
    add_literal_update(twin.requires_grad_(False), leaves, 5.0 / 3)
    loss, expected = loss_of(model), loss_of(twin)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-9, atol=1e-13)


def add_literal_update(model: nn.Module, leaves: dict[str, torch.Tensor], scale: float) -> None:
    def hook_for(number: int, target: str) -> Callable[..., Any]:
        def find(factor: str) -> torch.Tensor | None:
            return leaves.get(f"{target}.{factor}", leaves.get(f"layers.{number}.{target}.{factor}"))

        def hook(module: nn.Module, inputs: tuple, result: tuple) -> tuple:
            A, B, u, v = (find(factor) for factor in "ABuv")
            assert A is not None
            assert B is not None
            h = inputs[0] @ A.t() * (1.0 if u is None else u)
            return result[0] + scale * (h @ B.t()) * (1.0 if v is None else v), result[1]

        return hook

    for number, layer in enumerate(model.decoder.layers):  # type: ignore[union-attr,arg-type]
        for path, module in layer.named_modules():
            if path.rpartition(".")[2] in TARGETS:
                module.register_forward_hook(hook_for(number, path.rpartition(".")[2]))


@pytest.mark.parametrize("style", STYLES)
def test_shapes_and_counts_per_target(style: str) -> None:
    model = build_gpt(num_layers=3, **STYLES[style])
    adapter = inject(model, TiedLoraConfig(rank=3, layers=[0, 2]))
    assert {t: (s.in_features, s.out_features) for t, s in adapter.shapes.items()} == SHAPES[style]
    assert {t: s.num_blocks for t, s in adapter.shapes.items() if s.num_blocks != 1} == (
        {"linear_fc1": 2} if style == "llama" else {}
    )
    for target, shape in SHAPES[style].items():
        assert adapter.num_parameters()[target] == formula({target: shape}, 2, 3, FACTORS, ("A", "B"))
    assert sum(p.numel() for p in adapter.parameters()) == sum(adapter.num_parameters().values())


@pytest.mark.parametrize(
    ("preset", "count"), [("lora", 4_194_304), ("tl6", 524_544), ("tl5", 131_072), ("vera", 393_472)]
)
def test_full_llama2_7b_shapes_give_the_papers_counts(preset: str, count: int) -> None:
    """On the meta device, which stores no values: the base has 6.7 billion parameters."""
    config = TransformerConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        activation_func=functional.silu,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
    )
    with torch.device("meta"):
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=32000,
            max_sequence_length=4096,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    adapter = inject(model, TiedLoraConfig.preset(preset, rank=8, targets=["linear_qkv"]))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert adapter.num_parameters() == {"linear_qkv": count}
    assert sum(p.numel() for p in adapter.parameters()) == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    adapter.remove()
    adapter = inject(model, TiedLoraConfig.preset(preset, rank=8))
    assert (adapter.shapes["linear_fc1"].out_features, adapter.shapes["linear_fc2"].in_features) == (22016, 11008)
    assert sum(p.numel() for p in adapter.parameters()) == sum(adapter.num_parameters().values())


def test_tied_tensors_are_one_object_for_all_layers_and_listed_once() -> None:
    model = build_gpt(num_layers=3)
    adapter = inject(model, TiedLoraConfig(rank=3))
    for target in TARGETS:
        adapters = [linear.module.tied_lora for linear in adapter.chunks[0].linears if linear.name == target]
        assert len(adapters) == 3
        for factor in "AB":
            assert len({id(each.factor(factor)) for each in adapters}) == 1
            assert len({each.factor(factor).data_ptr() for each in adapters}) == 1
        for factor in "uv":
            assert len({each.factor(factor).data_ptr() for each in adapters}) == 3
        pair = [adapters[0].factor(factor) for factor in "AB"]
        assert pair[0] is stored(adapter)[f"{target}.A"]
        assert pair[1] is stored(adapter)[f"{target}.B"]
    storages = [p.untyped_storage().data_ptr() for p in stored(adapter).values()]
    assert len(set(storages)) == len(storages)  # targets share nothing, and neither do the u and v of layers
    listed = [id(p) for p in adapter.parameters()]
    assert len(listed) == len(set(listed)) == 4 * (2 + 2 * 3)
    in_model = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(in_model) == sorted(listed)


def test_chunks_hold_tied_tensors_of_their_own_with_the_same_bits() -> None:
    """megatron-core's DDP points `main_grad` into a buffer per chunk, so one parameter cannot serve two chunks."""
    chunks = [build_gpt(num_layers=2), build_gpt(num_layers=2)]
    for layer in chunks[1].decoder.layers:
        layer.layer_number += 2
    for chunk in chunks:
        chunk.config.num_layers = 4
    adapter = inject(chunks, TiedLoraConfig(rank=3, init_A="normal"))
    first, second = (dict(chunk.factors.named_parameters()) for chunk in adapter.chunks)
    for target, factor in itertools.product(TARGETS, "AB"):
        name = f"{target}.{factor}"
        assert torch.equal(first[name], second[name])
        assert first[name] is not second[name]
        assert first[name].data_ptr() != second[name].data_ptr()
        assert [p[name].shared for p in (first, second)] == [False, True]
    assert {name.split(".")[1] for name in second if name.startswith("layers.")} == {"2", "3"}
    assert [name for name, _ in adapter.named_parameters()].count("linear_qkv.A") == 2
    assert adapter.num_parameters()["linear_qkv"] == 3 * 24 + 72 * 3 + 4 * (3 + 72)


def test_untied_tensors_differ_between_layers() -> None:
    adapter = inject(build_gpt(num_layers=2), TiedLoraConfig.preset("lora", rank=3))
    first, second = (stored(adapter)[f"layers.{layer}.linear_qkv.A"] for layer in (0, 1))
    assert first.data_ptr() != second.data_ptr()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_start_depends_on_the_configs_seed_alone(seed: int) -> None:
    config = TiedLoraConfig(rank=3, seed=seed)
    torch.manual_seed(1)
    first = values(inject(build_gpt(num_layers=2), config).chunks[0].factors)
    torch.manual_seed(2)
    second = values(inject(build_gpt(num_layers=2), config).chunks[0].factors)
    other = values(inject(build_gpt(num_layers=2), TiedLoraConfig(rank=3, seed=3)).chunks[0].factors)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["linear_qkv.A"], other["linear_qkv.A"])


def test_factors_take_the_bases_dtype() -> None:
    adapter = inject(build_gpt(num_layers=1, dtype=torch.bfloat16), TiedLoraConfig(rank=3))
    assert {p.dtype for p in stored(adapter).values()} == {torch.bfloat16}


class Wrapper(nn.Module):
    """Holds the model at `module`, like Megatron's Float16Module and DDP."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def test_a_wrapped_model_is_adapted_inside_its_wrappers() -> None:
    model = build_gpt(num_layers=1)
    adapter = inject(Wrapper(Wrapper(model)), TiedLoraConfig(rank=3))
    assert adapter.chunks[0].body is model
    assert isinstance(model.decoder.layers[0].mlp.linear_fc1, TiedLoraMixin)


@pytest.mark.parametrize(("given", "adapted"), [([1], {1}), ([2, 0, 2], {0, 2}), (None, {0, 1, 2})])
def test_layer_selection(given: list[int] | None, adapted: set[int]) -> None:
    model = build_gpt(num_layers=3)
    adapter = inject(model, TiedLoraConfig(rank=3, layers=given))
    found = {i for i, layer in enumerate(model.decoder.layers) if isinstance(layer.mlp.linear_fc1, TiedLoraMixin)}
    assert found == adapted
    assert {int(name.split(".")[1]) for name in stored(adapter) if name.startswith("layers.")} == adapted
    assert adapter.num_parameters()["linear_qkv"] == 3 * 24 + 72 * 3 + len(adapted) * (3 + 72)


@pytest.mark.parametrize(
    ("given", "adapted"),
    [
        (["linear_fc2"], ["linear_fc2"]),
        ("attention", ["linear_qkv", "linear_proj"]),
        (["mlp_fc1", "attention_qkv"], ["linear_qkv", "linear_fc1"]),
    ],
)
def test_target_selection(given: list[str] | str, adapted: list[str]) -> None:
    model = build_gpt(num_layers=1)
    adapter = inject(model, TiedLoraConfig(rank=3, targets=given))
    found = [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, TiedLoraMixin)]
    assert sorted(found) == sorted(adapted)
    assert list(adapter.num_parameters()) == adapted


@pytest.mark.parametrize("trained", [FACTORS, ("v", "u")], ids="".join)
def test_flags_that_megatron_reads(trained: tuple[str, ...]) -> None:
    """Sharded factors have their dim even at TP 1, for checkpoints; the stride is the number of blocks."""
    model = build_gpt(num_layers=2, **STYLES["llama"])
    adapter = inject(model, TiedLoraConfig(rank=3, trained=trained))
    assert model.config.has_cond_embedder is True
    sharded = {("linear_qkv", "B"): 0, ("linear_qkv", "v"): 0, ("linear_fc1", "B"): 0, ("linear_fc1", "v"): 0}
    sharded |= {("linear_proj", "A"): 1, ("linear_fc2", "A"): 1}
    for name, parameter in stored(adapter).items():
        *layer, target, factor = name.split(".")
        dim = sharded.get((target, factor))
        assert parameter.tensor_model_parallel is (dim is not None), name  # type: ignore[attr-defined]
        assert parameter.partition_dim == (-1 if dim is None else dim), name  # type: ignore[attr-defined]
        stride = 2 if target == "linear_fc1" and factor in "Bv" else 1
        assert parameter.partition_stride == stride, name  # type: ignore[attr-defined]
        assert parameter.sequence_parallel is False, name  # type: ignore[attr-defined]
        summed = not layer and factor in trained
        for flag in ("pipeline_parallel", "shared_embedding"):
            assert getattr(parameter, flag, False) is summed, (name, flag)
        assert getattr(parameter, "shared", False) is False, name  # the only stage's only chunk: counted
        assert getattr(parameter, "zero_out_wgrad", False) is (not layer), name


@pytest.mark.parametrize("trained", [FACTORS, ("v", "u"), ("A",)], ids="".join)
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "layer 1"])
def test_full_recompute_gives_the_same_gradients(trained: tuple[str, ...], layers: list[int] | None) -> None:
    """With a frozen base, the inputs of checkpointed layers require no gradient."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    results = []
    for options in ({}, recompute):
        model = build_gpt(num_layers=2, **options)
        adapter = inject(model, TiedLoraConfig(rank=3, trained=trained, layers=layers))
        randomise(adapter)
        loss_of(model.train()).backward()
        results.append({name: p.grad for name, p in adapter.named_parameters()})
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient is not None
        assert recomputed[name] is not None, name
        # A layer whose input needs a gradient takes another path, which sums in another order.
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-9, atol=1e-13)


def test_recompute_really_recomputes() -> None:
    """Negative control of the test above: without recomputation it would compare nothing."""
    model = build_gpt(num_layers=2, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    inject(model, TiedLoraConfig(rank=3))
    calls: list[int] = []
    model.decoder.layers[0].mlp.linear_fc1.register_forward_hook(lambda *_: calls.append(1))
    loss_of(model.train()).backward()
    assert len(calls) == 2


def test_adapted_linears_keep_their_kind() -> None:
    model = build_gpt(num_layers=1)
    inject(model, TiedLoraConfig(rank=3))
    layer = model.decoder.layers[0]
    assert [linear_kind(m) for m in (layer.self_attention.linear_qkv, layer.mlp.linear_fc2)] == ["column", "row"]
