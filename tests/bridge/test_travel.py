# SPDX-License-Identifier: Apache-2.0
"""Several ranks: an adapter that is trained through Bridge is the single-process one, and its file loads everywhere.

NEMO_PYTHON names the interpreter of NeMo's environment; `make test-bridge` sets it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_tied_lora import TiedLoraConfig, inject
from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.platform import prepare
from tests.bridge import other_release
from tests.harness.paths import ROOT
from tests.harness.ranks import run_ranks, single_process

State = dict[str, torch.Tensor]
CASES = {"tl6": "tl6", "vera": "vera", "hybrid": "tl6"}
"""Each case's preset. "hybrid" is trained on a HybridModel; all others on a GPTModel with the same weights."""
LAYOUTS: tuple[dict[str, int], ...] = ({"world_size": 2, "pp": 2}, {"world_size": 2, "tp": 2})
RATE, STEPS, LARGEST_NORM = 2e-2, 3, 1.0


def config(case: str) -> TiedLoraConfig:
    return TiedLoraConfig.preset(CASES[case], rank=3, alpha=5.0)


def trained_through_bridge(folder: str) -> dict[str, tuple[State, list[float]]]:
    """A rank: trains each case through Bridge, and saves it."""
    prepare(bridge=True)
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from nemo_tied_lora import save_adapter
    from nemo_tied_lora.bridge import TiedLoRA
    from tests.bridge.bridge_model import build, fill_base, train

    results = {}
    for case, preset in CASES.items():
        peft = TiedLoRA.preset(preset, rank=3, alpha=5.0)
        model = build(fill_base, peft, hybrid=case == "hybrid")
        options = OptimizerConfig(optimizer="adam", lr=RATE, weight_decay=0.0, clip_grad=LARGEST_NORM)
        norms = train(model, get_megatron_optimizer(options, model), STEPS)
        assert peft.adapter is not None
        save_adapter(peft.adapter, Path(folder) / f"{case}.nemo")
        results[case] = peft.adapter.full_state(), norms
    return results


def loaded_through_bridge(folder: str) -> dict[str, State]:
    """A rank: builds each case's base with its file's adapter on it."""
    prepare(bridge=True)
    from nemo_tied_lora.bridge import TiedLoRA
    from tests.bridge.bridge_model import build, fill_base

    states = {}
    for case, preset in CASES.items():
        peft = TiedLoRA.preset(preset, rank=3, alpha=5.0, restore_from_path=str(Path(folder) / f"{case}.nemo"))
        build(fill_base, peft, hybrid=case == "hybrid")
        assert peft.adapter is not None
        states[case] = peft.adapter.full_state()
    return states


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def trained(folder: Path) -> list[dict[str, tuple[State, list[float]]]]:
    """The results of each of four ranks, at TP 2 x PP 2."""
    return run_ranks(trained_through_bridge, str(folder), world_size=4, tp=2, pp=2)


@pytest.fixture(scope="module")
def returned(folder: Path, trained: Any) -> Path:
    """The folder with the files that NeMo's megatron-core, whose model is a GPTModel, has loaded and written again."""
    back = folder / "back"
    back.mkdir()
    files = [str(place / f"{case}.nemo") for case in CASES for place in (folder, back)]
    assert on_nemos_python("other_release", *files).startswith("0.13.")
    return back


@pytest.fixture(scope="module")
def reloaded(returned: Path) -> list[dict[str, State]]:
    """What each rank of each layout has loaded from these files."""
    return [rank for layout in LAYOUTS for rank in run_ranks(loaded_through_bridge, str(returned), **layout)]


@pytest.mark.parametrize("case", CASES)
def test_bridge_at_tp2_pp2_trains_the_adapter_of_a_plain_loop_on_one_process(case: str, trained: Any) -> None:
    """In float32: the bound is for sums in another order, through three steps of Adam. The plain loop's is a GPTModel."""
    single_process()
    model = other_release.build()
    adapter = inject(model, config(case))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=RATE, weight_decay=0.0)
    batch, norms = other_release.tokens(), []
    positions = torch.arange(batch.shape[1] - 1).expand(len(batch), -1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(batch[:, :-1], positions, other_release.mask(), labels=batch[:, 1:]).mean().backward()
        norms.append(adapter.clip_gradients(LARGEST_NORM).item())
        optimizer.step()
    for state, bridges_norms in (rank[case] for rank in trained):
        assert bridges_norms == pytest.approx(norms, rel=1e-4)
        assert {name: error(state[name], tensor) for name, tensor in adapter.full_state().items()} == {
            name: pytest.approx(0.0, abs=1e-3) for name in state
        }


@pytest.mark.parametrize("case", CASES)
def test_the_file_travels_to_nemos_megatron_and_back_to_other_layouts_bit_for_bit(
    case: str, folder: Path, trained: Any, returned: Path, reloaded: Any
) -> None:
    """Loading compares the base's fingerprint and architecture, so both sides describe the same weights alike."""
    sent, back = read_adapter(folder / f"{case}.nemo"), read_adapter(returned / f"{case}.nemo")
    assert sent.yaml["base"]["architecture"] == back.yaml["base"]["architecture"]
    assert sent.yaml["base"]["fingerprint"]["weights"] == back.yaml["base"]["fingerprint"]["weights"]
    assert same_bits(sent.state, back.state)
    assert same_bits(sent.state, trained[0][case][0])
    assert len(reloaded) == 4
    for states in reloaded:
        assert same_bits(states[case], sent.state)


def test_another_base_is_refused_by_its_fingerprint(folder: Path, trained: Any) -> None:
    from nemo_tied_lora import load_adapter
    from nemo_tied_lora.checkpoint.base_identity import BaseMismatchError

    single_process()
    model = other_release.build()
    model.decoder.layers[1].mlp.linear_fc2.weight.data[0, 0] += 1
    with pytest.raises(BaseMismatchError, match=r"trained on other weights: .*linear_fc2"):
        load_adapter(model, folder / "tl6.nemo")


def saved_on_a_hugging_face_base(folder: str) -> None:
    """A rank: Bridge loads Hugging Face's weights, and an adapter on them is saved."""
    prepare(bridge=True)
    from nemo_tied_lora import save_adapter
    from nemo_tied_lora.bridge import TiedLoRA
    from tests.bridge.hugging_face_model import load_through_bridge

    peft = TiedLoRA(rank=3)
    load_through_bridge(Path(folder) / "hf", peft)
    assert peft.adapter is not None
    state = {name: torch.full_like(tensor, 0.01) for name, tensor in peft.adapter.full_state().items()}
    peft.adapter.load_full_state(state)
    save_adapter(peft.adapter, Path(folder) / "adapter.nemo")


def test_nemo_knows_the_base_of_an_adapter_that_bridge_saved(tmp_path: Path) -> None:
    """The base is a Hugging Face folder, which `tied-lora import` and Bridge have read. They pad its vocabulary otherwise."""
    on_nemos_python("nemo_base", "base", str(tmp_path))
    run_ranks(saved_on_a_hugging_face_base, str(tmp_path), world_size=4, tp=2, pp=2)
    on_nemos_python("nemo_base", "merge", str(tmp_path))
    assert (tmp_path / "merged.nemo").is_file()


def on_nemos_python(module: str, *arguments: str) -> str:
    python = os.environ.get("NEMO_PYTHON")
    assert python, "NEMO_PYTHON: set it to the interpreter of NeMo's environment, as make test-bridge does"
    command = [python, "-m", f"tests.bridge.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def same_bits(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()
