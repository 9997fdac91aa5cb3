# SPDX-License-Identifier: Apache-2.0
"""One process, no NeMo: reads LoRA adapters, peft's own and exported ones, and fits tied adapters to them."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.checkpoint.tar import write_tar
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.commands.main import main
from nemo_tied_lora.conversion.lora_to_tied import read_lora
from nemo_tied_lora.conversion.nemo_lora_config import read_members_of
from nemo_tied_lora.conversion.to_nemo_lora import write_nemo_lora
from nemo_tied_lora.conversion.to_peft_lora import write_hf_peft
from nemo_tied_lora.errors import ConfigError
from tests.conversion.hugging_face_bases import hugging_face_model
from tests.harness.random_adapters import GPT2, LLAMA, delta, random_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base `.nemo` with only a config."""
    return base_file(tmp_path / "base.nemo", LLAMA)


def base_file(path: Path, model: dict[str, Any]) -> Path:
    with path.open("wb") as file:
        write_tar(file, {"model_config.yaml": yaml.safe_dump(model).encode()})
    return path


@pytest.mark.parametrize("preset", ["tl6", "tl5", "lora"])
def test_an_adapter_exported_to_peft_is_imported_again(
    tmp_path: Path, base: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = random_adapter(LLAMA, preset=preset, alpha=5.0, layers=[0, 2, 3])
    folder = write_hf_peft(file, LLAMA, tmp_path / "peft", None)
    words = [f"path={folder}", f"base={base}", f"output={tmp_path / 'back.nemo'}", "rank=3", f"preset={preset}"]
    assert main(["import", "from=lora", *words]) == 0
    back = read_adapter(tmp_path / "back.nemo")
    assert back.config.layers == (0, 2, 3)
    assert back.shapes == file.shapes
    for target, shape in file.shapes.items():
        for layer in shape.layers:
            expected = delta(file, layer, target)
            # The file is float32.
            assert (delta(back, layer, target) - expected).norm() < 1e-5 * expected.norm(), (layer, target)
    printed = capsys.readouterr().out
    assert "relative error" in printed
    assert "layer 2" in printed
    assert re.search(r"check: read back, its relative error over all layers is linear_qkv \S+e-0[6-9],", printed)
    assert max(back.yaml["fitted"]["relative_errors"]["linear_qkv"].values()) < 1e-6


def test_a_file_that_is_further_from_the_lora_than_the_fit_is_reported(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(path: Path, config: Any, shapes: Any, state: dict[str, torch.Tensor], facts: Any) -> Path:
        names = ["layers.0.linear_proj.v", "layers.3.linear_proj.v"]
        state |= {names[0]: state[names[1]], names[1]: state[names[0]]}
        return write_adapter(path, config, shapes, state, facts)

    folder = write_hf_peft(random_adapter(LLAMA, preset="tl6"), LLAMA, tmp_path / "peft", None)
    monkeypatch.setattr("nemo_tied_lora.checkpoint.write_nemo_adapter.write_adapter", swapped)
    words = [f"path={folder}", f"base={base}", f"output={tmp_path / 'back.nemo'}", "rank=3"]
    assert main(["import", "from=lora", *words]) == 1
    assert "further away than the fit: linear_proj" in capsys.readouterr().err


def test_an_adapter_exported_to_stock_nemo_is_imported_again_without_its_base(tmp_path: Path) -> None:
    file = random_adapter(GPT2, preset="tl6", targets=["linear_qkv", "linear_fc2"])
    path = write_nemo_lora(file, GPT2, tmp_path / "lora.nemo")
    assert main(["import", "from=lora", f"path={path}", f"output={tmp_path / 'back.nemo'}", "rank=3"]) == 0
    back = read_adapter(tmp_path / "back.nemo")
    assert back.yaml["base"]["num_attention_heads"] == 4
    for target in file.shapes:
        expected = delta(file, 1, target)
        assert (delta(back, 1, target) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_own_adapter_is_read_as_peft_merges_it(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "v_proj", "up_proj"],
        use_rslora=rslora,
        alpha_pattern={"v_proj": 7},
    )
    model = peft.get_peft_model(hugging_face_model(LLAMA), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "peft")
    lora = read_lora(tmp_path / "peft", LLAMA)
    assert set(lora.deltas) == {"linear_qkv", "linear_fc1"}
    before = hugging_face_model(LLAMA).state_dict()
    merged = model.merge_and_unload().state_dict()
    for layer in range(4):
        name = f"model.layers.{layer}"
        q, k, v, gate, up = (
            (merged[f"{name}.{part}.weight"] - before[f"{name}.{part}.weight"]).double()
            for part in (*(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj")
        )
        assert k.abs().max() == gate.abs().max() == 0
        groups = zip(q.chunk(2), k.chunk(2), v.chunk(2), strict=True)
        expected = torch.cat([part for group in groups for part in group])
        for target, want in (("linear_qkv", expected), ("linear_fc1", torch.cat([gate, up]))):
            got = lora.deltas[target][layer]
            assert torch.allclose(got.P @ got.Q, want, atol=1e-5)


def test_an_adapter_of_another_kind_or_base_is_refused(tmp_path: Path, base: Path) -> None:
    folder = write_hf_peft(random_adapter(LLAMA, preset="tl6"), LLAMA, tmp_path / "peft", None)
    with pytest.raises(ConfigError, match=r"\(48, r\)|needs"):
        read_lora(folder, {**LLAMA, "num_attention_heads": 4, "num_query_groups": 4})
    with pytest.raises(ConfigError, match="the base has layers 0 to 1, the LoRA goes up to layer 3"):
        read_lora(folder, {**LLAMA, "num_layers": 2})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True, "bias": "all"}))
    with pytest.raises(ConfigError, match=r"bias='all'(.|\n)*use_dora=True"):
        read_lora(folder, LLAMA)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a peft adapter"):
        read_lora(folder, LLAMA)


def test_a_stock_nemo_lora_of_more_layers_or_another_variant_is_refused(tmp_path: Path) -> None:
    path = write_nemo_lora(random_adapter(LLAMA, preset="tl6"), LLAMA, tmp_path / "lora.nemo")
    with pytest.raises(ConfigError, match=r"layers\.2\.\S+ and 15 more: the base has layers 0 to 1"):
        read_lora(path, {**LLAMA, "num_layers": 2})
    members = read_members_of(path)
    with path.open("wb") as file:
        config = members["model_config.yaml"].replace(b"variant: nemo", b"variant: canonical")
        write_tar(file, {**members, "model_config.yaml": config})
    with pytest.raises(ConfigError, match="variant='canonical': only variant nemo can be read"):
        read_lora(path, LLAMA)


def test_nan_a_truncated_file_and_an_unknown_tensor_are_refused(tmp_path: Path, base: Path) -> None:
    folder = write_hf_peft(random_adapter(LLAMA, preset="tl6"), LLAMA, tmp_path / "peft", None)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * float("nan")}, weights)
    words = ["import", "from=lora", f"path={folder}", f"base={base}", f"output={tmp_path / 'back.nemo'}", "rank=3"]
    assert main(words) == 2
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(1)}, weights)
    with pytest.raises(
        ConfigError, match=r"1 of 57 tensors: base_model\.model\.lm_head\.weight: not the lora_A or lora_B of a linear"
    ):
        read_lora(folder, LLAMA)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lora(folder, LLAMA)
    assert not (tmp_path / "back.nemo").exists()


def test_only_tensors_in_a_nemo_file_are_unpickled(tmp_path: Path) -> None:
    path, content = tmp_path / "evil.nemo", io.BytesIO()
    torch.save({"model.decoder.layers.0.x.linear_in.weight": Evil(tmp_path / "proof")}, content)
    with path.open("wb") as file:
        members = {"model_config.yaml": yaml.safe_dump(lora_description()).encode()}
        write_tar(file, {**members, "model_weights.ckpt": content.getvalue()})
    with pytest.raises(ConfigError, match="cannot be read as tensors alone"):
        read_lora(path, None)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("form", ["tar", "gzip"])
def test_a_truncated_nemo_file_is_refused(tmp_path: Path, form: str) -> None:
    path = write_nemo_lora(random_adapter(LLAMA, preset="tl6"), LLAMA, tmp_path / "lora.nemo")
    whole = path.read_bytes() if form == "tar" else gzip.compress(path.read_bytes())
    path.write_bytes(whole)
    assert read_lora(path, None).deltas
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=rf"^{path}: not a whole \.nemo file: [^\n]+$"):
        read_lora(path, None)


def test_a_nemo_file_that_claims_to_be_larger_than_it_is_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.nemo"
    with gzip.open(path, "wb") as file:
        write_tar(file, {"model_config.yaml": b"a: 1", "model_weights.ckpt": bytes(64 << 20)})
    with pytest.raises(ConfigError, match=r"its model_weights\.ckpt claims 67108864 bytes"):
        read_lora(path, None)
    with path.open("wb") as file:
        write_tar(file, {"model_config.yaml": b"a: 1"})
    with pytest.raises(ConfigError, match=r"bomb\.nemo: model_weights\.ckpt is missing"):
        read_lora(path, None)


def lora_description() -> dict[str, Any]:
    """The keys of a plain LoRA of stock NeMo."""
    section = {"adapter_dim": 3, "target_modules": ["all"]}
    return {**LLAMA, "peft": {"peft_scheme": "lora", "lora_tuning": section}}


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_the_command_reports_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["path=nowhere", "output=x.pt", "rank=0", "model.peft.tied_lora.preset=tl9", "max_iterations=0"]
    assert main(["import", "from=lora", *wrong[:2], "preset=adalora"]) == 2
    assert "preset=adalora: a LoRA says nothing about what its training would prune" in capsys.readouterr().err
    assert main(["import", "from=lora", *wrong]) == 2
    printed = capsys.readouterr().err
    for part in ("path=nowhere", "output=x.pt", "rank=0", "preset='tl9'", "max_iterations=0"):
        assert part in printed
    folder = write_hf_peft(random_adapter(LLAMA, preset="tl6"), LLAMA, tmp_path / "peft", None)
    assert main(["import", "from=lora", f"path={folder}", f"output={tmp_path / 'x.nemo'}"]) == 2
    assert "base=null: name the base's .nemo" in capsys.readouterr().err
    with tarfile.open(base_file(tmp_path / "base.nemo", LLAMA)) as tar:
        assert tar.getnames() == ["model_config.yaml"]


@pytest.mark.parametrize("words", [["import", "from=lora"], ["import", "from=hf-base"], ["export", "to=safetensors"]])
def test_a_path_that_hydra_reads_as_a_number_is_answered_with_how_to_write_it(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = "path" if words[0] == "import" else "adapter"
    assert main([*words, f"{source}=nan", "output=7"]) == 2
    printed = capsys.readouterr().err
    assert f"{source}=nan: is read as float, not as a path; write {source}=./nan" in printed
    assert "output=7: is read as int, not as a path; write output=./7" in printed
