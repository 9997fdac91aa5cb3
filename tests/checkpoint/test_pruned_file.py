# SPDX-License-Identifier: Apache-2.0
"""One process: the file of an adapter with a rank budget holds masks and live atoms only, and gives the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load as load_safetensors

from nemo_tied_lora import TiedLoraConfig, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.rank_budget.masks import by_name, live_atoms, u_names
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.checkpoint.nemo_adapter_packing import MAX_WRITTEN_CONFIG_BYTES, largest_file
from nemo_tied_lora.checkpoint.pruned_tensors import PrunedTensors
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFileError, read_adapter
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from tests.adapter.test_inject import loss_of
from tests.harness.llama_adapter import RANK, STATE, YAML, build, members_of
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import build_gpt

BUDGET = {"target_rank": 1.5}


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def pruned(**fields: Any) -> Any:
    """An adapter of rank 3 on 4 layers. Atom 1 of linear_qkv is dead; layer 2 has lost all of linear_qkv."""
    adapter = build(**{"rank_budget": BUDGET, **fields})
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(len(adapter.pruning.names) * RANK, generator=generator) < 0.6
    masks = by_name(mask, adapter.shapes)
    for name, entries in masks.items():
        if "linear_qkv" in name:
            entries[1] = False
            entries[0] = True
        if name == "layers.2.linear_qkv.u":
            entries[:] = False
    adapter.pruning.fix(masks)
    return adapter


@pytest.mark.parametrize(
    "fields", [{}, {"preset": "adalora"}, {"preset": "vera", "frozen_factors": "seed"}, {"tied": ["A"]}]
)
def test_a_loaded_adapter_gives_the_same_bits_and_stays_pruned(tmp_path: Path, fields: dict[str, Any]) -> None:
    adapter = pruned(**fields)
    if "seed" in fields.values():
        adapter = pruned_from_its_seed(fields)
    model = adapter.chunks[0].outer
    model.eval()
    want = loss_of(model)
    masks, ranks = adapter.pruning.masks(), adapter.ranks()
    path = save_adapter(adapter, tmp_path / "adapter.nemo")
    adapter.remove()
    loaded = load_adapter(model, path)
    assert torch.equal(loss_of(model), want)
    assert loaded.ranks() == ranks == read_adapter(path).ranks()
    assert all(torch.equal(mask, masks[name]) for name, mask in loaded.pruning.masks().items())
    model.train()
    optimizer = torch.optim.Adam(loaded.parameters(), lr=1e-2)
    loaded.follow_optimizer(optimizer, max_steps=1)  # nothing is left to prune
    loss_of(model).backward()
    optimizer.step()
    assert loaded.ranks() == ranks
    assert path.stat().st_size <= largest_file(loaded.config, loaded.shapes, 8)


def pruned_from_its_seed(fields: dict[str, Any]) -> Any:
    """Frozen factors that are stored as their seed must be what the seed draws."""
    other = pruned(**fields)
    masks = other.pruning.masks()
    model = other.chunks[0].outer
    other.remove()
    adapter = inject(model, other.config)
    state = adapter.full_state()
    adapter.load_full_state({n: torch.full_like(t, 0.3) if n[-1] in "uv" else t for n, t in state.items()})
    adapter.pruning.fix(masks)
    return adapter


def test_the_file_holds_live_atoms_masked_u_and_masks_under_a_version_of_its_own(tmp_path: Path) -> None:
    adapter = pruned()
    path = save_adapter(adapter, tmp_path / "adapter.nemo")
    members, state = members_of(path), adapter.full_state()
    tensors = load_safetensors(members[STATE])
    assert yaml.safe_load(members[YAML])["format_version"] == 3
    live = live_atoms(adapter.config, adapter.pruning.masks())["linear_qkv"]
    assert live.tolist()[:2] == [True, False]
    assert torch.equal(tensors["linear_qkv.A"], state["linear_qkv.A"][live])
    assert torch.equal(tensors["linear_qkv.B"], state["linear_qkv.B"][:, live])
    masks = torch.stack([adapter.pruning.masks()[f"layers.{i}.linear_qkv.u"] for i in range(4)])
    assert torch.equal(tensors["linear_qkv.mask"], masks.to(tensors["linear_qkv.u"].dtype))
    u = torch.stack([state[f"layers.{i}.linear_qkv.u"] for i in range(4)])
    assert torch.equal(tensors["linear_qkv.u"], u * masks)
    assert masks[2].sum() == 0
    plain = save_adapter(build(), tmp_path / "plain.nemo")
    assert yaml.safe_load(members_of(plain)[YAML])["format_version"] == 2
    read = read_adapter(path).state["linear_qkv.A"]
    assert (read[1] == 0).all()
    assert torch.equal(read[live], state["linear_qkv.A"][live])


def test_a_group_may_lose_every_atom(tmp_path: Path) -> None:
    adapter = pruned()
    masks = {name: mask & ("linear_proj" not in name) for name, mask in adapter.pruning.masks().items()}
    adapter.pruning.fix(masks)
    file = read_adapter(save_adapter(adapter, tmp_path / "adapter.nemo"))
    assert {rank for name, rank in file.ranks().items() if "linear_proj" in name} == {0}
    assert file.state["linear_proj.B"].shape == (24, RANK)
    assert not file.state["linear_proj.B"].any()


def test_masks_that_are_not_masks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_adapter(pruned(), tmp_path / "adapter.nemo")
    file, original = read_adapter(path), PrunedTensors.mask_tensors
    halved = lambda self, dtype: ((name, tensor / 2) for name, tensor in original(self, dtype))  # noqa: E731
    monkeypatch.setattr(PrunedTensors, "mask_tensors", halved)
    write_adapter(path, file.config, file.shapes, file.state, {}, file.masks)
    with pytest.raises(AdapterFileError, match=r"linear_qkv\.mask is missing, or is not a mask of shape \(4, 3\)"):
        read_adapter(path)


def test_an_adapter_of_another_layout_of_experts_keeps_its_atoms_apart(tmp_path: Path) -> None:
    """Expert e's tied tensors lose an atom only if no layer's expert e uses it; shared ones, if no expert does.

    The file holds experts' tensors that have lost different numbers of atoms.
    """
    for experts, names in (("per_expert", 3), ("tied", 1)):
        model = build_gpt(
            num_layers=2,
            llama=True,
            num_moe_experts=3,
            moe_layer_freq=[1, 1],
            moe_ffn_hidden_size=40,
            moe_router_topk=2,
            moe_router_load_balancing_type="none",
        )
        config = TiedLoraConfig(rank=2, targets=["linear_fc1"], experts=experts, rank_budget={"target_rank": 1})
        adapter = inject(model, config)
        masks = {name: torch.tensor([True, "experts.0." in name]) for name in adapter.pruning.names}
        live = live_atoms(config, masks)
        assert len(live) == names
        assert [bool(atoms[1]) for atoms in live.values()] == [True, False, False][:names]
        adapter.pruning.fix(masks)
        state = adapter.full_state()
        file = read_adapter(save_adapter(adapter, tmp_path / f"{experts}.nemo"))
        assert all(torch.equal(mask, masks[name]) for name, mask in file.masks.items())
        for name, tensor in file.state.items():
            atoms = live.get(name.rpartition(".")[0]) if name[-1] in "AB" else masks.get(name)
            want = state[name] if atoms is None else state[name] * (atoms.view(-1, 1) if name[-1] == "A" else atoms)
            assert torch.equal(tensor, want), name


def test_a_file_of_many_experts_is_no_larger_than_planned_however_their_atoms_are_lost(tmp_path: Path) -> None:
    """Each expert's tied tensors have an entry of their own in the header."""
    config = TiedLoraConfig(rank=2, targets=["linear_fc1"], rank_budget={"target_rank": 1})
    shapes = {"experts.linear_fc1": LinearShape("column", 8, 8, 1, (0, 1), num_experts=300)}
    state = {name: torch.zeros(shape) for name, shape in expected_shapes(config, shapes).items()}
    masks = {name: torch.tensor([True, int(name.split(".")[3]) % 2 == 0]) for name in u_names(shapes)}
    path = tmp_path / "full.nemo"
    write_adapter(path, config, shapes, state, {}, masks)
    room = MAX_WRITTEN_CONFIG_BYTES - len(members_of(path)[YAML]) - len("note: \n")
    write_adapter(path, config, shapes, state, {"note": "x" * room}, masks)
    assert path.stat().st_size <= largest_file(config, shapes, 4) <= path.stat().st_size + 64 * 1024
