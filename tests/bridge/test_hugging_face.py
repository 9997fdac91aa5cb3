# SPDX-License-Identifier: Apache-2.0
"""One process: Bridge loads a Hugging Face model, and writes a model with an adapter only if the adapter is merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from nemo_tied_lora import ConfigError
from nemo_tied_lora.bridge import TiedLoRA
from tests.bridge.hugging_face_model import load_through_bridge, on_a_cpu
from tests.harness.paths import ROOT
from tests.harness.ranks import single_process

WORDS = 64


class Bridged:
    """A tiny Llama of transformers, and Bridge's model of it with a random adapter."""

    def __init__(self, folder: Path):
        self.base, self.peft = save_llama(folder), TiedLoRA(rank=3)
        self.bridge, self.model = load_through_bridge(folder, self.peft)
        generator = torch.Generator().manual_seed(5)
        for parameter in self.peft.adapter.parameters():
            parameter.data.normal_(std=0.3, generator=generator)

    def logits(self) -> torch.Tensor:
        batch = tokens()
        length = batch.shape[1]
        positions, mask = torch.arange(length).expand(len(batch), -1), torch.ones(length, length, dtype=torch.bool)
        with torch.no_grad():
            return self.model[0](batch, positions, mask.triu(1)[None, None])[..., :WORDS]


@pytest.fixture(scope="module")
def bridged(tmp_path_factory: pytest.TempPathFactory) -> Bridged:
    single_process()
    return Bridged(tmp_path_factory.mktemp("llama"))


def test_a_registered_adapter_comes_after_the_base_and_off_the_model_is_transformers(bridged: Bridged) -> None:
    with bridged.peft.disable_adapter(bridged.model):
        assert difference(bridged.logits(), bridged.base) < 1e-4
    assert difference(bridged.logits(), bridged.base) > 1e-1


def test_an_unmerged_adapter_is_not_written_and_nothing_is(bridged: Bridged, tmp_path: Path) -> None:
    remedy = r"not merged, .*call peft\.adapter\.merge\(\) first"
    with pytest.raises(ConfigError, match=remedy):
        bridged.bridge.save_hf_pretrained(bridged.model, tmp_path / "model")
    with pytest.raises(ConfigError, match=remedy):
        next(iter(bridged.bridge.export_hf_weights(bridged.model)))
    with pytest.raises(ConfigError, match=remedy):
        next(iter(bridged.bridge.export_hf_weights_quant(bridged.model, lambda name: False, lambda *given: None)))
    assert not (tmp_path / "model").exists()


def test_a_merged_adapter_is_in_the_model_that_bridge_writes(bridged: Bridged, tmp_path: Path) -> None:
    adapted = bridged.logits()
    bridged.peft.adapter.merge()
    try:
        bridged.bridge.save_hf_pretrained(bridged.model, tmp_path)
    finally:
        bridged.peft.adapter.unmerge()
    assert difference(adapted, load(tmp_path)) < 1e-4


def test_bridges_own_call_writes_the_adapter_as_its_checkpoints_do_beside_themselves(
    bridged: Bridged, tmp_path: Path
) -> None:
    """So with checkpoint.also_save_hf_checkpoint."""
    bridged.peft.save_hf_adapter(bridged.model, tmp_path / "ours", bridged.bridge)
    bridged.bridge.save_hf_adapter(
        bridged.model, tmp_path / "bridges", peft_config=bridged.peft, base_model_name_or_path="my/base"
    )
    ours, bridges = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "bridges"))
    assert ours.keys() == bridges.keys()
    assert all(torch.equal(bridges[name], tensor) for name, tensor in ours.items())
    config = json.loads((tmp_path / "bridges" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, "my/base")
    with pytest.raises(ConfigError, match="exclude_adapter_base_prefixes: not with TiedLoRA"):
        bridged.bridge.save_hf_adapter(bridged.model, tmp_path, bridged.peft, exclude_adapter_base_prefixes=["mtp"])


def test_the_pages_script_trains_with_megatrons_sums(
    bridged: Bridged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them Megatron's schedule would sum nothing. The script's provider gets layers that a CPU can run."""
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.utils import get_model_config

    class Bridge:
        def to_megatron_provider(self) -> Any:
            provider = bridged.bridge.to_megatron_provider()
            on_a_cpu(provider)
            return provider

    def my_loop(models: list[Any]) -> None:
        assert [type(model).__name__ for model in models] == ["DistributedDataParallel"]
        assert get_model_config(models[0]).finalize_model_grads_func is finalize_model_grads

    page = (ROOT / "docs" / "bridge.md").read_text().partition("\n## In a script\n")[2]
    script: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], script)
    monkeypatch.chdir(tmp_path)
    script["train"](Bridge(), DistributedDataParallelConfig(), my_loop)
    assert (tmp_path / "adapter.nemo").is_file()


def test_with_the_adapter_off_bridge_writes_the_base(bridged: Bridged, tmp_path: Path) -> None:
    with bridged.peft.disable_adapter(bridged.model):
        bridged.bridge.save_hf_pretrained(bridged.model, tmp_path)
    written, base = load(tmp_path).state_dict(), bridged.base.state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in base.items())


def save_llama(folder: Path) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return model


def load(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(6))


def difference(logits: torch.Tensor, model: Any) -> float:
    """The largest difference of logits, relative to the largest logit."""
    with torch.no_grad():
        expected = model(tokens()).logits
    return ((logits - expected).abs().max() / expected.abs().max()).item()
