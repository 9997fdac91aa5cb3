# SPDX-License-Identifier: Apache-2.0
"""One process, then four ranks (one start): a bit that differs on one rank is named on all of them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from nemo_tied_lora import TiedLoraConfig, inject, save_adapter
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.replica_check import TieError, check_ties, checksums
from tests.harness.ranks import run_ranks, single_process
from tests.harness.tiny_gpt import build_gpt, full_tensor

# Layout to its sizes on four ranks; the rest is data parallel.
LAYOUTS = {
    "tp2 pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "pp2 dp2": {"pipeline_model_parallel_size": 2},
    "tp2 cp2": {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
}
# (layout, configuration, tensor, rank that gets another bit): the ranks that hold the tensor, as in the message.
PLANTED = {
    "tied over the pipeline and tensor parallel": ("tp2 pp2", "tl6", "linear_qkv.A", 3, (0, 1, 2)),
    "tied and sharded": ("tp2 pp2", "tl6", "linear_qkv.B", 3, (1,)),
    "tied, row": ("tp2 pp2", "tl6", "linear_fc2.B", 2, (0, 1, 3)),
    "frozen and tied": ("tp2 pp2", "vera", "linear_fc1.A", 0, (1, 2, 3)),
    "frozen, tied and sharded": ("tp2 pp2", "vera", "linear_proj.A", 0, (2,)),
    "u, replicated over tensor parallel": ("tp2 pp2", "tl6", "layers.3.linear_qkv.u", 3, (2,)),
    "v of a row, replicated over tensor parallel": ("tp2 pp2", "tl6", "layers.0.linear_fc2.v", 1, (0,)),
    "untied A": ("tp2 pp2", "lora", "layers.1.linear_qkv.A", 1, (0,)),
    "v over data parallel": ("pp2 dp2", "tl6", "layers.0.linear_qkv.v", 1, (0,)),
    "tied over data parallel": ("pp2 dp2", "tl6", "linear_proj.A", 2, (0, 1, 3)),
    "frozen over data parallel": ("pp2 dp2", "vera", "linear_proj.B", 3, (0, 1, 2)),
    "v of a column over context parallel": ("tp2 cp2", "tl6", "layers.2.linear_fc1.v", 3, (1,)),
    "u over context and tensor parallel": ("tp2 cp2", "tl6", "layers.2.linear_fc1.u", 2, (0, 1, 3)),
}


def build(preset: str, dtype: torch.dtype = torch.float32) -> Adapter:
    adapter = inject(build_gpt(dtype=dtype), TiedLoraConfig.preset(preset, rank=3))
    shapes = expected_shapes(adapter.config, adapter.shapes)
    adapter.load_full_state({name: full_tensor(f"start {name}", shape) for name, shape in shapes.items()})
    return adapter


def flip_lowest_bit(adapter: Adapter, name: str) -> None:
    """Flips the lowest bit of the last element, in every chunk that holds the tensor."""
    for chunk in adapter.chunks:
        words = chunk.factors.get_parameter(name).data.view(-1).view(torch.int32)
        words[-1] ^= 1


def refusal(adapter: Adapter, folder: str | None = None) -> tuple[str, list[tuple]] | None:
    """The guard's message; None if it finds no difference."""
    try:
        if folder is None:
            check_ties(adapter, "after step 7: ")
        else:
            save_adapter(adapter, Path(folder) / "adapter.nemo")
    except TieError as error:
        return str(error), [(d.name, d.shard, list(d.ranks.values())) for d in error.differences]
    return None


def on_each_layout(folder: str) -> dict[str, Any]:
    """On a rank: every planted difference, healthy runs, and a save over a good file."""
    outcome: dict[str, Any] = {}
    for layout, sizes in LAYOUTS.items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**sizes)
        adapters = {preset: build(preset) for preset in ("tl6", "vera", "lora")}
        for preset, adapter in adapters.items():
            outcome[f"healthy {layout} {preset}"] = refusal(adapter)
        for case, (where, preset, name, rank, _) in PLANTED.items():
            if where == layout:
                outcome[case] = _planted(adapters[preset], name, rank)
        outcome[f"restored {layout}"] = refusal(adapters["tl6"])
    outcome["saved"] = refusal(adapters["tl6"], folder)
    good = (Path(folder) / "adapter.nemo").read_bytes()
    planted_on = torch.distributed.get_rank() == 1
    if planted_on:
        flip_lowest_bit(adapters["tl6"], "linear_fc1.A")
    outcome["saved over it"] = refusal(adapters["tl6"], folder)
    outcome["good file kept"] = (Path(folder) / "adapter.nemo").read_bytes() == good
    return outcome


def _planted(adapter: Adapter, name: str, rank: int) -> Any:
    is_changed = torch.distributed.get_rank() == rank
    if is_changed:
        flip_lowest_bit(adapter, name)
    message = refusal(adapter)
    if is_changed:
        flip_lowest_bit(adapter, name)
    return message


@functools.cache
def outcomes() -> list[dict[str, Any]] | AssertionError:
    """The results of each rank. The ranks are started once, even if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ranks = run_ranks(on_each_layout, folder, world_size=4)
        except AssertionError as failure:
            return failure
        ranks[0]["files"] = sorted(path.name for path in Path(folder).iterdir())
        return ranks


def on_all_ranks(case: str) -> list[Any]:
    result = outcomes()
    if isinstance(result, AssertionError):
        raise result
    return [rank[case] for rank in result]


@pytest.mark.parametrize("case", PLANTED)
def test_one_different_bit_stops_every_rank_and_names_tensor_and_ranks(case: str) -> None:
    _, _, name, rank, others = PLANTED[case]
    results = on_all_ranks(case)
    assert all(result == results[0] for result in results)
    message, differences = results[0]
    assert [(n, set(ranks)) for n, _, ranks in differences] == [(name, {others, (rank,)})]
    assert message.startswith("tie guard: after step 7: 1 tensor(s) differ")
    line = next(line for line in message.splitlines() if name in line)
    values = line.split("checksum ")[1].split("; ")
    assert len({value.split()[0] for value in values}) == 2
    assert f"on rank {rank}" in " ".join(values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_healthy_replicas_pass(layout: str) -> None:
    for preset in ("tl6", "vera", "lora"):
        assert on_all_ranks(f"healthy {layout} {preset}") == [None] * 4
    assert on_all_ranks(f"restored {layout}") == [None] * 4


def test_nothing_is_saved_over_a_good_file() -> None:
    assert on_all_ranks("saved") == [None] * 4
    assert all(result[1][0][0] == "linear_fc1.A" for result in on_all_ranks("saved over it"))
    assert on_all_ranks("good file kept") == [True] * 4
    result = outcomes()
    assert isinstance(result, list)
    assert result[0]["files"] == ["adapter.nemo"]


def test_a_chunk_that_differs_inside_one_process_is_named() -> None:
    single_process()
    adapter = build("tl6")
    twin = build("tl6").chunks[0]
    adapter.chunks.append(twin)
    check_ties(adapter)
    twin.factors.get_parameter("linear_qkv.A").data[0, 0] += 1
    with pytest.raises(TieError, match=r"linear_qkv\.A: checksum [0-9a-f]{16} on rank 0; [0-9a-f]{16} on rank 0"):
        check_ties(adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_checksum_sees_every_bit_and_every_place(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randn(7, 11, generator=generator, dtype=torch.float64).to(dtype)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    variants = [tensor]
    for place in range(tensor.numel()):
        for bit in (0, 8 * tensor.element_size() - 1):
            changed = tensor.clone()
            changed.view(-1).view(words)[place] ^= -(1 << bit) if bit else 1
            variants.append(changed)
        swapped = tensor.clone().view(-1)
        swapped[[place, (place + 5) % 77]] = swapped[[(place + 5) % 77, place]]
        variants.append(swapped.view(7, 11))
    found = checksums(variants).tolist()
    assert len(set(found)) == len(variants)
    assert checksums([tensor.t().contiguous().t()]).item() == found[0]


def test_the_checksum_tells_signed_zeros_and_simple_swaps_apart() -> None:
    rows = [
        [0.0, 1.0, 2.0, 4.0],
        [-0.0, 1.0, 2.0, 4.0],
        [0.0, 2.0, 1.0, 4.0],
        [1.0, 0.0, 2.0, 4.0],
        [4.0, 2.0, 1.0, 0.0],
    ]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert len(set(checksums([torch.tensor(row, dtype=dtype) for row in rows]).tolist())) == len(rows)


@pytest.mark.parametrize(
    ("dtype", "first", "second"),
    [
        (torch.bfloat16, 0xC3DD1337C14F818E, 0x2BDCF87C91D54562),
        (torch.float32, 0x0FA7E74B279FF5ED, 0x02EF6652F3430014),
        (torch.float64, 0x5840C92C50D1B27A, 0x033B55D9391D734D),
    ],
    ids=str,
)
def test_the_checksum_is_the_same_in_every_version(dtype: torch.dtype, first: int, second: int) -> None:
    """Otherwise nodes with different versions of this package would report each other."""
    tensor = torch.arange(-7, 8, dtype=torch.float64).reshape(3, 5).to(dtype)
    assert [value & (2**64 - 1) for value in checksums([tensor, -tensor]).tolist()] == [first, second]
