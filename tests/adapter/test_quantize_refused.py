# SPDX-License-Identifier: Apache-2.0
"""One process, then two ranks (one start), a tiny real GPT: what `quantize_base` refuses, and how it fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from nemo_tied_lora import ConfigError, base_precision, inject, quantize_base
from nemo_tied_lora.adapter.quantized import kernels
from nemo_tied_lora.adapter.quantized import quantize_base as quantizing
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization
from tests.adapter.test_inject import logits, randomise
from tests.adapter.test_quantize_base import CONFIG, MIXTURE, model
from tests.harness.dequantized import quantized_weights
from tests.harness.ranks import run_ranks, single_process
from tests.harness.relayout import relayout


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


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
        "layer 1 mlp.experts: moe_grouped_gemm=True: a Module multiplies all experts at once, .* with moe_grouped_gemm=False",
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
    refused(
        gpt, "layer 0 self_attention.linear_.* and 7 others: its weight has a gradient", number=1
    )  # DDP's main_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fp4"}, "^kind='fp4': unknown; choose one of nf4, int8$"),
        ({"block_size": 48}, "^block_size=48: unknown; choose one of 32, 64, 128"),
        ({"double": 1}, "^double=1: must be true or false$"),
        ({"statistics": "float16"}, "^statistics='float16': unknown; choose one of bfloat16, float32$"),
        (
            {"statistics": "float32", "double": True},
            "^statistics=float32: double=true quantises the statistics; leave",
        ),
        (
            {"device": "xyz"},
            "^device='xyz': torch has no such device; write 'cpu', 'cuda' or 'cuda:1', or leave it out",
        ),
        (
            {"device": "cuda:99"},
            r"^device='cuda:99': torch cannot use it on this machine \(.+\); leave it out, and the codes",
        ),
        ({"device": "meta"}, "^device='meta': it holds no numbers, so no codes either; leave it out"),
        (
            {"block_size": 128},
            r"^linear_proj: its 64 in-features on a rank \(tensor_model_parallel_size=1\) are not a multiple of "
            "block_size=128, so a block would cross rows or ranks; use block_size=32 or 64, or kind='int8'$",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    refused(model(), message, **options)


@pytest.mark.parametrize("options", [{"block_size": 128}, {"statistics": "float32"}, {"double": True}])
def test_int8_has_no_options_of_nf4_in_the_librarys_words_and_in_the_keys(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    line = f"{name}={value}: only nf4 has it; leave it out, or choose kind nf4"
    refused(model(), f"^{line}$", kind="int8", **options)
    with pytest.raises(ConfigError, match=rf"^model\.base_quantization\.{line}$"):
        BaseQuantization.from_setting({"kind": "int8", **options})


def test_options_and_device_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        quantize_base(model(), "int8", block_size=128, device="xyz")
    assert [problem.split("=")[0] for problem in error.value.problems] == ["block_size", "device"]


def test_loading_weights_over_codes_is_refused_in_one_line_and_loads_nothing() -> None:
    gpt, other = model(), model()
    for parameter in other.parameters():
        parameter.data += 1
    weights = other.state_dict()
    quantize_base(gpt)
    embedding = gpt.embedding.word_embeddings.weight.clone()
    with pytest.raises(RuntimeError) as error:
        gpt.load_state_dict(weights)
    assert str(error.value).count("\n") == 0
    assert (
        "load_state_dict: 8 of these weights are codes in this model, which cannot be written over (the first is"
        in str(error.value)
    )
    assert "decoder.layers.0.self_attention.linear_" in str(error.value)
    assert torch.equal(gpt.embedding.word_embeddings.weight, embedding)
    with pytest.raises(RuntimeError, match="8 of these weights are codes"):
        nn.Sequential(gpt).load_state_dict({f"0.{name}": weight for name, weight in weights.items()})
    name = "embedding.word_embeddings.weight"
    gpt.load_state_dict({name: weights[name]}, strict=False)
    assert torch.equal(gpt.embedding.word_embeddings.weight, weights[name])


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
    relayout()
    results["torch's DDP"] = in_torchs_ddp()
    relayout(pp=2)
    gpt = model(pipeline_model_parallel_layout="Ett|L")
    report = quantize_base(gpt)
    results["stages"] = (report.precision, base_precision(gpt), len(report.linears))
    return results


def in_torchs_ddp() -> dict[str, bool]:
    """A step of a quantised model in torch's DDP, with other tokens on each rank, and one in which it does not skip codes."""
    gpt = model(dtype=torch.float32)
    quantize_base(gpt)
    adapter = inject(gpt, CONFIG)
    randomise(adapter)
    results = []
    for wrapped in (gpt, torch.nn.parallel.DistributedDataParallel(gpt)):
        gpt.zero_grad()
        logits(wrapped, seed=torch.distributed.get_rank()).square().mean().backward()
        results.append([parameter.grad.clone() for parameter in adapter.parameters()])
    own, together = results
    for gradient in own:
        torch.distributed.all_reduce(gradient)
    pairs = list(zip(own, together, strict=True))
    del gpt._ddp_params_and_buffers_to_ignore
    with pytest.raises(NotImplementedError, match="not possible with a quantised weight"):
        torch.nn.parallel.DistributedDataParallel(gpt)
    return {
        "the mean of the ranks": all(torch.allclose(one / 2, mean, rtol=1e-4, atol=1e-7) for one, mean in pairs),
        "not the rank's own": any(not torch.allclose(one, mean, rtol=1e-2) for one, mean in pairs),
    }


def test_what_is_wrong_on_one_rank_raises_on_both_and_changes_neither() -> None:
    first, second = run_ranks(on_a_rank, world_size=2, tp=2)
    blocks = (
        "ConfigError: linear_fc2: its 64 in-features on a rank (tensor_model_parallel_size=2) are not a multiple of "
    )
    nan = "ConfigError: layer 0 mlp.linear_fc2: its weight holds NaN or infinity; repair the base's file"
    options = "ConfigError: quantize_base: rank 1 has other options than rank 0; pass the same ones on all ranks"
    fits = "so a block would cross rows or ranks; use block_size=32 or 64, or tensor_model_parallel_size=1, or kind='int8'"
    adapter = "RuntimeError: model: it has an adapter; call quantize_base before inject, or adapter.remove() first"
    for rank in (first, second):
        assert all(unchanged for text, unchanged in (rank[name] for name in ("blocks", "NaN", "options", "adapter")))
        assert rank["blocks"][0].startswith(blocks)
        assert rank["blocks"][0].endswith(fits)
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
    assert all(all(rank["torch's DDP"].values()) for rank in (first, second)), first
    # A stage without layers has the same precision.
    assert (first["stages"], second["stages"]) == (("nf4/64", "nf4/64", 8), ("nf4/64", "nf4/64", 0))


def refused(gpt: nn.Module, message: str, number: int | None = None, **options: Any) -> None:
    """Checks that `quantize_base` raises a ConfigError with a problem that matches, and changes no parameter.

    number: of all problems; None: any.
    """
    before = dict(gpt.named_parameters())
    with pytest.raises(ConfigError) as error:
        quantize_base(gpt, **options)
    assert [problem for problem in error.value.problems if re.search(message, problem)], error.value.problems
    assert number in (None, len(error.value.problems)), error.value.problems
    assert all(parameter is before[name] for name, parameter in gpt.named_parameters())
    assert base_precision(gpt) == "bfloat16"
