# SPDX-License-Identifier: Apache-2.0
"""One process, no NeMo: a GGUF file becomes a Hugging Face folder with its weights and its ids, or is refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from transformers.convert_slow_tokenizer import TikTokenConverter

from nemo_tied_lora import files
from nemo_tied_lora.commands.main import main
from nemo_tied_lora.conversion.from_gguf import _config, write_hf_folder
from nemo_tied_lora.conversion.gguf_file import GgufFile, read_gguf
from nemo_tied_lora.conversion.hf_folder import read_hf_folder
from tests.harness.gguf_files import bpe_vocabulary, sentencepiece_vocabulary, write_gguf
from tests.harness.hugging_face_models import FAMILIES, save_model, tokens
from tests.harness.lora_folders import problems_of

TEXTS = (
    "The year 1376, then 12 and 5: they've gone, WE'LL see.\n\n  Two lines  \n",
    " a blank; tabs\t\tand def f(x):\n    return x ** 2\r\n",
    "Größe, naïve, 日本語 и кириллица 42",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Each family's Hugging Face folder and model."""
    place = tmp_path_factory.mktemp("hf")
    return {family: (place / family, save_model(family, place / family)) for family in FAMILIES}


def vocabulary_of(folder: Path, family: str, rows: int, **more: Any) -> dict[str, Any]:
    if family in ("llama", "mistral"):
        return sentencepiece_vocabulary(folder / "tokenizer.model", rows, **more)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    return bpe_vocabulary(tokenizer, "gpt-2" if family == "gpt2" else "qwen2", rows, **more)


@pytest.fixture(scope="module")
def saved(models: dict[str, tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a family's model as GGUF, with changes."""

    def save(family: str, **options: Any) -> Path:
        folder, model = models[family]
        vocabulary = vocabulary_of(folder, family, model.config.vocab_size, **options.pop("vocabulary", {}))
        return write_gguf(tmp_path_factory.mktemp("gguf") / f"{family}.gguf", model, vocabulary, **options)

    return save


# Weights.


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", Type.Q4_1), ("mistral", Type.F16), ("qwen2", Type.Q8_0), ("gpt2", Type.F32)]
)
def test_the_folder_of_a_gguf_file_has_the_models_logits_and_ids(
    models: dict[str, tuple[Path, Any]], saved: Callable[..., Path], tmp_path: Path, family: str, kind: Type
) -> None:
    original, model = models[family]
    source = read_gguf(saved(family, kind=kind))
    assert write_hf_folder(source, tmp_path / "hf") == []
    assert source.main_type == kind.name
    folder = read_hf_folder(tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"), attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens(family)).logits, model(tokens(family)).logits)
    assert folder.keys.model["encoder_seq_length"] == (16 if family == "mistral" else 32)
    assert_same_ids(original, tmp_path / "hf")


def assert_same_ids(original: Path, folder: Path) -> None:
    if (original / "tokenizer.model").exists():
        ours, theirs = (
            sentencepiece.SentencePieceProcessor(model_file=str(place / "tokenizer.model")).encode
            for place in (folder, original)
        )
    else:
        ours, theirs = (transformers.AutoTokenizer.from_pretrained(str(place)).encode for place in (folder, original))
    for text in TEXTS:
        assert ours(text) == theirs(text)


def test_what_the_file_holds_is_named(saved: Callable[..., Path]) -> None:
    path = saved("llama", kind=Type.Q8_0)
    path = path.rename(path.with_name("tiny-model.Q8_0.gguf"))
    source = read_gguf(path)
    assert (source.name, source.is_quantised) == ("tiny-model", True)
    assert source.quantisation == "Q8_0 (22 tensors), F32 (17)"
    assert sum(source.numbers.values()) == sum(p.numel() for p in model_parameters(source))


def model_parameters(source: GgufFile) -> list[torch.Tensor]:
    reader: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.path.parent), gguf_file=source.path.name
    )
    return list(reader.parameters())


def test_linear_and_llama_3s_rotary_scaling_are_translated_and_others_refused(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    linear = saved("qwen2", metadata={"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0})
    write_hf_folder(read_gguf(linear), tmp_path / "linear")
    assert read_hf_folder(tmp_path / "linear").keys.model["seq_len_interpolation_factor"] == 4.0
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["default"](config, "cpu")[0]
    own = {"llama.rope.freq_base": 500000.0, "llama.rope.dimension_count": 64, "llama.embedding_length": 256}
    path = saved("llama", metadata=own, tensors={"rope_freqs.weight": plain / scaled})
    assert _config(read_gguf(path)).rope_scaling == config.rope_scaling
    path = saved("llama", metadata=own, tensors={"rope_freqs.weight": plain / scaled * 1.5})
    assert "other rotary factors" in problems_of(lambda: _config(read_gguf(path)))[0]


# Vocabularies.


@pytest.fixture(scope="module")
def digits() -> Any:
    """A byte-level BPE that splits digits, as SmolLM2's does."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    bpe.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*TEXTS, *["1376 12"] * 9], trainer)  # learns merges of digits, which must not be used
    bpe.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")


@pytest.fixture
def with_digits(models: dict[str, tuple[Path, Any]], digits: Any, tmp_path: Path) -> Callable[..., Any]:
    """The tokenizer that a GGUF file with this vocabulary gets."""

    def build(pre: str = "smollm", **more: Any) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=len(digits),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        vocabulary = bpe_vocabulary(digits, pre, len(digits), eos_token_id=1, **more)
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        write_hf_folder(read_gguf(write_gguf(place / "m.gguf", model, vocabulary)), place / "hf")
        return transformers.AutoTokenizer.from_pretrained(str(place / "hf"))

    return build


def test_no_bos_that_the_file_says_not_to_add_and_digits_split_as_it_says(
    with_digits: Callable[..., Any], digits: Any, tmp_path: Path
) -> None:
    ours = with_digits(add_bos_token=False)
    for text in TEXTS:
        assert ours(text)["input_ids"] == digits(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    (path,) = tmp_path.rglob("m.gguf")
    trap = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    assert trap(TEXTS[0])["input_ids"][0] == 0, "transformers no longer adds the BOS: read it from there"
    assert ours(TEXTS[0])["input_ids"][0] != 0
    other = with_digits("gpt-2", add_bos_token=False)
    assert other(TEXTS[0])["input_ids"] != digits(TEXTS[0])["input_ids"]


def test_a_bos_that_the_file_says_to_add_is_added(with_digits: Callable[..., Any], digits: Any) -> None:
    ours = with_digits(add_bos_token=True)
    assert ours(TEXTS[0])["input_ids"] == [0, *digits(TEXTS[0])["input_ids"]]


def test_llama_3s_rule_is_that_of_transformers(with_digits: Callable[..., Any]) -> None:
    ours = json.loads(with_digits("llama-bpe").backend_tokenizer.to_str())
    split = next(step for step in ours["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split")
    assert split["pattern"]["Regex"] == TikTokenConverter().pattern


# Refusals.


def test_an_unknown_rule_for_splitting_text_is_refused_with_the_names_that_are_known(
    with_digits: Callable[..., Any],
) -> None:
    (problem,) = problems_of(lambda: with_digits("tekken"))
    assert "tokenizer.ggml.pre='tekken'" in problem
    assert "smollm" in problem


META: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": 8}, "llama.expert_count=8: experts cannot be imported"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"),
    "a key that nobody knows": (
        {"llama.attention.scale": 0.5},
        "llama.attention.scale=0.5: this release does not know",
    ),
    "no groups": ({"llama.attention.head_count_kv": None}, "llama.attention.head_count_kv: missing"),
    "heads by layer": ({"llama.attention.head_count": [4, 4]}, "llama.attention.head_count=[4, 4]: must be one whole"),
    "half-rotated heads": ({"llama.attention.key_length": 64}, "llama.attention.key_length=64"),
    "a part": ({"split.count": 3}, "is one of 3 parts"),
    "a LoRA": ({"general.type": "adapter"}, "holds a LoRA, not a model"),
    "more tokens than rows": ({"llama.vocab_size": 999}, "llama.vocab_size=999: the embedding has 313 rows"),
    "another tokenizer": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert' is not supported"),
    "too few scores": ({"tokenizer.ggml.scores": [0.0]}, "tokenizer.ggml.scores: must have 313 entries"),
    "a wrong BOS": ({"tokenizer.ggml.bos_token_id": 5000}, "tokenizer.ggml.bos_token_id=5000: there are 313 tokens"),
}


@pytest.mark.parametrize("fault", META)
def test_metadata_that_the_import_would_lose_is_refused_by_name(saved: Callable[..., Path], fault: str) -> None:
    values, message = META[fault]
    path = saved("llama", metadata=values)
    (problem,) = problems_of(lambda: read_gguf(path))
    assert problem.startswith(f"path={path}: {message}"), problem


def test_missing_and_unknown_tensors_are_refused_by_name(saved: Callable[..., Path]) -> None:
    extra = {"blk.0.attn_q.bias": torch.ones(48)}
    path = saved("llama", drop=("blk.1.ffn_up.weight", "blk.2.ffn_up.weight"), tensors=extra)
    missing, unknown = problems_of(lambda: read_gguf(path))
    assert "lacks blk.1.ffn_up.weight and 1 more" in missing
    assert "holds blk.0.attn_q.bias, for which transformers has no place" in unknown


def test_another_architecture_is_refused(saved: Callable[..., Path]) -> None:
    path = saved("llama", metadata={"general.architecture": "mamba"})
    (problem,) = problems_of(lambda: read_gguf(path))
    assert "general.architecture='mamba' is not supported; it must be one of llama, qwen2, gpt2" in problem


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.99999])
def test_a_file_that_is_cut_off_anywhere_is_refused(saved: Callable[..., Path], share: float, tmp_path: Path) -> None:
    whole = saved("llama").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    (problem,) = problems_of(lambda: read_gguf(path))
    assert "is empty" in problem or "cut off or damaged" in problem or "another kind of file" in problem


def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "run git lfs pull" in problems_of(lambda: read_gguf(path))[0]
    path.write_bytes(b"<html>" * 20)
    assert "another kind of file" in problems_of(lambda: read_gguf(path))[0]


def test_without_the_package_gguf_a_file_is_refused_with_the_remedy(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved("llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "needs the package gguf: pip install gguf" in problems_of(lambda: read_gguf(path))[0]


def test_a_disk_without_room_is_refused_with_what_is_missing(
    saved: Callable[..., Path],
    models: dict[str, tuple[Path, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=20_000_000))
    for path in (saved("llama"), models["llama"][0]):
        assert main(["import", "from=hf-base", f"path={path}", f"output={tmp_path}/new/base.nemo"]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "no room" in line)
        assert (
            f"output={tmp_path}/new/base.nemo: no room on the disk of {tmp_path}: 33 MB are needed, 20 MB are free"
            in line
        )
        assert "13 MB are missing" in line
    assert list(tmp_path.iterdir()) == []
