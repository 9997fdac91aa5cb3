# SPDX-License-Identifier: Apache-2.0
"""An adapter goes to peft for any model family of Bridge: transformers with peft gives Megatron's logits.

Small random models. Their attention has norms of queries and keys (Qwen3), another norm and activation (Gemma), experts
(Qwen3-MoE).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from nemo_tied_lora import ConfigError
from nemo_tied_lora.bridge import TiedLoRA
from nemo_tied_lora.platform import prepare
from tests.harness.ranks import run_ranks, single_process

WORDS, LENGTH = 64, 9
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
}
EXPERTS = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
FAMILIES: dict[str, Any] = {
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=False),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS),
}


def save_base(family: str, folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(list(FAMILIES).index(family))
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(folder)
    return model


def adapted(base: Path, peft: TiedLoRA) -> tuple[Any, list[Any]]:
    """Bridge and its model with a random adapter: the same on every layout."""
    from tests.bridge.hugging_face_model import load_through_bridge

    bridge, model = load_through_bridge(base, peft)
    assert peft.adapter is not None
    state = peft.adapter.full_state()
    for name in sorted(state):
        state[name].normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    peft.adapter.load_full_state(state)
    return bridge, model


def written_on_a_rank(base: str, output: str) -> None:
    prepare(bridge=True)
    peft = TiedLoRA(rank=3, alpha=5.0)
    bridge, model = adapted(Path(base), peft)
    peft.save_hf_adapter(model, output, bridge)


@pytest.fixture(autouse=True)
def one_rank() -> None:
    single_process()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_with_peft_gives_megatrons_logits(family: str, tmp_path: Path) -> None:
    base, peft = save_base(family, tmp_path / "base"), TiedLoRA(rank=3, alpha=5.0)
    bridge, model = adapted(tmp_path / "base", peft)
    peft.save_hf_adapter(model, tmp_path / "adapter", bridge)
    tokens = torch.randint(0, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(8))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        expected = model[0](tokens, torch.arange(LENGTH).expand(2, -1), mask)[..., :WORDS]
        assert difference(base(tokens).logits, expected) > 0.1
        assert difference(PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits, expected) < 1e-5


def test_the_folder_of_four_ranks_is_that_of_one(tmp_path: Path) -> None:
    save_base("qwen3", tmp_path / "base")
    one, four = tmp_path / "one", tmp_path / "four"
    written_on_a_rank(str(tmp_path / "base"), str(one))
    run_ranks(written_on_a_rank, str(tmp_path / "base"), str(four), world_size=4, tp=2, pp=2)
    assert (one / "adapter_config.json").read_text() == (four / "adapter_config.json").read_text()
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (one, four))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_only_the_adapted_linears_are_named(tmp_path: Path) -> None:
    save_base("qwen3", tmp_path / "base")
    peft = TiedLoRA(rank=3, targets=["linear_proj"], layers=[1])
    bridge, model = adapted(tmp_path / "base", peft)
    peft.save_hf_adapter(model, tmp_path / "adapter", bridge)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.o_proj"]


def test_what_plain_lora_cannot_express_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Here a mapping that adds rows, as some families do with their experts, or that gives no name at all."""
    from nemo_tied_lora.bridge.hugging_face_adapter import write_peft_folder

    save_base("qwen3", tmp_path / "base")
    peft = TiedLoRA(rank=3, targets=["linear_proj"], layers=[1])
    bridge, model = adapted(tmp_path / "base", peft)
    tasks = [task for task in bridge.get_conversion_tasks(model) if task is not None]
    (task,) = [
        task for task in tasks if task.global_param_name == "decoder.layers.1.self_attention.linear_proj.weight"
    ]
    plain = task.mapping.megatron_to_hf
    task.mapping.megatron_to_hf = lambda *given: {name: weight.cumsum(1) for name, weight in plain(*given).items()}
    with pytest.raises(
        ConfigError, match=r"layer 1 linear_proj: Bridge makes model\.layers\.1\.self_attn\.o_proj\.weight"
    ):
        write_peft_folder(peft.adapter, tasks, tmp_path / "adapter", None)
    with pytest.raises(ConfigError, match=r"layer 1 linear_proj: Bridge has no Hugging Face name for it"):
        write_peft_folder(peft.adapter, [None], tmp_path / "adapter", None)
    assert not (tmp_path / "adapter").exists()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits, relative to the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
