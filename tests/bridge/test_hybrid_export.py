# SPDX-License-Identifier: Apache-2.0
"""One process: an adapter on Nemotron-H, which Bridge builds as a HybridModel, goes to peft by the pattern's places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from nemo_tied_lora import save_adapter
from nemo_tied_lora.bridge import TiedLoRA
from nemo_tied_lora.bridge.hugging_face_adapter import _renaming
from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.conversion.to_peft_lora import check_hf_peft, write_hf_peft
from nemo_tied_lora.planning.base_config import recorded_model_keys
from tests.bridge.hugging_face_model import load_through_bridge
from tests.harness.ranks import single_process

WORDS, LENGTH = 64, 9
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 16,  # more than the tokens: over several chunks, transformers 5.12 on a CPU sums along another dim
    "use_mamba_kernels": False,
}


def save_base(pattern: str, folder: Path) -> Any:
    config = transformers.NemotronHConfig(hybrid_override_pattern=pattern, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    # transformers 5 writes another name than NVIDIA's files have, which are those that Bridge reads.
    names = {"backbone.embedding.weight": "backbone.embeddings.weight"}
    save_file({names.get(name, name): t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    return model


@pytest.fixture(autouse=True)
def one_rank() -> None:
    single_process()


@pytest.mark.parametrize(("pattern", "own_layers"), [("M*-M*-", {1, 2, 4, 5}), ("*-*-", {0, 1})])
def test_transformers_with_peft_gives_megatrons_logits(pattern: str, own_layers: set[int], tmp_path: Path) -> None:
    """A paired pattern too: the adapter counts pairs, and Nemotron-H's files count places."""
    base, peft = save_base(pattern, tmp_path / "base"), TiedLoRA(rank=3, alpha=5.0)
    bridge, model = load_through_bridge(tmp_path / "base", peft)
    assert {layer for shape in peft.adapter.shapes.values() for layer in shape.layers} == own_layers
    tokens = torch.randint(0, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(8))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]

    def megatron() -> torch.Tensor:
        return model[0](tokens, torch.arange(LENGTH).expand(2, -1), mask)[..., :WORDS]

    def hugging_face(adapter: Path | None) -> torch.Tensor:
        adapted = base if adapter is None else PeftModel.from_pretrained(base, adapter)
        found = adapted(tokens, use_cache=False).logits
        if adapter is not None:
            adapted.unload()
        return found

    with torch.no_grad():
        with peft.disable_adapter(model):
            assert difference(hugging_face(None), megatron()) < 1e-5
        for parameter in peft.adapter.parameters():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        peft.save_hf_adapter(model, tmp_path / "adapter", bridge)
        expected = megatron()
        assert difference(hugging_face(None), expected) > 0.1
        assert difference(hugging_face(tmp_path / "adapter"), expected) < 1e-5
        places = {place for place, letter in enumerate(pattern) if letter != "M"}
        assert places_of(tmp_path / "adapter") == places
        if pattern[0] == "M":  # the command's export: without Bridge, by what the adapter's file records
            file = read_adapter(save_adapter(peft.adapter, tmp_path / "adapter.nemo"))
            keys = recorded_model_keys(file.yaml)
            write_hf_peft(file, keys, tmp_path / "exported", None)
            assert check_hf_peft(tmp_path / "exported", file, keys).relative < 1e-5
            assert places_of(tmp_path / "exported") == places
            assert difference(hugging_face(tmp_path / "exported"), expected) < 1e-5


def test_a_model_whose_code_comes_with_its_files_has_their_names() -> None:
    config = transformers.NemotronHConfig(hybrid_override_pattern="*-", **SIZES)
    name = "backbone.layers.0.mixer.q_proj.weight"
    assert _renaming(config)(name) == "model.layers.0.mixer.q_proj.weight"
    config.auto_map = {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}
    assert _renaming(config)(name) == _renaming(None)(name) == name


def places_of(folder: Path) -> set[int]:
    """The numbers of the layers in the names of an exported folder's linears."""
    names = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    return {int(name.partition("layers.")[2].partition(".")[0]) for name in names}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits, relative to the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
