# SPDX-License-Identifier: Apache-2.0
"""One process, no NeMo: every key of config.json and every stored tensor of a Hugging Face folder is used, or is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_tied_lora.conversion.hf_config_file import known_keys, read_hf_config
from nemo_tied_lora.conversion.hf_folder import HfFolder, read_hf_folder
from nemo_tied_lora.conversion.hf_tokenizer import tokenizer_section
from tests.harness import lora_folders
from tests.harness.lora_folders import problems_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {**SIZES, "head_dim": 8}),
    "mistral": (transformers.MistralConfig, {**SIZES, "sliding_window": 32}),
    "qwen2": (transformers.Qwen2Config, {**SIZES, "tie_word_embeddings": True}),
    "gpt2": (transformers.GPT2Config, {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each model type, as transformers writes it."""
    folders = {}
    for name, (config, sizes) in CLASSES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config(**sizes)).save_pretrained(folders[name])
    return folders


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a folder."""
    return lambda name: Path(shutil.copytree(saved[name], tmp_path / name))


def edit(folder: Path, **values: Any) -> Path:
    return lora_folders.edit(folder, CONFIG, **values)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    return lora_folders.edit_tensors(folder, change, WEIGHTS)


# config.json.


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_of_transformers_config_is_known_and_a_saved_model_is_accepted(
    copy: Callable[[str], Path], name: str
) -> None:
    config, _ = CLASSES[name]
    assert set(config().to_dict()) - set(known_keys(name)) == set()
    source = read_hf_folder(copy(name))
    assert source.weights.left_over()
    assert source.weights.spare == set()
    assert source.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "hidden_act", "gelu"),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "rope_interleaved", True),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("llama", "rope_scaling", {"type": "linear"}),
        ("llama", "rope_scaling", 4.0),
        ("llama", "quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("llama", "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("llama", "compression_config", {"format": "pack-quantized"}),
        ("llama", "auto_map", {"AutoModelForCausalLM": "modeling_mine.MyLlama"}),
        ("llama", "architectures", ["LlamaForSequenceClassification"]),
        ("llama", "architectures", ["MyLlamaForCausalLM"]),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "logits_scaling", 8.0),
        ("llama", "use_qk_norm", True),
        ("llama", "clip_qkv", 8),
        ("llama", "position_embedding_type", "alibi"),
        ("llama", "is_causal", False),
        ("llama", "pruned_heads", {"0": [1]}),
        ("llama", "tie_word_embeddings", "yes"),
        ("llama", "vocab_size", 0),
        ("llama", "num_hidden_layers", 2.5),
        ("llama", "hidden_size", "24"),
        ("mistral", "num_local_experts", 8),
        ("qwen2", "use_mrope", True),
        ("qwen2", "layer_types", ["full_attention", "linear_attention"]),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "model_type", "bert"),
        ("gpt2", "model_type", None),
    ],
)
def test_what_megatron_lacks_or_nobody_knows_is_refused_by_name(
    copy: Callable[[str], Path], name: str, key: str, value: Any
) -> None:
    (problem,) = problems_of(lambda: read_hf_config(edit(copy(name), **{key: value})))
    assert key in problem


@pytest.mark.parametrize(
    "values",
    [
        {"unsloth_version": "2025.1", "unsloth_fixed": True, "_name_or_path": "me/mine"},
        {
            "_model_name_or_path": "me/mine",
            "_a_note_of_transformers": 1,
            "trust_remote_code": True,
            "revision": "main",
        },
        {"pretraining_tp": 4, "max_sequence_length": 64, "use_cache": False, "task_specific_params": {"a": {}}},
        {"quantization_config": None, "auto_map": {}, "final_logit_softcapping": None, "use_qk_norm": False},
        {"architectures": None, "torch_dtype": "bfloat16", "dtype": "bfloat16", "bos_token_id": [1, 2]},
        {"layer_types": ["full_attention"] * 2, "attention_dropout": 0.1, "is_causal": True},
    ],
)
def test_metadata_and_features_that_are_off_pass(copy: Callable[[str], Path], values: dict[str, Any]) -> None:
    read_hf_folder(edit(copy("llama"), **values))


def test_metadata_of_old_gpt2s_passes(copy: Callable[[str], Path]) -> None:
    read_hf_folder(
        edit(copy("gpt2"), _num_labels=1, n_special=0, predict_special_tokens=True, output_past=True, n_ctx=64)
    )


def test_rope_parameters_of_transformers_5_are_read_though_release_4_ignores_them(copy: Callable[[str], Path]) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    folder = edit(copy("llama"), rope_parameters={"rope_theta": 5e5, **scaling}, rope_theta=None)
    source = read_hf_folder(folder)
    assert source.keys.model["rotary_base"] == source.described.rope_theta == 5e5
    assert source.described.rope_scaling == scaling
    assert source.keys.model["scale_factor"] == 8.0
    edit(folder, rope_theta=10000.0)
    assert "rope_theta=10000.0, but rope_parameters gives 500000.0" in problems_of(lambda: read_hf_config(folder))[0]
    edit(folder, rope_theta=None, rope_parameters={"full_attention": {"rope_theta": 1e4}})
    assert "rope_parameters=" in problems_of(lambda: read_hf_config(folder))[0]


def test_a_loras_folder_and_a_cut_config_are_named(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "adapter_config.json").write_text("{}")
    assert "import it with from=lora" in problems_of(lambda: read_hf_config(folder))[0]
    (folder / CONFIG).write_text('{"model_type": "lla')
    assert "config.json: cannot be read" in problems_of(lambda: read_hf_config(folder))[0]


def test_the_command_refuses_a_config_before_torch_is_imported(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edit(copy("llama"), attention_bias=True, quantization_config={"quant_method": "awq"})
    words = ["import", "from=hf-base", f"path={folder}", f"output={tmp_path / 'out.pt'}"]
    program = (
        "import sys; sys.modules['torch'] = None; from nemo_tied_lora.commands.main import main;"
        f"sys.exit(main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    for part in ("attention_bias=True", "quantization_config=", "output="):
        assert part in done.stderr


# Tensors.


FAULTS: Mapping[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a bias that config.json does not have": (
        "llama",
        lambda ts: ts.update({f"{Q}.bias": torch.ones(32)}),
        f"{Q}.bias: the model that config.json describes has no place for it, and transformers would drop it",
    ),
    "a norm of q": (
        "llama",
        lambda ts: ts.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}),
        "q_norm.weight: the model that config.json describes has no place for it",
    ),
    "a layer too many": (
        "llama",
        lambda ts: ts.update({"model.layers.2.input_layernorm.weight": torch.ones(24)}),
        "model.layers.2.input_layernorm.weight: the model that config.json describes has no place",
    ),
    "a tensor less": ("llama", lambda ts: ts.pop(f"{Q}.weight"), f"{Q}.weight: missing, though config.json"),
    "no head": ("llama", lambda ts: ts.pop("lm_head.weight"), "set tie_word_embeddings to true in config.json"),
    "no bias": (
        "qwen2",
        lambda ts: ts.pop(f"{Q}.bias"),
        f"{Q}.bias: missing, though config.json describes it",
    ),
    "fewer rows than config.json": (
        "llama",
        lambda ts: ts.update({"model.embed_tokens.weight": torch.ones(38, 24)}),
        "model.embed_tokens.weight: has shape (38, 24), but (40, 24) by config.json",
    ),
    "other heads": (
        "llama",
        lambda ts: ts.update({f"{Q}.weight": torch.ones(24, 24)}),
        f"{Q}.weight: has shape (24, 24), but (32, 24) by config.json",
    ),
    "a quantized tensor": (
        "llama",
        lambda ts: ts.update({f"{Q}.weight": ts[f"{Q}.weight"].to(torch.int8)}),
        f"{Q}.weight: has dtype I8, as quantized weights have",
    ),
    "float8": (
        "llama",
        lambda ts: ts.update({f"{Q}.weight": ts[f"{Q}.weight"].to(torch.float8_e4m3fn)}),
        f"{Q}.weight: has dtype F8_E4M3, as quantized weights have",
    ),
    "a head unlike the embedding it is tied to": (
        "qwen2",
        lambda ts: ts.update({"lm_head.weight": ts["model.embed_tokens.weight"] + 1e-3}),
        "lm_head.weight: differs from model.embed_tokens.weight, though config.json says tie_word_embeddings=true",
    ),
    "a tied head of another size": (
        "gpt2",
        lambda ts: ts.update({"lm_head.weight": torch.ones(41, 24)}),
        "lm_head.weight: differs from transformer.wte.weight",
    ),
    "other rotary frequencies": (
        "llama",
        lambda ts: ts.update({"model.layers.0.self_attn.rotary_emb.inv_freq": 5e5 ** (-torch.arange(4) / 4)}),
        "rotary_emb.inv_freq: differs from the frequencies of rope_theta=10000",
    ),
    "a mask that is not causal": (
        "gpt2",
        lambda ts: ts.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8)}),
        "transformer.h.0.attn.bias: is not the causal mask",
    ),
    "two names for one tensor": (
        "llama",
        lambda ts: ts.update({"embed_tokens.weight": ts["model.embed_tokens.weight"].clone()}),
        "embed_tokens.weight: the model that config.json describes has no place for it",
    ),
    "a value head": (
        "mistral",
        lambda ts: ts.update({"v_head.summary.weight": torch.ones(1, 24)}),
        "v_head.summary.weight: the model that config.json describes has no place for it",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stored_tensor_that_the_model_does_not_take_is_named(copy: Callable[[str], Path], fault: str) -> None:
    name, change, expected = FAULTS[fault]
    folder = edit_tensors(copy(name), change)
    (problem,) = problems_of(lambda: read_hf_folder(folder))
    assert problem.startswith(f"path={folder}: ")
    assert expected in problem


CONSTANTS: Mapping[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "the head again": ("qwen2", lambda ts: ts.update({"lm_head.weight": ts["model.embed_tokens.weight"].clone()})),
    "rotary frequencies": (
        "llama",
        lambda ts: ts.update({"model.rotary_emb.inv_freq": (1e4 ** (-torch.arange(4) / 4)).bfloat16()}),
    ),
    "the causal mask": (
        "gpt2",
        lambda ts: ts.update({"transformer.h.1.attn.bias": torch.ones(64, 64).tril()[None, None]}),
    ),
    "the mask's number": ("gpt2", lambda ts: ts.update({"transformer.h.1.attn.masked_bias": torch.tensor(-1e4)})),
}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_copies_and_constants_that_are_right_need_no_place(copy: Callable[[str], Path], constant: str) -> None:
    name, change = CONSTANTS[constant]
    source = read_hf_folder(edit_tensors(copy(name), change))
    assert len(source.weights.spare) == 1


def test_a_body_without_its_head_is_read_by_its_own_names(copy: Callable[[str], Path]) -> None:
    folder = copy("gpt2")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    assert read_hf_folder(folder).weights.stored_name("transformer.wte.weight") == "wte.weight"


def stored_dtypes(folder: Path, *dtypes: torch.dtype) -> HfFolder:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for i, name in enumerate(tensors):
            tensors[name] = tensors[name].to(dtypes[i % len(dtypes)])

    return read_hf_folder(edit_tensors(folder, change))


def test_the_dtype_is_that_of_the_stored_weights_whatever_config_json_says(copy: Callable[[str], Path]) -> None:
    folder = edit(copy("llama"), torch_dtype="float16")
    assert stored_dtypes(folder, torch.float32).dtype == torch.float32
    assert stored_dtypes(folder, torch.bfloat16).dtype == torch.bfloat16
    assert stored_dtypes(folder, torch.float16, torch.bfloat16).dtype == torch.float32
    assert stored_dtypes(folder, torch.float64).dtype == torch.float32


def test_other_weights_in_the_folder_are_named_as_not_read(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "consolidated.pth").write_bytes(b"x")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "not read: consolidated.pth, pytorch_model.bin" in read_hf_folder(folder).keys.notes


def test_many_faults_are_cut_to_a_number_of_lines(copy: Callable[[str], Path]) -> None:
    folder = edit(copy("llama"), num_hidden_layers=8)
    problems = problems_of(lambda: read_hf_folder(folder))
    assert len(problems) == 21
    assert problems[-1].endswith("and 34 more of this kind")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"version": "1.0", "mod'),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n"),
        ("tokenizer.model", b""),
    ],
)
def test_a_damaged_tokenizer_is_named_before_the_conversion(
    copy: Callable[[str], Path], name: str, content: bytes
) -> None:
    folder = copy("llama")
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": []}))
    (folder / name).write_bytes(content)
    (problem,) = problems_of(lambda: tokenizer_section(folder))
    assert problem.startswith(f"path={folder}: its tokenizer cannot be read: ")


def test_a_folder_without_a_tokenizer_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    assert "has no tokenizer" in problems_of(lambda: tokenizer_section(folder))[0]
