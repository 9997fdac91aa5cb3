# SPDX-License-Identifier: Apache-2.0
"""One process and two ranks: an injection that fails on any rank raises on all ranks and changes no model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import nemo_tied_lora.adapter
from nemo_tied_lora import ConfigError, TiedLoraConfig, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter import inject as inject_module
from tests.adapter.test_inject_refused import description
from tests.harness.ranks import run_ranks, single_process
from tests.harness.tiny_gpt import build_gpt

CODE = Path(nemo_tied_lora.adapter.__file__).parent
CONFIG = TiedLoraConfig(rank=2, targets=["linear_qkv", "linear_fc2"], layers=[1])
Place = tuple[str, str, int]


class Fault(RuntimeError):
    """A planted failure."""


def small_model() -> nn.Module:
    """Recomputes, so that it gets each hook; its embedding is frozen already."""
    model = build_gpt(num_layers=2, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    model.embedding.requires_grad_(False)
    return model


def traced(call: Callable[[], Any], at_line: Callable[[Place], None]) -> Any:
    """Calls `call`, and `at_line` before each line of the adapter's code, up to the last agreement of the ranks."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            at_line((Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame.f_lineno))
        return local

    def start(frame: FrameType, event: str, _: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        inside = path.parent == CODE and path.name != "agreement.py"
        return local if inside else None

    before = sys.gettrace()
    sys.settrace(start)
    try:
        return call()
    finally:
        sys.settrace(before)


def places() -> dict[Place, int]:
    """How often an injection runs each line before the ranks agree for the last time."""
    counts: dict[Place, int] = {}
    agreed: dict[Place, int] = {}

    def count(place: Place) -> None:
        counts[place] = counts.get(place, 0) + 1

    def agree(*args: Any) -> None:
        agreed.update(counts)

    model, original = small_model(), inject_module.raise_together
    inject(small_model(), CONFIG).remove()  # the linears' new classes are made once
    inject_module.raise_together = agree  # type: ignore[assignment]
    try:
        traced(lambda: inject(model, CONFIG), count).remove()
    finally:
        inject_module.raise_together = original
    return agreed


def fail_at(wanted: Place, nth: int, model: nn.Module) -> Exception | None:
    """Injects with a fault at the nth time that the line runs. Returns what was raised."""
    times = 0

    def at_line(place: Place) -> None:
        nonlocal times
        times += place == wanted
        if place == wanted and times == nth:
            raise Fault(f"{place}")

    try:
        adapter = traced(lambda: inject(model, CONFIG), at_line)
    except Exception as error:
        return error
    adapter.remove()
    return None


def test_a_fault_at_any_line_leaves_the_model_as_it_was() -> None:
    single_process()
    model = small_model()
    before = description(model)
    lines = places()
    assert {name for name, *_ in lines} >= {"inject.py", "injected_chunk.py", "tied_factors.py", "tied_linear.py"}
    assert len(lines) > 150
    for place, times in lines.items():
        for nth in {1, times}:
            assert isinstance(fail_at(place, nth, model), Fault), place
            assert description(model) == before, place
    inject(model, CONFIG).remove()
    assert description(model) == before


def test_control_a_fault_shows_if_nothing_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    single_process()
    monkeypatch.setattr("nemo_tied_lora.adapter.injected_chunk.Chunk.detach", lambda chunk: None)
    with pytest.raises(AssertionError):
        test_a_fault_at_any_line_leaves_the_model_as_it_was()


def _on_a_rank(folder: str) -> dict[str, Any]:
    """Faults on rank 1 alone, at some lines of each file, and refusals and exceptions of one rank alone."""
    model, rank = small_model(), torch.distributed.get_rank()
    before, errors = description(model), []
    lines = {place: times for place, times in places().items() if place[1] != "inject"}
    for place in list(lines)[:: len(lines) // 25]:
        error = fail_at(place, lines[place], model) if rank == 1 else raised(lambda: inject(model, CONFIG))
        errors.append((f"{type(error).__name__}: {error}", description(model) == before))
    return {
        "faults": errors,
        "file": _lost_file(folder, rank),
        "merge": _merge_alone(rank),
        **{name: _alone(name, rank) for name in ALONE},
    }


def _merge_alone(rank: int) -> tuple[str, bool]:
    """What `merge` raises if rank 1 alone cannot merge, and whether the weights are unchanged and the rest works."""
    model: Any = small_model()
    adapter = inject(model, CONFIG)
    first, second = (layer.self_attention.linear_qkv for layer in model.decoder.layers)
    own = second.weight
    if rank == 1:
        second.weight = first.weight
    before = [parameter.detach().clone() for parameter in model.parameters()]
    error = raised(adapter.merge)
    same = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    second.weight = own
    adapter.merge()
    adapter.unmerge()
    return f"{type(error).__name__}: {error}", same


def _lost_file(folder: str, rank: int) -> tuple[str, bool]:
    """What `load_adapter` raises if rank 1 alone does not see the file, and whether the model is unchanged."""
    model, path = small_model(), Path(folder) / "adapter.nemo"
    adapter = inject(model, CONFIG)
    save_adapter(adapter, path)
    adapter.remove()
    before = description(model)
    error = raised(lambda: load_adapter(model, path if rank == 0 else path.with_name("lost.nemo")))
    return f"{type(error).__name__}: {error}", description(model) == before


def _alone(name: str, rank: int) -> tuple[str, bool]:
    """What `inject` raises on this rank if rank 1 alone has the problem, and whether the model is unchanged."""
    model: Any = small_model()
    config: Any = CONFIG
    if rank == 1:
        if name == "another linear":
            model.decoder.layers[1].mlp.linear_fc2 = nn.Linear(40, 24)
        elif name == "an adapter":
            inject_alone(model)
        elif name == "another configuration":
            config = TiedLoraConfig(rank=1)
        elif name == "no configuration":
            config = {"rank": 2}
        elif name == "no model":
            model = nn.Sequential(nn.Linear(4, 4))
    before = description(model) if hasattr(model, "config") else None
    error = raised(lambda: inject(model, config))
    after = description(model) if hasattr(model, "config") else None
    return f"{type(error).__name__}: {error}", before == after


def inject_alone(model: Any) -> None:
    """Marks the model as adapted without the other rank."""
    model.decoder.tied_lora = nn.Module()


def raised(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


ALONE = {
    "another linear": "ConfigError: targets: layer 1 mlp.linear_fc2: a Linear cannot be adapted; drop linear_fc2",
    "an adapter": "RuntimeError: model: it has a Tied-LoRA adapter already; call adapter.remove() first",
    "another configuration": "ConfigError: config: rank 1 has another one than rank 0; pass the same one on all ranks",
    "no configuration": "TypeError: inject: config is a dict; pass a TiedLoraConfig, such as "
    "TiedLoraConfig.preset('tl6')",
    "no model": "ConfigError: model: a Sequential has no Megatron linears (no decoder.layers of a TransformerBlock)",
}


@pytest.mark.parametrize("sizes", [{"tp": 2}, {}], ids=["tp2", "dp2"])
def test_what_fails_on_one_rank_raises_on_both_and_changes_neither(sizes: dict[str, int], tmp_path: Path) -> None:
    first, second = run_ranks(_on_a_rank, str(tmp_path), world_size=2, **sizes)
    assert first["file"][0].startswith(
        "RuntimeError: load_adapter: rank 1 failed, so nothing was changed on any rank: "
    )
    assert second["file"][0] in first["file"][0]
    assert "lost.nemo" in second["file"][0]
    assert (first["file"][1], second["file"][1]) == (True, True)
    assert len(first["faults"]) >= 25
    for (text, unchanged), (own, also) in zip(first["faults"], second["faults"], strict=True):
        assert unchanged
        assert also
        assert own.startswith("Fault: ")
        assert text == f"RuntimeError: inject: rank 1 failed, so nothing was changed on any rank: {own}"
    assert first["merge"] == second["merge"]
    assert first["merge"][0].startswith("ConfigError: merge: decoder.layers.0.self_attention.linear_qkv and decoder.")
    assert first["merge"][1]
    for name, message in ALONE.items():
        (text, unchanged), (own, also) = first[name], second[name]
        assert (unchanged, also) == (True, True), name
        assert own == message, name
        kind = message.partition(": ")[0]
        other = "RuntimeError: inject: rank 1 failed, so nothing was changed on any rank: "
        assert text == (message if kind == "ConfigError" else other + message), name


def test_an_empty_list_and_a_mapping_are_refused() -> None:
    single_process()
    with pytest.raises(ConfigError, match="model: an empty list; pass this stage's chunks"):
        inject([], CONFIG)
    with pytest.raises(TypeError, match=r"config is a str; pass a TiedLoraConfig"):
        inject(small_model(), "tl6")  # type: ignore[arg-type]
