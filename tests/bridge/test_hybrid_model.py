# SPDX-License-Identifier: Apache-2.0
"""One process: an adapter on megatron-core's HybridModel, and its files to and from GPTModel. Imports no Bridge.

tests/parity trains HybridModel on every layout, with a quantised base and a rank budget too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject, load_adapter, quantize_base, save_adapter
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.checkpoint.base_identity import BaseMismatchError
from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt, full_tensor
from tests.harness.tiny_hybrid import Mixer

LAYERS, PAIRS, MAMBA = 3, "*-*-*-", "M*-M*-"
LLAMA: dict[str, Any] = {"llama": True, "groups": 2}
CONFIGS = {
    "tl6": TiedLoraConfig.preset("tl6", rank=3),
    "lora": TiedLoraConfig.preset("lora", rank=3, alpha=5.0),
    "some": TiedLoraConfig.preset("tl5", rank=3, layers=[0, 2], targets=["linear_proj", "linear_fc1"]),
}


@pytest.fixture(autouse=True)
def one_rank() -> None:
    single_process()


def injected(model: Any, config: TiedLoraConfig = CONFIGS["tl6"]) -> Adapter:
    """The model's adapter, with random factors that depend only on their names."""
    adapter = inject(model, config)
    shapes = expected_shapes(adapter.config, adapter.shapes)
    adapter.load_full_state({name: full_tensor(f"start {name}", shape) for name, shape in shapes.items()})
    return adapter


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(tokens, torch.arange(SEQUENCE).expand(2, -1), mask)


@pytest.mark.parametrize(
    ("config", "style"), [("tl6", LLAMA), ("lora", {}), ("some", LLAMA)], ids=["tl6", "lora, GPT-2 style", "some"]
)
def test_a_pattern_of_pairs_gives_gpt_models_file_byte_for_byte(config: str, style: dict, tmp_path: Path) -> None:
    """The untrained adapter's random numbers too: they depend on the layers' numbers."""
    gpt, hybrid = build_gpt(num_layers=LAYERS, **style), build_gpt(pattern=PAIRS, **style)
    for name, fill in (("untrained", inject), ("random", injected)):
        files = []
        for kind, model in (("gpt", gpt), ("hybrid", hybrid)):
            adapter = fill(model, CONFIGS[config])
            files.append(save_adapter(adapter, tmp_path / f"{kind}, {name}.nemo"))
            adapter.remove()
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_file_loads_in_the_other_model_and_back_with_the_same_logits(tmp_path: Path) -> None:
    gpt, hybrid = build_gpt(num_layers=LAYERS, **LLAMA), build_gpt(pattern=PAIRS, **LLAMA)
    sent = save_adapter(injected(gpt), tmp_path / "gpt.nemo")
    back = save_adapter(load_adapter(hybrid, sent), tmp_path / "hybrid.nemo")
    assert torch.equal(logits(hybrid), logits(gpt))
    again = build_gpt(num_layers=LAYERS, **LLAMA)
    base = logits(again)
    load_adapter(again, back)
    assert torch.equal(logits(again), logits(gpt))
    assert not torch.equal(base, logits(gpt))


def test_another_base_is_found_by_gpt_models_names(tmp_path: Path) -> None:
    sent = save_adapter(injected(build_gpt(num_layers=LAYERS, **LLAMA)), tmp_path / "gpt.nemo")
    hybrid = build_gpt(pattern=PAIRS, **LLAMA)
    hybrid.decoder.final_norm.weight.data[3] += 1
    with pytest.raises(BaseMismatchError, match=r"other weights: decoder\.final_layernorm\.weight \("):
        load_adapter(hybrid, sent)


def test_the_linears_of_mamba_stay_as_they_are(tmp_path: Path) -> None:
    model = build_gpt(pattern=MAMBA, **LLAMA)
    before = logits(model)
    adapter = injected(model)
    assert {target: shape.layers for target, shape in adapter.shapes.items()} == {
        "linear_qkv": (1, 4),
        "linear_proj": (1, 4),
        "linear_fc1": (2, 5),
        "linear_fc2": (2, 5),
    }
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    linears = [linear for mixer in mixers for linear in (mixer.in_proj, mixer.out_proj)]
    assert [type(linear).__name__ for linear in linears] == ["ColumnParallelLinear", "RowParallelLinear"] * 2
    assert not any(linear.weight.requires_grad for linear in linears)
    adapted = logits(model)
    path = save_adapter(adapter, tmp_path / "adapter.nemo")
    again = build_gpt(pattern=MAMBA, **LLAMA)
    load_adapter(again, path)
    assert torch.equal(logits(again), adapted)
    assert not torch.equal(adapted, before)


@pytest.mark.parametrize("pattern", [PAIRS, MAMBA])
def test_merged_the_logits_are_the_adapted_ones_and_unmerged_the_base_is_back(pattern: str) -> None:
    model = build_gpt(pattern=pattern, **LLAMA)
    base = logits(model)
    adapter = injected(model)
    adapted = logits(model)
    adapter.merge()
    assert torch.allclose(logits(model), adapted, rtol=1e-9, atol=1e-9)
    adapter.unmerge()
    assert torch.equal(logits(model), adapted)
    adapter.detach()
    assert torch.equal(logits(model), base)


def test_a_selected_layer_is_a_pair_or_a_place_of_the_pattern() -> None:
    paired = inject(build_gpt(pattern=PAIRS, **LLAMA), TiedLoraConfig(rank=3, layers=[1]))
    assert {shape.layers for shape in paired.shapes.values()} == {(1,)}
    assert [linear.module for linear in paired.chunks[0].linears] == [
        paired.chunks[0].body.decoder.layers[place].get_submodule(path)
        for place, path in (
            (2, "self_attention.linear_proj"),
            (2, "self_attention.linear_qkv"),
            (3, "mlp.linear_fc1"),
            (3, "mlp.linear_fc2"),
        )
    ]
    chosen = TiedLoraConfig(rank=3, layers=[2, 4], targets=["linear_qkv", "linear_fc2"])
    mamba = inject(build_gpt(pattern=MAMBA, **LLAMA), chosen)
    assert {target: shape.layers for target, shape in mamba.shapes.items()} == {"linear_qkv": (4,), "linear_fc2": (2,)}


@pytest.mark.parametrize(
    ("pattern", "fields", "message"),
    [
        ("MM", {}, r"none of linear_qkv, .* \(hybrid_layer_pattern=MM: .*; the linears of M are no targets\)"),
        (
            "M*M",
            {"targets": ["linear_fc1", "linear_qkv"]},
            r"linear_fc1 matches no linear .* has linear_qkv .*pattern=M\*M",
        ),
        (MAMBA, {"layers": [0, 1, 2, 3]}, None),
        (MAMBA, {"layers": [0]}, r"layers: \[0\] has no layer with a linear_qkv; layers 1, 4 have one\n"),
        (MAMBA, {"layers": [6]}, r"layers: \[6\] do not exist; the model has layers 0 to 5$"),
        (PAIRS, {"layers": [3]}, r"the model has layers 0 to 2 of two places each in the pattern \*-\*-\*-$"),
    ],
)
def test_what_a_pattern_lacks_is_named(pattern: str, fields: dict[str, Any], message: str | None) -> None:
    model = build_gpt(pattern=pattern, **LLAMA)
    if message is None:
        inject(model, TiedLoraConfig(rank=3, **fields))
        return
    with pytest.raises(ConfigError, match=message):
        inject(model, TiedLoraConfig(rank=3, **fields))


def test_a_file_for_another_pattern_is_refused_by_both_patterns(tmp_path: Path) -> None:
    path = save_adapter(injected(build_gpt(pattern=MAMBA, **LLAMA)), tmp_path / "adapter.nemo")
    assert read_adapter(path).yaml["base"]["architecture"]["hybrid_layer_pattern"] == MAMBA
    with pytest.raises(
        BaseMismatchError, match=r"pattern: the adapter was trained on 'M\*-M\*-', this model has '\*-MM\*-'"
    ):
        load_adapter(build_gpt(pattern="*-MM*-", **LLAMA), path)
    with pytest.raises(
        BaseMismatchError, match=r"trained on 'M\*-M\*-', this model has attention and MLP in every layer"
    ):
        load_adapter(build_gpt(pattern=PAIRS, **LLAMA), path)


def test_the_quantised_linears_have_gpt_models_names() -> None:
    sizes = {"hidden": 64, "ffn": 64, **LLAMA}
    gpt, hybrid = (quantize_base(build_gpt(**sizes, **kind)) for kind in ({"num_layers": 2}, {"pattern": "*-*-"}))
    assert sorted(hybrid.linears) == sorted(gpt.linears)
    assert quantize_base(build_gpt(pattern="M*-", **sizes)).linears[0].startswith("layers.1.")
