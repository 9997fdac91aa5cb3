# SPDX-License-Identifier: Apache-2.0
"""One process, no NeMo: compares exports with models of transformers and peft, and runs the command."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors import safe_open

from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.commands.main import main
from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.conversion.hf_families import FAMILIES, BaseSizes, join_rows, split_rows
from nemo_tied_lora.conversion.to_nemo_lora import check_nemo_lora, write_nemo_lora
from nemo_tied_lora.conversion.to_peft_lora import check_hf_peft, write_hf_peft
from nemo_tied_lora.conversion.to_safetensors import check_full_state, write_full_state
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.base_config import recorded_model_keys
from tests.conversion.hugging_face_bases import hugging_face_model, logits, with_deltas
from tests.harness.random_adapters import GPT2, LLAMA, delta, pruned, random_adapter

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tl6": (LLAMA, {"preset": "tl6"}),
    "tl6, alpha 5": (LLAMA, {"preset": "tl6", "alpha": 5.0}),
    "tl6, alpha that is not whole": (LLAMA, {"preset": "tl6", "alpha": 2.5}),
    "tl6, alpha / sqrt(rank)": (LLAMA, {"preset": "tl6", "alpha": 5.0, "alpha_rule": "sqrt"}),
    "lora": (LLAMA, {"preset": "lora"}),
    "tl5, some layers and targets": (LLAMA, {"preset": "tl5", "layers": [1, 3], "targets": ["linear_qkv", "mlp_fc2"]}),
    "vera": (LLAMA, {"preset": "vera"}),
    "gpt2": (GPT2, {"preset": "tl6", "alpha": 7.0}),
    "gpt2, one c_proj of two": (GPT2, {"preset": "tl6", "layers": [2], "targets": ["linear_proj", "mlp_fc1"]}),
    "gpt2, the other c_proj": (GPT2, {"preset": "tl6", "targets": ["linear_fc2"]}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["tl6, alpha 5", "tl6, alpha / sqrt(rank)", "gpt2"])
def test_peft_loads_a_pruned_adapter_by_its_patterns_with_the_same_logits(tmp_path: Path, case: str) -> None:
    base, fields = CASES[case]
    file = pruned(random_adapter(base, **fields))
    folder = write_hf_peft(file, base, tmp_path / "peft", None)
    expected = logits(with_deltas(base, file))
    assert (expected - logits(hugging_face_model(base))).abs().max() > 0.1
    loaded = peft.PeftModel.from_pretrained(hugging_face_model(base), str(folder))
    assert torch.allclose(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    assert check_hf_peft(folder, file, base).relative < 1e-6
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["r"] == config["lora_alpha"] == file.config.rank
    ranks = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        for key in (key for key in tensors.keys() if "lora_A" in key):  # noqa: SIM118  not a dictionary
            linear = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            A, B = tensors.get_tensor(key), tensors.get_tensor(key.replace("lora_A", "lora_B"))
            ranks[linear] = config["rank_pattern"].get(linear, config["r"])
            assert len(A) == B.shape[1] == ranks[linear]
    assert set(ranks.values()) == set(config["rank_pattern"].values()) | {config["r"]} >= {1, 3}
    assert 0 in file.ranks().values()
    without = {**config, "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps({**without, "lora_alpha": 2 * config["r"]}))
    assert check_hf_peft(folder, file, base).relative > 0.5, "the check reads the scale"


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_folder_onto_the_hugging_face_model_with_the_same_logits(tmp_path: Path, case: str) -> None:
    base, fields = CASES[case]
    file = random_adapter(base, **fields)
    folder = write_hf_peft(file, base, tmp_path / "peft", "my/base")
    alone = logits(hugging_face_model(base))
    expected = logits(with_deltas(base, file))
    assert (expected - alone).abs().max() > 0.1
    loaded = peft.PeftModel.from_pretrained(hugging_face_model(base), str(folder))
    got = logits(loaded)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4), (got - expected).abs().max()
    assert torch.allclose(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    assert check_hf_peft(folder, file, base).relative < 1e-6
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "my/base"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(("rank", "alpha"), [(4, 12), (3, 3)])
def test_alpha_over_the_root_of_the_rank_becomes_pefts_plain_rule(tmp_path: Path, rank: int, alpha: int) -> None:
    """6 sqrt(4) = 12 is whole, so B keeps its bits; 6 sqrt(3) is not, so B holds 6 / sqrt(3)."""
    file = random_adapter(LLAMA, preset="lora", rank=rank, alpha=6, alpha_rule="sqrt", targets=["linear_proj"])
    folder = write_hf_peft(file, LLAMA, tmp_path / "peft", None)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, alpha, False)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        B = tensors.get_tensor("base_model.model.model.layers.2.self_attn.o_proj.lora_B.weight")
    own = file.state["layers.2.linear_proj.B"]
    assert torch.equal(B, own) if rank == 4 else torch.allclose(B, own * 6 / 3**0.5)
    assert "| alpha | 6, over the square root of the rank |" in (folder / "README.md").read_text()
    nemo = write_nemo_lora(file, LLAMA, tmp_path / "lora.nemo")
    assert check_nemo_lora(nemo, file).relative < 1e-6
    assert check_hf_peft(folder, file, LLAMA).relative < 1e-6


@pytest.mark.parametrize("case", ["tl6", "tl5, some layers and targets", "gpt2, one c_proj of two"])
def test_peft_finds_a_linear_for_every_tensor_and_a_tensor_for_every_linear(tmp_path: Path, case: str) -> None:
    base, fields = CASES[case]
    file = random_adapter(base, **fields)
    folder = write_hf_peft(file, base, tmp_path / "peft", None)
    model = peft.get_peft_model(hugging_face_model(base), peft.LoraConfig.from_pretrained(str(folder)))
    wanted = {n.replace(".default", "") for n, _ in model.named_parameters() if "lora_" in n}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        assert set(tensors.keys()) == wanted


@pytest.mark.parametrize("case", CASES)
def test_the_nemo_lora_file_adds_what_the_tied_formula_adds(tmp_path: Path, case: str) -> None:
    base, fields = CASES[case]
    file = random_adapter(base, **fields)
    path = write_nemo_lora(file, base, tmp_path / "lora.nemo")
    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    state = torch.load(io.BytesIO(members["model_weights.ckpt"]), weights_only=True)
    tuning = yaml.safe_load(members["model_config.yaml"])["peft"]["lora_tuning"]
    # TensorRT-LLM's reader does not look at alpha.
    assert tuning["alpha"] == tuning["adapter_dim"] == file.config.rank
    assert tuning["layer_selection"] == [layer + 1 for layer in file.shapes[file.config.targets[0]].layers]
    blocks = {
        "linear_qkv": "self_attention.adapter_layer.lora_kqv_adapter",
        "linear_proj": "self_attention.adapter_layer.lora_dense_attention_adapter",
        "linear_fc1": "mlp.adapter_layer.lora_hto4h_adapter",
        "linear_fc2": "mlp.adapter_layer.lora_4htoh_adapter",
    }
    for target, shape in file.shapes.items():
        for layer in shape.layers:
            name = f"model.decoder.layers.{layer}.{blocks[target]}"
            A, B = state.pop(f"{name}.linear_in.weight"), state.pop(f"{name}.linear_out.weight")
            got = B.double() @ A.double()
            assert torch.allclose(got, delta(file, layer, target), rtol=1e-5, atol=1e-6)
    assert state == {}
    assert check_nemo_lora(path, file).relative < 1e-6


def test_safetensors_own_reader_opens_the_full_state(tmp_path: Path) -> None:
    file = random_adapter(LLAMA, preset="tl6")
    path = write_full_state(file, tmp_path / "state.safetensors")
    with safe_open(path, framework="pt") as tensors:
        assert set(tensors.keys()) == set(file.state)
        assert json.loads(tensors.metadata()["tied_lora"]) == file.config.as_dict()
    assert check_full_state(path, file).relative == 0.0


@pytest.mark.parametrize("fault", ["v", "u", "alpha", "rule", "rows"])
def test_the_check_of_the_written_file_finds_a_wrong_export(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = random_adapter(LLAMA, preset="tl6")
    wrong = {name: torch.ones_like(t) if name.endswith(f".{fault}") else t for name, t in file.state.items()}
    fields = {"alpha": {"alpha": 4.0}, "rule": {"alpha": 3.0, "alpha_rule": "sqrt"}}.get(fault, {})
    config = random_adapter(LLAMA, preset="tl6", **fields).config
    if fault == "rows":
        monkeypatch.setattr("nemo_tied_lora.conversion.to_peft_lora.split_rows", _in_the_order_of_the_file)
    folder = write_hf_peft(AdapterFile(config, file.shapes, wrong, file.yaml), LLAMA, tmp_path / "peft", None)
    assert check_hf_peft(folder, file, LLAMA).relative > 0.01


def _in_the_order_of_the_file(tensor: torch.Tensor, target: str, parts: Any, sizes: BaseSizes) -> list[torch.Tensor]:
    return list(tensor.split([len(sizes.rows(target, part.share)) for part in parts]))


@pytest.mark.parametrize("family", FAMILIES)
def test_splitting_and_joining_rows_is_the_identity(family: str) -> None:
    sizes = BaseSizes.from_model_config(LLAMA if FAMILIES[family].gated else GPT2, "base")
    for target in TARGETS:
        whole = torch.randn(sizes.linears[target].out_features, 2)
        parts = FAMILIES[family].targets[target]
        assert torch.equal(join_rows(split_rows(whole, target, parts, sizes), target, parts, sizes), whole)


def test_a_base_of_an_unknown_family_or_other_shapes_is_refused(tmp_path: Path) -> None:
    file = random_adapter(LLAMA, preset="tl6")
    with pytest.raises(ConfigError, match=r"not built as gpt2.*'rmsnorm'"):
        write_hf_peft(file, {**LLAMA, "position_embedding_type": "learned_absolute"}, tmp_path / "peft", None)
    with pytest.raises(ConfigError, match=r"its linear_qkv is \(24, 96\)"):
        write_hf_peft(file, {**LLAMA, "num_query_groups": 3}, tmp_path / "peft", None)
    with pytest.raises(ConfigError, match=r"its linear_fc2 is \(48, 24\)"):
        write_nemo_lora(file, {**LLAMA, "ffn_hidden_size": 48}, tmp_path / "lora.nemo")
    with pytest.raises(ConfigError, match=r"base=base\.nemo"):
        write_hf_peft(
            file,
            {"normalization": "rmsnorm", "position_embedding_type": "rope", "activation": "swiglu"},
            tmp_path,
            None,
        )
    assert list(tmp_path.iterdir()) == []


def test_targets_in_different_layers_are_named_one_by_one_for_peft_and_refused_for_nemo(tmp_path: Path) -> None:
    whole = random_adapter(LLAMA, preset="tl6")
    layers = {"linear_qkv": (0, 2), "linear_proj": (0, 2), "linear_fc1": (3,), "linear_fc2": (3,)}
    shapes = {target: dataclasses.replace(shape, layers=layers[target]) for target, shape in whole.shapes.items()}
    state = {name: whole.state[name] for name in expected_shapes(whole.config, shapes)}
    file = dataclasses.replace(whole, shapes=shapes, state=state)
    folder = write_hf_peft(file, LLAMA, tmp_path / "peft", None)
    assert check_hf_peft(folder, file, LLAMA).relative < 1e-5
    modules = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) == 2 * 4 + 3
    assert "model.layers.3.mlp.gate_proj" in modules
    assert "| layers | linear_qkv [0, 2]; linear_proj [0, 2]; linear_fc1 [3]" in (folder / "README.md").read_text()
    loaded = logits(peft.PeftModel.from_pretrained(hugging_face_model(LLAMA), folder))
    assert torch.allclose(loaded, logits(with_deltas(LLAMA, file)), atol=1e-5)
    with pytest.raises(
        ConfigError, match=r"linear_fc1 is adapted in layers \[3\], other targets in others.* to=hf-peft"
    ):
        write_nemo_lora(file, LLAMA, tmp_path / "lora.nemo")


def test_of_a_pattern_only_nemotron_h_is_known(tmp_path: Path) -> None:
    """tests/bridge compares an export of Nemotron-H with transformers. Without the pattern this base would be a Llama."""
    file = random_adapter(LLAMA, preset="tl6")
    with pytest.raises(ConfigError, match=r"not built as nemotron_h: position_embedding_type='rope' .*activation"):
        write_hf_peft(file, {**LLAMA, "hybrid_layer_pattern": "M*-*"}, tmp_path / "peft", None)


def test_an_old_export_is_replaced_and_any_other_folder_is_not(tmp_path: Path) -> None:
    file, folder = random_adapter(LLAMA, preset="tl6"), tmp_path / "peft"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"exists and is not an export, it holds thesis\.tex"):
        write_hf_peft(file, LLAMA, folder, None)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    (folder / "thesis.tex").unlink()
    write_hf_peft(file, LLAMA, folder, "one")
    (folder / "notes.txt").write_text("beside an export")
    with pytest.raises(ConfigError, match=r"it holds notes\.txt"):
        write_hf_peft(file, LLAMA, folder, "two")
    assert (folder / "notes.txt").read_text() == "beside an export"
    (folder / "notes.txt").unlink()
    write_hf_peft(file, LLAMA, folder, "two")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = random_adapter(LLAMA, preset="tl6")
    folder = write_hf_peft(file, LLAMA, tmp_path / "peft", "old")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_tied_lora.conversion.to_peft_lora.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_hf_peft(file, LLAMA, folder, "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_a_record_of_megatrons_config_is_read_as_nemos_keys() -> None:
    architecture = {
        **{key: LLAMA[key] for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
        "num_query_groups": 2,
        "kv_channels": 8,
        "gated_linear_unit": True,
        "activation": "silu",
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
    }
    keys = recorded_model_keys({"base": {"name": "x.nemo", "architecture": architecture, "fingerprint": {"a": 1}}})
    assert keys == LLAMA
    assert recorded_model_keys({}) == {}


@pytest.mark.parametrize("to", ["hf-peft", "nemo-lora", "safetensors"])
def test_the_command_writes_and_checks(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = random_adapter(LLAMA, preset="tl6")
    adapter = write_adapter(tmp_path / "adapter.nemo", file.config, file.shapes, file.state, file.yaml)
    assert main(["export", f"adapter={adapter}", f"to={to}", f"output={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert f"written: {tmp_path / 'out'}" in out
    assert "check: read back" in out
    refused = (
        "note: TensorRT-LLM reads linear_qkv alone from this format, and refuses a file with linear_proj, linear_fc1"
    )
    assert (refused in out) == (to == "nemo-lora")


def test_a_pruned_adapter_is_written_with_one_rank_for_readers_without_patterns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pruned(random_adapter(LLAMA, preset="tl6", alpha=5.0))
    adapter = write_adapter(tmp_path / "adapter.nemo", file.config, file.shapes, file.state, file.yaml, file.masks)
    command = ["export", f"adapter={adapter}", "to=hf-peft", f"output={tmp_path / 'out'}"]
    assert main(command) == 0
    assert "note: llama.cpp and TensorRT-LLM do not read the ranks of a pruned adapter" in capsys.readouterr().out
    assert main([*command, "uniform_rank=true"]) == 0
    assert "note:" not in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    loaded = peft.PeftModel.from_pretrained(hugging_face_model(LLAMA), str(tmp_path / "out"))
    assert torch.allclose(logits(loaded), logits(with_deltas(LLAMA, file)), rtol=1e-4, atol=1e-4)


def test_the_command_reports_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "to=gguf", "adapter=none.nemo", "base=base.nemo", "uniform_rank=3"]) == 2
    printed = capsys.readouterr().err
    for part in (
        "to='gguf': unknown",
        "adapter=none.nemo: no such file",
        "output=null",
        "base=base.nemo: no such file",
        "uniform_rank=3: must be true or false",
    ):
        assert part in printed
