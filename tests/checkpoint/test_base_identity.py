# SPDX-License-Identifier: Apache-2.0
"""One process, then two ranks (one start): an adapter identifies its base on every layout and refuses another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter.quantized.quantize_base import quantize_base
from nemo_tied_lora.adapter.weight_checksums import WeightChecksums, fingerprint_model
from nemo_tied_lora.checkpoint.base_identity import BaseMismatchError, check_weights, describe_base, tokenizer_identity
from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.planning.megatron_version import splits_query_groups
from tests.harness.ranks import run_ranks, single_process
from tests.harness.relayout import relayout
from tests.harness.tiny_gpt import VOCAB, build_gpt, full_tensor

MODELS: dict[str, dict[str, Any]] = {"gpt": {}, "llama": {"llama": True, "groups": 2}}
if splits_query_groups():
    MODELS["one query group"] = {"llama": True, "groups": 1}
LAYOUTS: dict[str, dict[str, int]] = {"tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {}}


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def base_on_every_layout() -> dict[tuple[str, str, str], dict[str, Any]]:
    described = {}
    for layout, sizes in LAYOUTS.items():
        relayout(**sizes)
        for kind, options in MODELS.items():
            for precision in ("whole", "int8"):
                model = build_gpt(**options)
                if precision != "whole":
                    quantize_base(model, precision)
                inject(model, TiedLoraConfig(rank=2))
                described[layout, kind, precision] = describe_base([model])
    return described


def test_the_base_is_the_same_on_every_layout_and_rank() -> None:
    expected = {kind: describe_base([build_gpt(**options)]) for kind, options in MODELS.items()}
    assert expected["gpt"]["fingerprint"]["value"] != expected["llama"]["fingerprint"]["value"]
    for rank in run_ranks(base_on_every_layout, world_size=2, tp=2):
        for (layout, kind, precision), described in rank.items():
            assert described == expected[kind], (layout, kind, precision)


def test_a_quantised_base_has_the_fingerprint_of_its_file() -> None:
    mixture = {"llama": True, "num_moe_experts": 2, "moe_layer_freq": [1, 0, 1, 0], "moe_ffn_hidden_size": 64}
    model = build_gpt(hidden=64, ffn=128, **mixture)
    before = fingerprint_model([model])
    report = quantize_base(model, "nf4", block_size=32)
    assert fingerprint_model([model]) == before
    codes = model.decoder.layers[1].mlp.linear_fc1.weight.dequantize()
    assert len(report.linears) == 4 * 2 + 2 * 2 + 2 * 2 * 2
    # Negative control: the codes' own values have another checksum, and nothing is left out.
    model.decoder.layers[1].mlp.linear_fc1.weight = torch.nn.Parameter(codes, requires_grad=False)
    del model.checksums_before_quantising["decoder.layers.mlp.linear_fc1.weight"]
    changed = fingerprint_model([model])["weights"]
    names = [name for name, value in before["weights"].items() if changed.get(name) != value]
    assert names == ["decoder.layers.mlp.linear_fc1.weight"]


def test_a_file_records_what_the_base_was_held_in(tmp_path: Path) -> None:
    for kind, precision in (("int8", "int8/row"), (None, "float64")):
        model = build_gpt()
        if kind is not None:
            quantize_base(model, kind)
        path = save_adapter(
            inject(model, TiedLoraConfig(rank=2)), tmp_path / "adapter.nemo", {"base_precision": "mine"}
        )
        assert read_adapter(path).yaml["base_precision"] == precision
    model = build_gpt()
    quantize_base(model, "int8")
    assert load_adapter(model, path).config.rank == 2  # the base is the same, held in another precision


@pytest.mark.parametrize("kind", MODELS)
def test_one_changed_element_of_any_weight_is_noticed_and_named(kind: str) -> None:
    model = build_gpt(**MODELS[kind])
    before = fingerprint_model([model])
    for name, parameter in model.named_parameters():
        place = parameter.data.view(-1)[parameter.numel() // 2]
        value = place.clone()
        place.mul_(1.01)
        after = fingerprint_model([model])
        place.copy_(value)
        changed = [key for key in before["weights"] if before["weights"][key] != after["weights"][key]]
        assert len(changed) == 1, name
        assert changed[0].split(".")[-2:] == name.split(".")[-2:] or "norm" in name
        assert before["value"] != after["value"]
    assert fingerprint_model([model]) == before


def test_elements_in_another_place_change_the_fingerprint() -> None:
    """A plain sum does not notice swapped elements; the factors of their places do."""

    def checksum(tensor: torch.Tensor, key: str = "decoder.layers.w", offset: tuple[int, ...] = (0, 0, 0)) -> str:
        sums = WeightChecksums()
        sums.add(key, tensor, offset)
        return sums.as_dict()["value"]

    tensor = full_tensor("somewhere", (6, 5))
    others = [
        tensor.flip(0),
        tensor.flip(1),
        tensor.roll(1, 0),
        torch.cat([tensor[3:], tensor[:3]]),
    ]
    assert len({checksum(other) for other in [tensor, *others]}) == 5
    assert checksum(tensor, offset=(1, 0, 0)) != checksum(tensor)
    assert checksum(tensor, key="decoder.layers.3.w", offset=(0, 0)) == checksum(tensor, offset=(3, 0, 0))
    pieces = WeightChecksums()
    for row in (4, 0, 2):
        for column, width in ((3, 2), (0, 3)):
            piece = tensor[row : row + 2, column : column + width]
            pieces.add("decoder.layers.w", piece, (0, row, column))
    assert pieces.as_dict()["value"] == checksum(tensor)


def test_a_fingerprint_is_the_same_in_every_version() -> None:
    """It is stored in files, so other versions of this package must compute the same."""
    sums = WeightChecksums()
    sums.add("model.decoder.layers.3.mlp.linear_fc1.weight", torch.arange(-7.0, 8.0).reshape(3, 5), (4, 10))
    sums.add("model.embedding.word_embeddings.weight", torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), (0, 0))
    sums.add("a.bias", torch.ones(4), (2,))
    assert sums.as_dict(7) == {
        "value": "b2d59cfabf1ba57d0edf271951686083",
        "vocab_rows": 7,
        "weights": {
            "a.bias": "328d1d60a8a8a200",
            "decoder.layers.mlp.linear_fc1.weight": "1b25b53462007000",
            "embedding.word_embeddings.weight": "4c349ff534e9e7a0",
        },
    }


def test_a_base_loaded_in_another_precision_is_the_same_base() -> None:
    whole = build_gpt(dtype=torch.float32)
    half = build_gpt(dtype=torch.bfloat16)
    half.load_state_dict(whole.state_dict())
    assert fingerprint_model([whole]) == fingerprint_model([half])


def test_padding_of_the_vocabulary_does_not_count() -> None:
    """Megatron fills the rows that a layout adds with zeros; `vocab_rows` excludes what a larger layout left there."""
    sums = [WeightChecksums() for _ in range(2)]
    rows = full_tensor("rows", (5, 4))
    sums[0].add("embedding", rows, (0, 0))
    sums[1].add("embedding", torch.cat([rows, torch.zeros(3, 4)]), (0, 0))
    assert sums[0].as_dict() == sums[1].as_dict()
    model = build_gpt()
    used = fingerprint_model([model], vocab_rows=VOCAB - 4)
    with torch.no_grad():
        model.embedding.word_embeddings.weight[-4:] = 7.0
        model.output_layer.weight[-4:] = 7.0
    assert fingerprint_model([model], vocab_rows=VOCAB - 4) == used
    assert fingerprint_model([model])["value"] != used["value"]


def test_a_merged_adapter_still_names_its_base(tmp_path: Path) -> None:
    adapter = adapter_of(build_gpt())
    recorded = read_adapter(save_adapter(adapter, tmp_path / "apart.nemo")).yaml["base"]
    adapter.merge()
    merged = [chunk.linears[0].module.weight.clone() for chunk in adapter.chunks]
    assert read_adapter(save_adapter(adapter, tmp_path / "merged.nemo")).yaml["base"] == recorded
    assert torch.equal(adapter.chunks[0].linears[0].module.weight, merged[0])


def adapter_of(model: GPTModel) -> Any:
    adapter = inject(model, TiedLoraConfig(rank=2))
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.full_state().items()}
    adapter.load_full_state({name: full_tensor(f"base {name}", shape) for name, shape in shapes.items()})
    return adapter


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    facts = {"base": {"name": "tiny.nemo", "tokenizer": {"kind": "words", "vocab_size": None, "sha256": "a" * 64}}}
    return save_adapter(adapter_of(build_gpt(groups=2)), tmp_path / "adapter.nemo", facts)


def refusal(model: GPTModel, path: Path, **options: Any) -> list[str]:
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(BaseMismatchError) as error:
        load_adapter(model, path, **options)
    assert isinstance(error.value, ConfigError)
    assert (list(model.state_dict()), [type(module) for module in model.modules()]) == (keys, classes)
    assert all(problem.startswith(f"{path}: ") for problem in error.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in error.value.problems]


def test_another_architecture_is_refused_with_each_difference(saved: Path) -> None:
    problems = refusal(build_gpt(num_layers=5, ffn=48, groups=4), saved, allow_other_base=True)
    assert problems == [
        "num_layers: the adapter was trained on 4, this model has 5",
        "ffn_hidden_size: the adapter was trained on 40, this model has 48",
        "num_query_groups: the adapter was trained on 2, this model has 4",
    ]
    names = {problem.split(":")[0] for problem in refusal(build_gpt(groups=2, llama=True), saved)}
    assert names == {
        "gated_linear_unit",
        "normalization",
        "add_bias_linear",
        "activation",
        "position_embedding_type",
        "rotary_percent",
        "rotary_base",
    }


def test_other_weights_are_refused_by_name_and_can_be_allowed(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build_gpt(groups=2)
    with torch.no_grad():
        model.decoder.layers[2].mlp.linear_fc2.weight[3, 5] += 0.5
        model.embedding.word_embeddings.weight[1, 1] += 0.5
    problems = refusal(model, saved)
    assert "other weights: decoder.layers.mlp.linear_fc2.weight, embedding.word_embeddings.weight (" in problems[0]
    assert "allow_other_base=true" in problems[1]
    with caplog.at_level(logging.WARNING):
        assert load_adapter(model, saved, allow_other_base=True).config.rank == 2
    assert "linear_fc2.weight" in caplog.text


def test_another_tokenizer_is_refused_and_can_be_allowed(saved: Path) -> None:
    assert "tokenizer" in refusal(build_gpt(groups=2), saved, tokenizer={"sha256": "b" * 64})[0]
    load_adapter(build_gpt(groups=2), saved, tokenizer={"sha256": "b" * 64}, allow_other_base=True)
    load_adapter(build_gpt(groups=2), saved, tokenizer={"sha256": "a" * 64})


def test_a_file_without_a_recorded_base_is_not_compared() -> None:
    check_weights({}, {"fingerprint": {"value": "x"}, "tokenizer": {"sha256": "y"}}, "old.nemo")


def test_a_tokenizer_is_identified_by_its_content_not_by_its_path() -> None:
    class Pieces:
        def __init__(self, model: bytes):
            self.model = model

        def serialized_model_proto(self) -> bytes:
            return self.model

    class Words:
        vocab_size = 2

        def __init__(self, *words: str):
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(self.words)}

    class Wrapped:
        vocab_size = 3

        def __init__(self, inner: Any):
            self.tokenizer = inner

    one, same, other = (tokenizer_identity(Wrapped(Pieces(content))) for content in (b"one", b"one", b"other"))
    assert one == same
    assert one["sha256"] != other["sha256"]
    assert tokenizer_identity(Words("a", "b"))["sha256"] != tokenizer_identity(Words("b", "a"))["sha256"]
    assert tokenizer_identity(object())["sha256"] is None
