# SPDX-License-Identifier: Apache-2.0
"""One process, no NeMo: damaged and foreign files of LoRA, peft's and stock NeMo's, are refused with their fault."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nemo_tied_lora.checkpoint.tar import write_tar
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.commands.main import main
from nemo_tied_lora.conversion.lora_to_tied import fit_adapter, read_lora
from nemo_tied_lora.conversion.nemo_lora_config import read_members_of
from nemo_tied_lora.conversion.to_nemo_lora import write_nemo_lora
from nemo_tied_lora.conversion.to_peft_lora import write_hf_peft
from tests.harness.lora_folders import CONFIG, WEIGHTS, edit, edit_tensors, problems_of
from tests.harness.random_adapters import LLAMA, random_adapter

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """peft's folder of a LoRA of all linears, rank 3."""
    return write_hf_peft(random_adapter(LLAMA, preset="lora"), LLAMA, tmp_path / "lora", None)


def update_of(folder: Path) -> torch.Tensor:
    """The update of one target that is read from the folder."""
    delta = read_lora(folder, LLAMA).deltas["linear_qkv"][2]
    return delta.P @ delta.Q


# Tensors.


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(*parts: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: t for name, t in tensors.items() if not all(part in name for part in parts)}


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda ts: {name: change(t).contiguous() if part in name else t for name, t in ts.items()}


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


FAULTS: Mapping[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a vision model's prefix": (
        renamed("model.model.layers", "model.model.language_model.layers"),
        "56 of 56 tensors begin with base_model.model.model.language_model.layers. but this base's begin with "
        "base_model.model.model.layers.",
    ),
    "a body without its head": (renamed("model.model.", "model."), "begin with base_model.model.layers."),
    "without peft's prefix": (renamed("base_model.model.", ""), "56 of 56 tensors begin with model.layers. but"),
    "DDP's prefix": (renamed("base_model", "module.base_model"), "begin with module.base_model.model.model.layers."),
    "another family": (renamed("model.layers", "transformer.h"), "begin with base_model.model.transformer.h. but"),
    "a layer's linear of another family": (
        renamed("self_attn.q_proj", "self_attn.qkv_proj"),
        "and 7 more: the base's layers have no self_attn.qkv_proj; they have self_attn.q_proj",
    ),
    "experts": (renamed("mlp.up_proj", "mlp.experts.0.up_proj"), "the base's layers have no mlp.experts.0.up_proj"),
    "a layer too many": (renamed("layers.3.", "layers.7."), "the base has layers 0 to 3, the LoRA goes up to layer 7"),
    "ZeRO-3": (lambda ts: {n: torch.empty(0) for n in ts}, "down_proj.lora_A.weight and 55 more: shape (0,), without"),
    "one empty tensor": (changed(FIRST, lambda t: t[:, :0]), f"{FIRST}: shape (3, 0), without numbers"),
    "NaN": (
        changed("layers.2.mlp.up_proj.lora_B", poisoned(float("nan"))),
        "layers.2.mlp.up_proj.lora_B.weight (layer 2, mlp.up_proj): 3 of 120 numbers are NaN or infinity",
    ),
    "infinity in half": (
        changed(FIRST, lambda t: poisoned(1e9)(t).half()),
        "q_proj.lora_A.weight (layer 0, self_attn.q_proj): 24 of 72 numbers are NaN or infinity",
    ),
    "NaN everywhere": (changed("lora_A", lambda t: t * float("nan")), "and 27 more (layer 0, mlp.down_proj): 120 of"),
    "int8": (changed("lora_A", lambda t: t.to(torch.int8)), "and 27 more: dtype torch.int8, which is not a floating"),
    "no B": (without("layers.1.self_attn.k_proj.lora_B"), "k_proj.lora_A.weight: without its lora_B; the file is not"),
    "no A": (without("lora_A", "o_proj"), "o_proj.lora_B.weight and 3 more: without its lora_A"),
    "a linear less": (
        without("layers.1.self_attn.k_proj"),
        "layers.1.self_attn.k_proj: the configuration names it, but",
    ),
    "a layer less": (without("layers.3."), "and 6 more: the configuration names it, but the file holds no LoRA of it"),
    "transposed": (changed("down_proj.lora_A", lambda t: t.T), "mlp.down_proj in 4 layers from 0 to 3: A and B are"),
    "a flat tensor": (changed(FIRST, torch.flatten), "self_attn.q_proj in layer 0: A and B are (72,) and (48, 3)"),
    "another rank": (
        lambda ts: {n: t[:2] if "lora_A" in n else t[:, :2].contiguous() for n, t in ts.items()},
        "its rank is 2, but 3 by the configuration",
    ),
    "a head": (
        lambda ts: {**ts, "base_model.model.lm_head.lora_A.weight": torch.ones(3, 24)},
        "1 of 57 tensors: base_model.model.lm_head.lora_A.weight: not the lora_A or lora_B of a linear in a layer",
    ),
    "DoRA's magnitudes": (
        lambda ts: {**ts, FIRST.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(48)},
        "1 of 57 tensors: base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector: not the lora_A",
    ),
    "an embedding": (
        lambda ts: {**ts, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 40)},
        "embed_tokens.lora_embedding_A: not the lora_A",
    ),
    "two adapters": (
        lambda ts: {
            n.replace("lora_A", f"lora_A.{a}").replace("lora_B", f"lora_B.{a}"): t.clone()
            for a in "xy"
            for n, t in ts.items()
        },
        "holds 2 adapters ('x', 'y'); save one of them alone",
    ),
    "a whole model": (
        lambda ts: {"model.embed_tokens.weight": torch.ones(40, 24), "lm_head.weight": torch.ones(40, 24)},
        "none of 2 tensors is the LoRA of a layer: lm_head.weight and 1 more",
    ),
    "nothing": (lambda ts: {"x": torch.ones(1)}, "none of 1 tensors is the LoRA of a layer: x"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_many_tensors_is_one_line_that_names_it(folder: Path, fault: str) -> None:
    change, expected = FAULTS[fault]
    (problem,) = problems_of(lambda: read_lora(edit_tensors(folder, change), LLAMA))
    assert problem.startswith(f"path={folder}: ")
    assert expected in problem


def test_tensors_that_the_configuration_does_not_name_are_refused_because_peft_would_drop_them(folder: Path) -> None:
    (problem,) = problems_of(lambda: read_lora(edit(folder, target_modules=["q_proj", "v_proj"]), LLAMA))
    assert "and 19 more: the file holds its LoRA, but the configuration does not name it" in problem


def test_an_adapters_name_in_the_tensors_names_is_ignored(folder: Path) -> None:
    expected = update_of(folder)
    name = edit_tensors(folder, lambda ts: {n.replace(".weight", ".default.weight"): t for n, t in ts.items()})
    assert torch.equal(update_of(name), expected)


def test_a_lora_that_changes_nothing_is_refused_and_a_linear_without_updates_is_left_out(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(folder, changed("o_proj.lora_B", torch.zeros_like))
    with (tmp_path / "base.nemo").open("wb") as file:
        description = {**LLAMA, "huggingface": {"name": "mine-7b"}}
        write_tar(file, {"model_config.yaml": yaml.safe_dump(description).encode()})
    words = [f"path={folder}", f"base={tmp_path / 'base.nemo'}", f"output={tmp_path / 'out.nemo'}", "preset=lora"]
    edit(folder, base_model_name_or_path="models/other-7b")
    assert main(["import", "from=lora", *words]) == 0
    out = capsys.readouterr().out
    assert "note: linear_proj: the LoRA's updates are 0 in every layer; the tied adapter" in out
    assert (
        "note: the LoRA names its base models/other-7b, but base= was made of mine-7b; both must have the same" in out
    )
    edit_tensors(folder, changed("lora_B", torch.zeros_like))
    assert main(["import", "from=lora", *words]) == 2
    assert "this LoRA changes nothing: every B is 0" in capsys.readouterr().err


def test_factors_beyond_float32_are_refused(folder: Path) -> None:
    edit_tensors(folder, changed("lora_", lambda t: t.double() * 1e40))
    fit: Callable[[], Any] = lambda: fit_adapter(  # noqa: E731
        read_lora(folder, LLAMA), random_adapter(LLAMA).config, "lora", max_iterations=1, tolerance=1e-3
    )
    assert "exceeds float32" in problems_of(fit)[0]


# Files.


def pickled(value: Any, *, zipped: bool = True) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


GONE = slice(0)
FILES: Mapping[str, tuple[dict[str, bytes | slice], str]] = {
    "no configuration": ({CONFIG: GONE}, "holds no adapter_config.json; name peft's folder"),
    "a model": (
        {CONFIG: GONE, "config.json": b"{}"},
        "this is a Hugging Face model, not a LoRA; import it with from=hf-base",
    ),
    "a run's folder": ({CONFIG: GONE, f"checkpoint-9/{CONFIG}": b"{}"}, "name the adapter's own folder: path="),
    "cut JSON": ({CONFIG: slice(30)}, "cannot be read"),
    "a JSON list": ({CONFIG: b"[1]"}, "holds no keys"),
    "UTF-16": ({CONFIG: "{}".encode("utf-16")}, "cannot be read"),
    "no weights": ({WEIGHTS: GONE}, "holds neither adapter_model.safetensors nor adapter_model.bin"),
    "empty weights": ({WEIGHTS: b""}, "it is empty"),
    "git-lfs": ({WEIGHTS: b"version https://git-lfs.github.com/spec/v1\n"}, "run git lfs pull"),
    "a web page": ({WEIGHTS: b"<!DOCTYPE html>"}, "it is text, not weights"),
    "cut weights": ({WEIGHTS: slice(-9)}, "it is cut off or damaged"),
    "cut header": ({WEIGHTS: slice(99)}, "it is cut off or damaged"),
    "a pickle of more": ({WEIGHTS: GONE, "adapter_model.bin": pickled({"epoch": 3})}, "its 'epoch' is not a tensor"),
    "a pickled list": ({WEIGHTS: GONE, "adapter_model.bin": pickled([1])}, "it holds list, not tensors"),
    "a missing shard": (
        {WEIGHTS: GONE, f"{WEIGHTS}.index.json": b'{"weight_map": {"a": "b.safetensors"}}'},
        "b.safetensors: missing, though adapter_model.safetensors.index.json names it",
    ),
}
"""The fault -> files with another content, or with a part of their own; and the message."""


@pytest.mark.parametrize("fault", FILES)
def test_a_damaged_or_foreign_folder_is_named_for_what_it_is(folder: Path, fault: str) -> None:
    files, expected = FILES[fault]
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(path.read_bytes()[content] if isinstance(content, slice) else content)
        if content is GONE:
            path.unlink()
    (problem,) = problems_of(lambda: read_lora(folder, LLAMA))
    assert expected in problem
    assert str(folder) in problem


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_and_shards_are_read_like_one_file_of_safetensors(folder: Path, zipped: bool) -> None:
    expected, tensors = update_of(folder), load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickled(tensors, zipped=zipped))
    assert torch.equal(update_of(folder), expected)
    (folder / "adapter_model.bin").unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file(half, folder / f"part-{i}.safetensors")
    places = {name: f"part-{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(update_of(folder), expected)
    places.popitem()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    assert "which a shard holds" in problems_of(lambda: read_lora(folder, LLAMA))[0]


# Stock NeMo's LoRA.


def nemo_file(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """Stock NeMo's LoRA, rank 3, with changes of its lora_tuning and its tensors."""
    members = read_members_of(write_nemo_lora(random_adapter(LLAMA, preset="lora"), LLAMA, path))
    description = yaml.safe_load(members["model_config.yaml"])
    state = torch.load(io.BytesIO(members["model_weights.ckpt"]), weights_only=True)
    change(description["peft"]["lora_tuning"], state)
    members = {"model_config.yaml": yaml.safe_dump(description).encode(), "model_weights.ckpt": pickled(state)}
    with path.open("wb") as file:
        write_tar(file, members)
    return path


NEMO = "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight"
NEMO_FAULTS: Mapping[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "canonical": (lambda c, s: c.update(variant="canonical"), "lora_tuning.variant='canonical': only variant nemo"),
    "alpha 0": (lambda c, s: c.update(alpha=0), "lora_tuning.alpha=0: must be null or a number greater than 0"),
    "alpha NaN": (lambda c, s: c.update(alpha=float("nan")), "lora_tuning.alpha=nan"),
    "alpha text": (lambda c, s: c.update(alpha="32"), "lora_tuning.alpha='32'"),
    "rank 0": (lambda c, s: c.update(adapter_dim=0), "lora_tuning.adapter_dim=0: must be a whole number"),
    "no rank": (lambda c, s: c.pop("adapter_dim"), "lora_tuning.adapter_dim is missing"),
    "NeMo's tied LoRA": (lambda c, s: c.update(weight_tying=True), "lora_tuning.weight_tying=True"),
    "unknown": (lambda c, s: c.update(network_alpha=4), "lora_tuning.network_alpha=4: this release does not know it"),
    "targets": (lambda c, s: c.update(target_modules=["attention_query"]), "lora_tuning.target_modules="),
    "another rank": (lambda c, s: c.update(adapter_dim=4), "its rank is 3, but 4 by the configuration"),
    "fewer layers": (lambda c, s: c.update(layer_selection=[1, 2]), "the file holds its LoRA, but the configuration"),
    "fewer targets": (lambda c, s: c.update(target_modules=["mlp"]), "the file holds its LoRA, but the configuration"),
    "NaN": (lambda c, s: s[NEMO].fill_(float("nan")), f"{NEMO} (layer 0, self_attention): 72 of 72 numbers are NaN"),
    "no B": (lambda c, s: s.pop(NEMO.replace("_in", "_out")), f"{NEMO}: without its linear_out"),
    "half a linear": (lambda c, s: s.update({NEMO: s[NEMO][:, :12]}), "in layer 0: A and B are (3, 12)"),
    "a prompt table": (lambda c, s: s.update({"model.prompt.weight": torch.ones(2)}), "1 of 33 tensors: model.prompt"),
    "a metric": (lambda c, s: s.update({"epoch": 3}), "holds more than tensors by name"),
}


@pytest.mark.parametrize("fault", NEMO_FAULTS)
def test_a_fault_of_stock_nemos_lora_is_one_line_that_names_it(tmp_path: Path, fault: str) -> None:
    change, expected = NEMO_FAULTS[fault]
    (problem,) = problems_of(lambda: read_lora(nemo_file(tmp_path / "lora.nemo", change), None))
    assert expected in problem


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (3, 1.0), (6, 2.0), (1.5, 0.5)])
def test_stock_nemos_alpha_is_divided_by_its_rank(tmp_path: Path, alpha: float | None, factor: float) -> None:
    plain = read_lora(nemo_file(tmp_path / "plain.nemo", lambda c, s: None), None).deltas["linear_fc2"][1]
    other = read_lora(nemo_file(tmp_path / "lora.nemo", lambda c, s: c.update(alpha=alpha)), None)
    delta = other.deltas["linear_fc2"][1]
    assert torch.allclose(delta.P @ delta.Q, factor * plain.P @ plain.Q)


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("mp_rank_00/model_weights.ckpt", "one file per model-parallel rank"),
        ("tp_rank_00_pp_rank_000/model_weights.ckpt", "one file per model-parallel rank"),
        ("model_weights/common.pt", "a distributed checkpoint"),
        ("tokenizer.model", "this is not stock NeMo's LoRA"),
    ],
)
def test_another_form_of_nemo_file_is_named_for_what_it_is(tmp_path: Path, member: str, expected: str) -> None:
    with tarfile.open(tmp_path / "lora.nemo", "w") as tar:
        for name in ("model_config.yaml", member):
            tar.addfile(tarfile.TarInfo(f"./{name}"))
    (problem,) = problems_of(lambda: read_lora(tmp_path / "lora.nemo", None))
    assert "model_weights.ckpt is missing; " in problem
    assert expected in problem


def test_other_files_given_as_a_lora_are_named(tmp_path: Path, folder: Path) -> None:
    (problem,) = problems_of(lambda: read_lora(folder / WEIGHTS, None))
    assert "for peft's LoRA, name its folder" in problem
    file = random_adapter(LLAMA)
    adapter = write_adapter(tmp_path / "tied.nemo", file.config, file.shapes, file.state, file.yaml)
    assert "this is a Tied-LoRA adapter already" in problems_of(lambda: read_lora(adapter, None))[0]
    with (tmp_path / "base.nemo").open("wb") as handle:
        write_tar(handle, {"model_config.yaml": yaml.safe_dump(LLAMA).encode(), "model_weights.ckpt": b""})
    assert "has no peft.lora_tuning" in problems_of(lambda: read_lora(tmp_path / "base.nemo", None))[0]
