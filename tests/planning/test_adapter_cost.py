# SPDX-License-Identifier: Apache-2.0
"""The costs of an adapter, in bytes counted by hand. Pure maths, without torch."""

from __future__ import annotations

import dataclasses
import io
import math
import tarfile
from typing import Any

import numpy
import pytest
import yaml
from safetensors.numpy import save

from nemo_tied_lora.checkpoint.nemo_adapter_packing import largest_file
from nemo_tied_lora.config import FACTORS, PRESETS, TiedLoraConfig
from nemo_tied_lora.planning.adapter_cost import Precision, RankShare, plan, rank_share
from nemo_tied_lora.planning.architecture import selected_linears
from nemo_tied_lora.planning.parallel_layout import Layout
from tests.harness.small_architecture import small

O2 = Precision.from_names("bf16", True)

PARTIAL = {("column", "A"), ("column", "u"), ("row", "B"), ("row", "u"), ("row", "v")}


@pytest.mark.parametrize("tied", [(), ("A",), ("B",), ("A", "B")])
@pytest.mark.parametrize("name", PRESETS)
def test_a_ranks_share_is_the_sum_of_its_tensors(name: str, tied: tuple[str, ...]) -> None:
    """Compares with the shapes of the adapter's own tensors."""
    config = TiedLoraConfig.preset(name, rank=3, tied=tied, layers=[0, 1, 2])
    arch, layout = small(), Layout(tp_size=2, pp_size=2, devices=4)
    expected = dict.fromkeys(("held", "trained", "tied", "partial"), 0)
    for target, shape in selected_linears(arch, config).items():
        kind = "column" if target in ("linear_qkv", "linear_fc1") else "row"
        for factor in FACTORS:
            if factor in "uv" and factor not in config.trained:
                continue
            numel = math.prod(shape.local_factor_shape(factor, 3, 2))
            copies = 1 if factor in tied else 2  # the first stage has layers 0 and 1, the second only 2
            trained = factor in config.trained
            expected["held"] += copies * numel
            expected["trained"] += copies * numel * trained
            expected["tied"] += numel * (trained and factor in tied)
            expected["partial"] += copies * numel * (trained and (kind, factor) in PARTIAL)
    assert rank_share(arch, layout, config) == RankShare(**expected)


# architecture.md: under sequence parallelism these gradients are partial over the sequence.


def test_bytes_of_a_small_case_by_hand() -> None:
    config = TiedLoraConfig(rank=3, targets=("linear_qkv", "linear_fc2"))
    layout = Layout(tp_size=2, pp_size=2, devices=8, sequence_parallel=True, micro_batch_size=2, global_batch_size=8)
    result = plan(small(), layout, config, O2)
    # qkv is 20 -> 48, fc2 is 44 -> 20. TP 2, PP 2, DP 2, two layers on each stage.
    tied = (3 * 20 + 48 // 2 * 3) + (3 * 44 // 2 + 20 * 3)
    per_layer = (3 + 48 // 2) + (3 + 20)
    local = tied + 2 * per_layer
    numbers = result["numbers"]
    assert result["trained_parameters"] == (3 * 20 + 48 * 3) + (3 * 44 + 20 * 3) + 4 * ((3 + 48) + (3 + 20))
    assert numbers["trained_parameters_per_rank"] == local
    assert numbers["weight_bytes_per_rank"] == 2 * local
    assert numbers["gradient_bytes_per_rank"] == 4 * local
    assert numbers["optimizer_bytes_per_rank"] == 12 * local
    assert numbers["bytes_per_rank"] == 18 * local
    # In a ring of two, each rank sends as many bytes as are summed.
    assert result["reduced_bytes_per_step"] == numbers["reduced_bytes_per_step"] == 4 * tied
    assert numbers["data_parallel_bytes_per_step"] == 4 * local
    partial = 3 * 20 + 2 * 3 + (20 * 3 + 2 * (3 + 20))
    assert numbers["sequence_parallel_bytes_per_step"] == 4 * partial
    # Two targets of two layers, 2 sequences of 16 tokens, 3 wide, 2 bytes.
    assert numbers["activation_bytes_per_microbatch"] == 2 * 2 * (2 * 16) * 3 * 2
    halved = plan(small(), dataclasses.replace(layout, cp_size=2), config, O2)["numbers"]
    assert halved["activation_bytes_per_microbatch"] == 2 * 2 * 16 * 3 * 2
    assert halved["data_parallel_bytes_per_step"] == 4 * local, "context-parallel ranks hold the same parameters"
    lora = result["lora_numbers"]
    lora_local = 2 * tied
    assert (lora["trained_parameters_per_rank"], lora["reduced_bytes_per_step"]) == (lora_local, 0)
    assert result["share_of_lora"]["reduced_bytes_per_step"] is None
    assert result["share_of_lora"]["bytes_per_rank"] == local / lora_local
    assert result["percent_of_base"] == 100 * result["trained_parameters"] / small().num_parameters


def test_rings_of_more_ranks_and_no_ring_of_one() -> None:
    config = TiedLoraConfig(rank=4, targets=("linear_qkv",))
    tied_bytes = 4 * (4 * 20 + 48 * 4)
    for pp_size, expected in ((1, 0), (2, tied_bytes), (4, tied_bytes * 3 // 2)):
        result = plan(small(), Layout(pp_size=pp_size, devices=pp_size), config, O2)
        assert result["reduced_bytes_per_step"] == expected
        assert result["numbers"]["activation_bytes_per_microbatch"] == 0
        assert result["numbers"]["sequence_parallel_bytes_per_step"] == 0


def test_frozen_tied_factors_are_held_and_never_summed() -> None:
    config = TiedLoraConfig.preset("vera", rank=4, targets=["linear_qkv"])
    result = plan(small(), Layout(pp_size=2, devices=2), config, O2)
    held = 4 * 20 + 48 * 4 + 2 * (4 + 48)
    assert result["reduced_bytes_per_step"] == 0
    assert result["numbers"]["weight_bytes_per_rank"] == 2 * held
    assert result["numbers"]["gradient_bytes_per_rank"] == 4 * 2 * (4 + 48)


def test_each_chunk_holds_its_own_tied_tensors_and_a_stage_sums_once() -> None:
    config = TiedLoraConfig.preset("tl5", rank=4, targets=["linear_qkv"])
    layout = Layout(pp_size=2, devices=2)
    plain = plan(small(), layout, config, O2)
    chunks = plan(small(), dataclasses.replace(layout, virtual_pp_size=2), config, O2)
    assert chunks["numbers"]["bytes_per_rank"] == 2 * plain["numbers"]["bytes_per_rank"]
    assert chunks["reduced_bytes_per_step"] == plain["reduced_bytes_per_step"] > 0


def test_a_float32_adapter_has_float32_weights_and_no_copy_of_them() -> None:
    """4 bytes each for weight and gradient and 8 for the moments: 16, where O2's bfloat16 adapter has 2 + 4 + 4 + 8."""
    layout, config = Layout(tp_size=2, devices=2), TiedLoraConfig(rank=2)
    plain = plan(small(), layout, config, O2)["numbers"]
    float32 = plan(small(), layout, dataclasses.replace(config, dtype="float32"), O2)["numbers"]
    trained = plain["trained_parameters_per_rank"]
    assert (plain["bytes_per_rank"], float32["bytes_per_rank"]) == (18 * trained, 16 * trained)
    assert float32["activation_bytes_per_microbatch"] == 2 * plain["activation_bytes_per_microbatch"]
    assert float32["file_bytes"] > plain["file_bytes"]
    one = Precision.from_names("bf16", False)
    assert one.of_adapter(dataclasses.replace(config, dtype="float32")) == one


@pytest.mark.parametrize(
    ("precision", "amp_O2", "per_parameter"),
    [("bf16", True, 2 + 4 + 12), ("16-mixed", True, 18), ("bf16-mixed", False, 4 + 4 + 8), (32, False, 16)],
)
def test_precisions_are_nemos(precision: object, amp_O2: bool, per_parameter: int) -> None:
    config = TiedLoraConfig.preset("tl5", rank=4)
    numbers = plan(small(), Layout(), config, Precision.from_names(precision, amp_O2))["numbers"]
    assert numbers["bytes_per_rank"] == per_parameter * numbers["trained_parameters"]


@pytest.mark.parametrize("dtype", [numpy.float16, numpy.float32])
@pytest.mark.parametrize(
    "config",
    [
        TiedLoraConfig(rank=3),
        TiedLoraConfig.preset("lora", rank=2, targets=["mlp"]),
        TiedLoraConfig.preset("vera", rank=20),
        TiedLoraConfig(rank=1, targets=("linear_proj",), layers=(9, 10, 11), tied=("A",), trained=("u", "B")),
    ],
)
def test_the_file_is_at_most_64_kib_smaller_than_planned(config: TiedLoraConfig, dtype: Any) -> None:
    """Compares with a file in the adapter's format: a tar with the YAML and the safetensors."""
    arch = small(num_layers=120)
    shapes = selected_linears(arch, config)
    layers = config.layers or range(120)
    state = {}
    for target, shape in shapes.items():
        sides = {"A": (config.rank, shape.in_features), "B": (shape.out_features, config.rank)}
        for factor, side in {**sides, "u": (config.rank,), "v": (shape.out_features,)}.items():
            if factor in "AB" or factor in config.trained:
                lead = () if factor in config.tied else (len(layers),)
                state[f"{target}.{factor}"] = numpy.zeros((*lead, *side), dtype)
    description = {"targets": {target: {"layers": list(layers)} for target in shapes}, "peft": config.as_dict()}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (("model_config.yaml", yaml.safe_dump(description).encode()), ("x", save(state))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    actual = len(file.getvalue())
    assert actual <= largest_file(config, shapes, dtype().itemsize) <= actual + 64 * 1024
