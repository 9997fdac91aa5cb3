# SPDX-License-Identifier: Apache-2.0
"""One process, then two ranks (one start), a tiny real GPT: what `quantize_base` changes, keeps and refuses."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from nemo_tied_lora import ConfigError, TiedLoraConfig, base_precision, inject, quantize_base
from nemo_tied_lora.adapter.quantized import kernels
from nemo_tied_lora.adapter.quantized import quantize_base as quantizing
from nemo_tied_lora.adapter.quantized.quantized_weight import QuantizedWeight
from tests.adapter.test_inject import logits, randomise
from tests.harness.dequantized import make_plain, quantized_weights
from tests.harness.ranks import run_ranks, single_process
from tests.harness.relayout import relayout
from tests.harness.tiny_gpt import build_gpt

MODEL: dict[str, Any] = {"num_layers": 2, "hidden": 64, "ffn": 128, "dtype": torch.bfloat16}
MIXTURE = {"num_moe_experts": 4, "moe_layer_freq": [0, 1], "moe_shared_expert_intermediate_size": 64, "llama": True}
CONFIG = TiedLoraConfig.preset("tl6", rank=3)


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def model(**options: Any) -> Any:
    return build_gpt(**{**MODEL, **options})


def test_the_four_linears_of_each_layer_are_quantised_and_nothing_else() -> None:
    gpt = model()
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    report = quantize_base(gpt)
    quantised = {name: weight for name, _, weight in quantized_weights(gpt)}
    linears = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    assert set(quantised) == {f"decoder.layers.{layer}.{name}.weight" for layer in (0, 1) for name in linears}
    assert set(report.linears) == {f"layers.{n}.{name.partition('.')[2]}" for n in (0, 1) for name in linears}
    for name, parameter in gpt.named_parameters():
        if name in quantised:
            error = (quantised[name].dequantize().float() - before[name].float()).norm() / before[name].float().norm()
            assert 0.05 < error < 0.15, name
        else:
            assert type(parameter) is nn.Parameter
            assert torch.equal(parameter, before[name]), name
    assert report.num_weights == sum(before[name].numel() for name in quantised) == 2 * 64 * (3 * 64 + 64 + 2 * 128)
    assert report.bytes_before == 2 * report.num_weights
    assert report.bytes_after == sum(weight.bytes_held for weight in quantised.values())
    assert report.bits_per_weight == 4.25
    assert str(report) == (
        "nf4/64: 8 linears of the decoder (2 linear_proj, 2 linear_qkv, 2 linear_fc1, 2 linear_fc2), 0.1 MB in bfloat16 -> "
        "0.0 MB, 4.25 bits a weight"
    )


def test_experts_and_shared_experts_are_quantised_and_the_router_is_not() -> None:
    gpt = model(**MIXTURE)
    report = quantize_base(gpt)
    assert {f"layers.1.experts.{e}.linear_fc{n}" for e in range(4) for n in (1, 2)} < set(report.linears)
    assert {"layers.1.shared_experts.linear_fc1", "layers.0.linear_fc2"} < set(report.linears)
    assert type(gpt.decoder.layers[1].mlp.router.weight) is nn.Parameter
    assert len(list(quantized_weights(gpt))) == len(report.linears) == 4 + 2 + 8 + 2


def test_a_parameter_keeps_what_megatron_has_set_on_it() -> None:
    gpt = model()
    before = {name: dict(vars(p)) for name, p in gpt.named_parameters()}
    quantize_base(gpt)
    for name, _, weight in quantized_weights(gpt):
        assert before[name].items() <= vars(weight).items()
        assert {"tensor_model_parallel", "partition_dim"} <= before[name].keys()


def test_each_old_weight_is_freed_before_the_next_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = model()
    old = [weakref.ref(layer.mlp.linear_fc1.weight) for layer in gpt.decoder.layers]
    alive = []

    def quantize(*args: Any, **options: Any) -> Any:
        alive.append([weight() is not None for weight in old])
        return kernels.quantize(*args, **options)

    gc.disable()
    try:
        monkeypatch.setattr(quantizing, "quantize", quantize)
        quantize_base(gpt)
    finally:
        gc.enable()
    assert (
        alive[:4] == [[True, True]] * 4
    )  # the first call tries the kernels out, the fourth quantises the first of them
    assert alive[4:8] == [[False, True]] * 4
    assert alive[8] == [False, False]
    assert [weight() for weight in old] == [None, None]


@pytest.mark.parametrize("options", [{}, {"double": True}, {"kind": "int8"}, {"block_size": 32}], ids=str)
def test_training_has_the_bits_of_the_dequantised_base(options: dict[str, Any]) -> None:
    runs = []
    for plain in (False, True):
        gpt = model()
        quantize_base(gpt, **options)
        if plain:
            make_plain(gpt)
        runs.append(trained(gpt))
    (outputs, gradients), (expected, wanted) = runs
    assert torch.equal(outputs, expected)
    assert gradients.keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())
    assert not torch.equal(outputs, trained(model())[0])  # the unquantised base gives others


def test_backward_keeps_no_tensor_of_a_weights_size() -> None:
    gpt = model(hidden=256, ffn=256)
    quantize_base(gpt)
    smallest = min(weight.nbytes for _, _, weight in quantized_weights(gpt))
    assert max(kept_bytes(gpt)) < smallest == 2 * 256 * 256
    make_plain(gpt)
    assert max(kept_bytes(gpt)) == 2 * 256 * 3 * 256  # control: the plain weight of linear_qkv


def test_the_precision_is_the_dtype_or_what_the_base_was_quantised_to() -> None:
    options: dict[str, dict[str, Any]] = {
        "nf4/64": {},
        "nf4/32": {"block_size": 32},
        "nf4/64 double": {"double": True},
        "nf4/64 float32": {"statistics": "float32"},
        "int8/row": {"kind": "int8"},
    }
    assert base_precision(model()) == "bfloat16"
    for precision, chosen in options.items():
        gpt = model()
        outer = nn.Module()
        outer.module = gpt
        assert quantize_base([outer], **chosen).precision == precision
        assert base_precision(outer) == base_precision([gpt]) == precision
        inject(gpt, CONFIG)
        assert base_precision(gpt) == precision


def test_removing_the_adapter_leaves_the_quantised_base() -> None:
    gpt = model()
    quantize_base(gpt)
    output = logits(gpt)
    adapter = inject(gpt, CONFIG)
    randomise(adapter)
    assert not torch.equal(logits(gpt), output)
    adapter.remove()
    assert torch.equal(logits(gpt), output)


def test_merge_is_refused_and_changes_nothing() -> None:
    gpt = model()
    quantize_base(gpt)
    adapter = inject(gpt, CONFIG)
    randomise(adapter)
    output = logits(gpt)
    with pytest.raises(
        ConfigError, match=r"^merge: the base is quantised \(nf4/64\).* use tied-lora merge on its file"
    ):
        adapter.merge()
    assert torch.equal(logits(gpt), output)
    adapter.reduce_gradients()  # which a merged adapter refuses


def transformer_engine(gpt: Any) -> None:
    linear = gpt.decoder.layers[0].self_attention.linear_qkv
    linear.__class__ = type("TELayerNormColumnParallelLinear", (nn.Module,), {})
    linear.parallel_mode = "column"


def grouped(gpt: Any) -> None:
    gpt.decoder.layers[1].mlp.experts = nn.Module()


def same_memory(gpt: Any) -> None:
    first, second = gpt.decoder.layers
    second.mlp.linear_fc1.weight = first.mlp.linear_fc1.weight


def trains(gpt: Any) -> None:
    weight = gpt.decoder.layers[1].mlp.linear_fc2.weight
    weight.grad = torch.zeros_like(weight)


def not_a_number(gpt: Any) -> None:
    gpt.decoder.layers[0].mlp.linear_fc2.weight.data[0, 3] = float("nan")


def compiled_in_place(gpt: Any) -> None:
    gpt.decoder.layers[0].compile()


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "Transformer Engine": (
        transformer_engine,
        "layer 0 self_attention.linear_qkv: Transformer Engine's TELayerNormColumnParallelLinear cannot hold codes; build "
        "the layers with megatron-core's ColumnParallelLinear and RowParallelLinear",
    ),
    "grouped experts": (
        grouped,
        "moe_grouped_gemm=True: layer 1 mlp.experts: a Module multiplies all experts at once, .* with moe_grouped_gemm=False",
    ),
    "a shared weight": (
        same_memory,
        r"decoder.layers.0.mlp.linear_fc1.weight and decoder.layers.1.mlp.linear_fc1.weight share memory; give each",
    ),
    "a base that is trained": (trains, "layer 1 mlp.linear_fc2: its weight has a gradient, .* that is not trained"),
    "NaN": (not_a_number, "layer 0 mlp.linear_fc2: its weight holds NaN or infinity; repair the base's file"),
    "another linear": (
        lambda gpt: setattr(gpt.decoder.layers[0].mlp, "linear_fc1", nn.Linear(64, 128)),
        "layer 0 mlp.linear_fc1: Linear cannot hold codes",
    ),
    "meta weights": (
        lambda gpt: gpt.to("meta"),
        "layer 0 .*: has a weight on meta .*; load the base's weights before",
    ),
    "torch.compile": (compiled_in_place, "torch.compile: the model is compiled, .* pass the model itself"),
    "CUDA graphs": (
        lambda gpt: setattr(gpt.config, "enable_cuda_graph", True),
        "enable_cuda_graph=True: a CUDA graph keeps the memory of every dequantised weight; set it to False",
    ),
    "CUDA graphs of newer releases": (
        lambda gpt: setattr(gpt.config, "cuda_graph_impl", "local"),
        "cuda_graph_impl='local': .* set it to 'none'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_quantised_is_refused_by_name_and_nothing_is_changed(case: str) -> None:
    gpt = model(**(MIXTURE if case == "grouped experts" else {}))
    change, message = REFUSED[case]
    change(gpt)
    refused(gpt, message)


def test_a_model_in_a_wrapper_that_sums_or_shards_is_refused() -> None:
    gpt = model()
    sharded = type("FullyShardedDataParallel", (nn.Module,), {})()
    sharded.module = gpt
    refused(
        sharded, "model: is wrapped in FullyShardedDataParallel, which cannot split or gather codes; use tensor and"
    )
    refused(torch.compile(gpt), "torch.compile: the model is compiled")
    wrapped = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)
    refused(wrapped, "is wrapped in DistributedDataParallel already; quantise first, then inject, then wrap it")
    refused(gpt, "layer 0 self_attention.linear_.*: its weight has a gradient")  # DDP's main_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fp4"}, "^kind='fp4': unknown; choose one of nf4, int8$"),
        ({"block_size": 48}, "^block_size=48: unknown; choose one of 32, 64, 128"),
        ({"double": 3}, "^double=3: must be true or false$"),
        ({"kind": "int8", "double": True}, "^double=True with kind='int8': only nf4 has it; leave it out$"),
        ({"statistics": "float16"}, "^statistics='float16': unknown; choose one of bfloat16, float32$"),
        ({"statistics": "float32", "double": True}, "double quantises the statistics; choose one of them$"),
        (
            {"block_size": 128},
            r"^linear_proj: its 64 in-features on a rank \(tensor_model_parallel_size=1\) are not a multiple of "
            "block_size=128, so a block would cross rows or ranks; choose another block_size or tensor_model_parallel_size",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    refused(model(), message, **options)


def test_several_problems_are_reported_together() -> None:
    gpt = model(hidden=48)
    transformer_engine(gpt)
    gpt.config.enable_cuda_graph = True
    with pytest.raises(ConfigError) as error:
        quantize_base(gpt)
    found = [re.split(r"[:=]", problem)[0] for problem in error.value.problems]
    assert found == [
        "enable_cuda_graph",
        "layer 0 self_attention.linear_qkv",
        "linear_fc1",
        "linear_proj",
        "linear_qkv",
    ]


def test_an_adapted_or_quantised_model_is_refused() -> None:
    gpt = model()
    adapter = inject(gpt, CONFIG)
    with pytest.raises(
        RuntimeError, match=r"it has an adapter; call quantize_base before inject, or adapter\.remove\(\)"
    ):
        quantize_base(gpt)
    adapter.remove()
    quantize_base(gpt)
    with pytest.raises(RuntimeError, match="its base is nf4/64 already; load the base again"):
        quantize_base(gpt, "int8")


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: a Sequential has no Megatron linears"):
        quantize_base(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ConfigError, match="model: an empty list"):
        quantize_base([])
    gpt = model(without={0: "mlp", 1: "mlp"})
    gpt.decoder.layers[0].self_attention = gpt.decoder.layers[1].self_attention = nn.Identity()
    refused(gpt, "model: its decoder has no linear_qkv, linear_proj, linear_fc1 or linear_fc2 to quantise")


def test_a_failure_in_the_middle_says_that_the_base_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def quantize(*args: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError("no room")
        return kernels.quantize(*args, **options)

    monkeypatch.setattr(quantizing, "quantize", quantize)
    text = r"layers.0.linear_fc1: MemoryError: no room; a part of the base is quantised: load it again"
    with pytest.raises(RuntimeError, match=text):
        quantize_base(model())


def test_kernels_that_compute_nonsense_are_noticed_before_anything_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "dequantize", lambda codes: -kernels.dequantize(codes))
    gpt = model()
    with pytest.raises(RuntimeError, match="kind=nf4: the kernels compute wrong values on this cpu"):
        quantize_base(gpt)
    assert not list(quantized_weights(gpt))


# Two ranks


def outcome(prepare: Callable[[Any], Any] = lambda gpt: None, **options: Any) -> tuple[str, bool]:
    """On a rank: what `quantize_base` raises for a model, and whether the model is unchanged."""
    gpt = model(hidden=128)
    prepare(gpt)
    before = dict(gpt.named_parameters())
    try:
        quantize_base(gpt, **options)
        text = "nothing"
    except (ConfigError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    return text, all(parameter is before[name] for name, parameter in gpt.named_parameters())


def on_a_rank() -> dict[str, Any]:
    """With a problem on rank 1 alone, except the first and the last."""
    second = torch.distributed.get_rank() == 1

    def alone(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return prepare if second else lambda gpt: None

    results: dict[str, Any] = {
        "blocks": outcome(block_size=128),
        "NaN": outcome(alone(not_a_number)),
        "options": outcome(block_size=32 if second else 64),
        "adapter": outcome(alone(lambda gpt: setattr(gpt.decoder, "tied_lora", nn.Module()))),
    }
    with pytest.MonkeyPatch.context() as patch:
        if second:
            patch.setattr(quantizing, "_quantized", lambda *_: 1 / 0)
        results["middle"] = outcome()
    results["none"] = outcome()
    relayout(pp=2)
    gpt = model(pipeline_model_parallel_layout="Ett|L")
    report = quantize_base(gpt)
    results["stages"] = (report.precision, base_precision(gpt), len(report.linears))
    return results


def test_what_is_wrong_on_one_rank_raises_on_both_and_changes_neither() -> None:
    first, second = run_ranks(on_a_rank, world_size=2, tp=2)
    blocks = (
        "ConfigError: linear_fc2: its 64 in-features on a rank (tensor_model_parallel_size=2) are not a multiple of "
    )
    nan = "ConfigError: layer 0 mlp.linear_fc2: its weight holds NaN or infinity; repair the base's file"
    options = "ConfigError: quantize_base: rank 1 has other options than rank 0; pass the same ones on all ranks"
    adapter = "RuntimeError: model: it has an adapter; call quantize_base before inject, or adapter.remove() first"
    for rank in (first, second):
        assert all(unchanged for text, unchanged in (rank[name] for name in ("blocks", "NaN", "options", "adapter")))
        assert rank["blocks"][0].startswith(blocks)
        assert (rank["NaN"][0], rank["options"][0]) == (nan, options)
        assert rank["none"] == ("nothing", False)
    assert second["adapter"][0] == adapter
    assert first["adapter"][0] == (
        f"RuntimeError: quantize_base: rank 1 failed, so nothing was changed on any rank: {adapter}"
    )
    broken = (
        "layers.0.linear_proj: ZeroDivisionError: division by zero; a part of the base is quantised: load it again"
    )
    assert second["middle"][0] == f"RuntimeError: {broken}"
    assert first["middle"][0] == f"RuntimeError: quantize_base: another rank failed: {broken}"
    # A stage without layers has the same precision.
    assert (first["stages"], second["stages"]) == (("nf4/64", "nf4/64", 8), ("nf4/64", "nf4/64", 0))


def refused(gpt: nn.Module, message: str, **options: Any) -> None:
    """Checks that `quantize_base` raises a ConfigError with a problem that matches, and changes no parameter."""
    before = dict(gpt.named_parameters())
    with pytest.raises(ConfigError) as error:
        quantize_base(gpt, **options)
    assert [problem for problem in error.value.problems if re.search(message, problem)], error.value.problems
    assert all(parameter is before[name] for name, parameter in gpt.named_parameters())
    assert base_precision(gpt) == "bfloat16"


def trained(gpt: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits, and the adapter's gradients."""
    adapter = inject(gpt, CONFIG)
    randomise(adapter)
    output = logits(gpt)
    output.float().square().mean().backward()
    gradients = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(gradients) == len(list(adapter.parameters()))
    return output.detach(), gradients


def kept_bytes(gpt: Any) -> list[int]:
    """The bytes of each tensor that autograd keeps for the backward pass of an adapted model."""
    adapter = inject(gpt, CONFIG)
    embedding = set(gpt.embedding.parameters()) | set(gpt.output_layer.parameters())
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in embedding:
            kept.append(tensor.bytes_held if isinstance(tensor, QuantizedWeight) else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits(gpt)
    adapter.remove()
    return kept
