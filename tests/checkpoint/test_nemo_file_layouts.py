# SPDX-License-Identifier: Apache-2.0
"""Two ranks (one start): every layout, also with interleaved chunks, saves the same file, which loads on every other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from nemo_tied_lora import TiedLoraConfig, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter import full_state
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from tests.harness.live_tensors import peak_of
from tests.harness.llama_adapter import LLAMA, assert_same, build
from tests.harness.ranks import run_ranks, single_process
from tests.harness.relayout import relayout
from tests.harness.tiny_gpt import build_gpt

LAYOUTS: dict[str, dict[str, int]] = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "pp2 in two chunks each": {"pp": 2}}
CHUNKS = {"pp2 in two chunks each": 2}
MEASURED = ("tp2", "pp2")
# An adapter of 4.5 MiB, of which linear_qkv has 1.125 and linear_fc1, the largest target, 1.41.
WIDE: dict[str, Any] = {"num_layers": 8, "hidden": 96, "ffn": 384, "dtype": torch.float32}


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def model_of(layout: str, **options: Any) -> Any:
    """Switches to the layout; returns this rank's model, or the list of its chunks."""
    relayout(**LAYOUTS[layout])
    if layout not in CHUNKS:
        return build_gpt(**options)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(CHUNKS[layout])
    return [build_gpt(**options, vp_stage=stage) for stage in range(CHUNKS[layout])]


def save_and_load_on_a_rank(folder: str) -> dict[str, Any]:
    """Writes one file per layout, then loads each file on each layout."""
    results: dict[str, Any] = {}
    for layout in LAYOUTS:
        save_adapter(build(model_of(layout, **LLAMA)), Path(folder) / f"{layout}.nemo")
        results[f"readable after {layout}"] = (Path(folder) / f"{layout}.nemo").is_file()
    for layout in LAYOUTS:
        for source in LAYOUTS:
            adapter = load_adapter(model_of(layout, **LLAMA), Path(folder) / f"{source}.nemo")
            results[f"{source} at {layout}"] = adapter.full_state()
    for layout in MEASURED:
        adapter = inject(model_of(layout, **WIDE), TiedLoraConfig.preset("lora", rank=96))
        save_adapter(adapter, Path(folder) / "wide.nemo")
        for what, call in (
            ("stream", lambda: streamed(adapter)),  # noqa: B023
            ("full_state", adapter.full_state),
        ):
            results[f"memory of {what} at {layout}"] = peak_of(call)
    chunks = model_of("pp2 in two chunks each", **LLAMA)
    results["layers of chunks"] = [[layer.layer_number for layer in chunk.decoder.layers] for chunk in chunks]
    relayout(tp=2)
    results["failure"] = error_of(lambda: save_adapter(build(), Path(folder) / "a_folder"))
    return results


def streamed(adapter: Adapter) -> None:
    """Consumes the iterator from which `save_adapter` writes, and keeps no tensor."""
    factors = [chunk.factors for chunk in adapter.chunks]
    for _ in full_state.stream(adapter.config, adapter.shapes, factors, torch.device("cpu")):
        pass


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two_ranks")
    (path / "a_folder").mkdir()
    return path


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Any]]:
    """The ranks are started once, even if they fail."""
    return run_ranks(save_and_load_on_a_rank, str(folder), world_size=2, tp=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_a_file_of_any_layout_loads_at_any(layout: str, source: str, two_ranks: list[dict[str, Any]]) -> None:
    expected = build().full_state()
    for rank in two_ranks:
        assert_same(rank[f"{source} at {layout}"], expected)


def test_the_file_does_not_depend_on_the_layout(two_ranks: list[dict[str, Any]], folder: Path) -> None:
    saved = save_adapter(build(), folder / "one process.nemo").read_bytes()
    assert [layout for layout in LAYOUTS if (folder / f"{layout}.nemo").read_bytes() != saved] == []


def test_the_interleaved_layout_has_two_chunks_of_layers_that_are_not_adjacent(
    two_ranks: list[dict[str, Any]],
) -> None:
    assert [rank["layers of chunks"] for rank in two_ranks] == [[[1], [3]], [[2], [4]]]


def test_every_rank_sees_the_file_when_the_call_returns(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank[f"readable after {layout}"] for rank in two_ranks for layout in LAYOUTS] == [True] * 6


@pytest.mark.parametrize("layout", MEASURED)
def test_no_rank_holds_more_than_one_target_while_all_are_gathered(
    layout: str, two_ranks: list[dict[str, Any]], folder: Path
) -> None:
    tensors = read_adapter(folder / "wide.nemo").state
    one_target, whole = (
        sum(t.nbytes for name, t in tensors.items() if name.endswith(ends))
        for ends in (("fc1.A", "fc1.B"), ("A", "B"))
    )
    for rank in two_ranks:
        # One tensor's part, the parts of all ranks, the whole, and the previous whole tensor.
        assert rank[f"memory of stream at {layout}"] < one_target
        assert rank[f"memory of full_state at {layout}"] >= whole


def test_a_failure_of_the_rank_that_writes_is_an_error_on_every_rank(two_ranks: list[dict[str, Any]]) -> None:
    """The other ranks must not wait forever."""
    assert two_ranks[0]["failure"].startswith("IsADirectoryError")
    assert two_ranks[1]["failure"].startswith("OSError")
    assert "a_folder" in two_ranks[1]["failure"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_of_two_ranks_loads_on_one(layout: str, two_ranks: list[dict[str, Any]], folder: Path) -> None:
    assert_same(load_adapter(build_gpt(**LLAMA), folder / f"{layout}.nemo").full_state(), build().full_state())
