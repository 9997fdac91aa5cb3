# SPDX-License-Identifier: Apache-2.0
"""One process: what the adapter's `.nemo` file holds, how large it is, and how it is replaced."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load as load_safetensors

from nemo_tied_lora import TiedLoraConfig, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter.factor_names import FactorName, expected_shapes
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.tied_factors import initial_tensor
from nemo_tied_lora.checkpoint.nemo_adapter_packing import MAX_WRITTEN_CONFIG_BYTES, largest_file
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFileError, read_adapter
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.config import TARGETS
from tests.harness.adapter_files import tiny_adapter
from tests.harness.llama_adapter import LAYERS, LLAMA, RANK, STATE, YAML, assert_same, build, members_of
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import build_gpt, full_tensor


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_adapter(build(), tmp_path / "adapter.nemo")


@pytest.mark.parametrize("preset", ["lora", "vera", "tl5", "tl6"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_save_then_load_is_the_identity(tmp_path: Path, preset: str, dtype: torch.dtype) -> None:
    model = build_gpt(**LLAMA, dtype=dtype)
    config = TiedLoraConfig.preset(preset, rank=RANK, layers=[1, 3], dropout=0.1)
    adapter = inject(model, config)
    state = {n: full_tensor(f"file {n}", tuple(t.shape)).to(dtype) for n, t in adapter.full_state().items()}
    adapter.load_full_state(state)
    path = save_adapter(adapter, tmp_path / "adapter.nemo")
    adapter.remove()
    loaded = load_adapter(model, path)
    assert loaded.config == config
    assert loaded.shapes == adapter.shapes
    assert_same(loaded.full_state(), state)


def test_members_and_keys_on_disk_hold_each_tied_tensor_once(saved: Path) -> None:
    members = members_of(saved)
    assert set(members) == {YAML, STATE}
    tensors = load_safetensors(members[STATE])
    assert set(tensors) == {f"{target}.{factor}" for target in TARGETS for factor in "ABuv"}
    assert tensors["linear_fc1.B"].shape == (80, RANK)
    assert tensors["linear_fc1.v"].shape == (LAYERS, 80)
    assert torch.equal(tensors["linear_fc1.v"][2], full_tensor("file layers.2.linear_fc1.v", (80,)))


def test_the_yaml_records_what_was_trained(tmp_path: Path) -> None:
    path = save_adapter(build(), tmp_path / "adapter.nemo", facts={"base": {"name": "tiny", "layers": LAYERS}})
    description = yaml.safe_load(members_of(path)[YAML])
    assert description["format_version"] == 2
    assert description["peft"]["peft_scheme"] == "tied_lora"
    assert description["peft"]["tied_lora"]["alpha"] == 5.0
    assert {key: description["base"][key] for key in ("name", "layers")} == {"name": "tiny", "layers": LAYERS}
    assert description["base"]["architecture"]["ffn_hidden_size"] == 40
    assert description["targets"]["linear_fc1"] == {
        "kind": "column",
        "in_features": 24,
        "out_features": 80,
        "blocks": 2,
        "layers": [0, 1, 2, 3],
        "num_experts": 1,
    }
    assert description.pop("checksum")
    assert read_adapter(path).yaml == description


def test_facts_do_not_replace_the_formats_own_keys(tmp_path: Path) -> None:
    path = save_adapter(build(), tmp_path / "adapter.nemo", facts={"format_version": 99, "peft": None, "note": "mine"})
    file = read_adapter(path)
    assert file.config.rank == RANK
    assert file.yaml["note"] == "mine"


@pytest.mark.parametrize("preset", ["lora", "vera", "tl5", "tl6"])
def test_the_file_is_no_larger_than_the_formula_and_64_kib(tmp_path: Path, preset: str) -> None:
    """hidden 256, 6 layers: large enough to notice a tied tensor that is written once per layer."""
    layers, hidden, rank = 6, 256, 32
    model = build_gpt(num_layers=layers, hidden=hidden, ffn=4 * hidden, dtype=torch.float32)
    path = save_adapter(inject(model, TiedLoraConfig.preset(preset, rank=rank)), tmp_path / "adapter.nemo")
    sides = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    elements = sum(rank * (inputs + outputs) for inputs, outputs in sides) * (layers if preset == "lora" else 1)
    if preset in ("vera", "tl6"):
        elements += sum(layers * (rank + outputs) for _, outputs in sides)
    assert 4 * elements < path.stat().st_size <= 4 * elements + 64 * 1024


@pytest.mark.parametrize("preset", ["lora", "vera", "tl5", "tl6"])
@pytest.mark.parametrize("layers", [1, 32, 126, 1000])
def test_the_file_is_no_larger_than_that_however_many_layers_there_are(
    tmp_path: Path, preset: str, layers: int
) -> None:
    path = tiny_adapter(tmp_path / "adapter.nemo", preset=preset, hidden=8, layers=layers, rank=2)
    file = read_adapter(path)
    elements = sum(tensor.numel() for tensor in file.state.values())
    assert path.stat().st_size <= 4 * elements + 64 * 1024
    assert len(file.state) >= layers or preset == "tl5"


@pytest.mark.parametrize(("layers", "num_experts"), [(1, 0), (200, 0), (2, 40)])
def test_a_file_full_of_facts_is_as_large_as_planned(tmp_path: Path, layers: int, num_experts: int) -> None:
    """One more byte of facts is refused, so no file is larger than `tied-lora plan` says."""
    empty = read_adapter(tiny_adapter(tmp_path / "empty.nemo", hidden=8, layers=layers, num_experts=num_experts))
    written = members_of(tmp_path / "empty.nemo")
    room = MAX_WRITTEN_CONFIG_BYTES - len(written[YAML]) - len("note: \n")
    path = tmp_path / "full.nemo"
    write_adapter(path, empty.config, empty.shapes, empty.state, {"note": "x" * room})
    assert path.stat().st_size == largest_file(empty.config, empty.shapes, element_bytes=4)
    with pytest.raises(ValueError, match="pass fewer facts"):
        write_adapter(path, empty.config, empty.shapes, empty.state, {"note": "x" * (room + 1)})


def test_facts_that_would_make_the_file_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass fewer facts"):
        save_adapter(build(), tmp_path / "adapter.nemo", facts={"losses": list(range(20_000))})
    assert list(tmp_path.iterdir()) == []


def seeded(model: Any, **fields: Any) -> Adapter:
    """VeRA whose A and B are stored as their seed; u and v are random."""
    config = TiedLoraConfig.from_mapping({"preset": "vera", "rank": RANK, "frozen_factors": "seed", **fields})
    adapter = inject(model, config)
    state = adapter.full_state()
    for name in state:
        if name.startswith("layers.") and name[-1] in "uv":
            state[name] = full_tensor(f"seed {name}", tuple(state[name].shape)).to(state[name].dtype)
    adapter.load_full_state(state)
    return adapter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"tied": [], "init_A": "kaiming"}, {"trained": ["B", "v"], "init_v": 0.0}])
def test_a_frozen_factor_can_be_stored_as_its_seed(tmp_path: Path, dtype: torch.dtype, fields: dict) -> None:
    adapter = seeded(build_gpt(**LLAMA, dtype=dtype), **fields)
    path = save_adapter(adapter, tmp_path / "seed.nemo")
    frozen = {"A", "B"} - set(adapter.config.trained)
    on_disk = load_safetensors(members_of(path)[STATE])
    assert {name[-1] for name in on_disk} == {"u", "v", "A", "B"} & ({*adapter.config.trained, "A", "B"} - frozen)
    assert_same(load_adapter(build_gpt(**LLAMA, dtype=dtype), path).full_state(), adapter.full_state())


def test_a_seed_makes_the_file_as_small_as_what_is_trained(tmp_path: Path) -> None:
    path = tiny_adapter(tmp_path / "tensor.nemo", preset="tl6", hidden=512, layers=2, rank=64)
    config = TiedLoraConfig.preset("vera", rank=64, frozen_factors="seed")
    shapes = read_adapter(path).shapes
    needed = expected_shapes(config, shapes)
    state = {name: torch.ones(shape) for name, shape in needed.items()}
    for name in [name for name in state if name[-1] in "AB"]:
        state[name] = initial_tensor(FactorName.parse(name), needed[name], config)
    small = write_adapter(tmp_path / "seed.nemo", config, shapes, state, {})
    trained = sum(tensor.numel() for name, tensor in state.items() if name[-1] in "uv")
    assert small.stat().st_size <= 4 * trained + 64 * 1024
    assert path.stat().st_size > 1_000_000
    assert_same(read_adapter(small).state, state)


def test_a_generator_that_draws_other_numbers_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_adapter(seeded(build_gpt(**LLAMA)), tmp_path / "seed.nemo")

    def draws_others(*args: Any, **options: Any) -> torch.Tensor:
        tensor = initial_tensor(*args, **options)
        tensor.view(-1)[-1] += 1e-3
        return tensor

    monkeypatch.setattr("nemo_tied_lora.checkpoint.seeded_factors.initial_tensor", draws_others)
    with pytest.raises(AdapterFileError, match="draws other numbers from seed=1234"):
        read_adapter(path)


def test_a_factor_that_is_not_what_the_seed_draws_is_not_stored_as_the_seed(tmp_path: Path) -> None:
    adapter = seeded(build_gpt(**LLAMA))
    state = adapter.full_state()
    state["linear_fc2.B"][3, 1] += 1.0
    adapter.load_full_state(state)
    with pytest.raises(ValueError, match=r"linear_fc2\.B is not what seed=1234 draws"):
        save_adapter(adapter, tmp_path / "seed.nemo")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_would_not_load_again_is_not_saved(saved: Path) -> None:
    before = saved.read_bytes()
    adapter = build()
    with torch.no_grad():
        next(adapter.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        save_adapter(adapter, saved)
    assert saved.read_bytes() == before


def test_saving_replaces_an_older_file(saved: Path) -> None:
    save_adapter(build(rank=2), saved)
    assert read_adapter(saved).config.rank == 2
    assert os.listdir(saved.parent) == [saved.name]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = save_adapter(build(), tmp_path / "runs" / "first" / "adapter.nemo")
    assert read_adapter(str(path)).config.rank == RANK


def test_the_file_has_the_permissions_that_the_user_asks_for(saved: Path) -> None:
    current = os.umask(0o027)
    try:
        save_adapter(build(), saved)
    finally:
        os.umask(current)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o640


def raise_no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "failing", ["os.replace", "os.fsync", "nemo_tied_lora.checkpoint.nemo_adapter_format.StateWriter.add"]
)
def test_a_failed_write_leaves_the_older_file_and_nothing_else(
    saved: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    adapter = build(rank=2)
    monkeypatch.setattr(failing, raise_no_space)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapter, saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_an_interrupted_write_leaves_nothing_behind(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    before = saved.read_bytes()
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(build(rank=2), saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
