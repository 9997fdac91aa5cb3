# SPDX-License-Identifier: Apache-2.0
"""One process, no NeMo: a LoRA of peft is read as peft computes it, or refused if its configuration may mean more."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from nemo_tied_lora.conversion.lora_to_tied import read_lora
from nemo_tied_lora.conversion.peft_lora_config import KNOWN_KEYS, read_peft_config
from nemo_tied_lora.conversion.to_peft_lora import write_hf_peft
from tests.conversion.hugging_face_bases import hugging_face_model, logits
from tests.harness.lora_folders import CONFIG, edit, problems_of, with_update
from tests.harness.random_adapters import GPT2, LLAMA, delta, random_adapter

ON = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2], [1, 3]],
    "lora_bias": True,
    "target_parameters": ["mlp.experts.down_proj"],
    "kasa_config": {"beta": 1e-4, "gamma": 1e-3},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "alora_invocation_tokens": [5, 6],
    "arrow_config": {"top_k": 3},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 64},
    "megatron_config": {"num_layers": 4},
}
"""peft's features beyond plain LoRA, switched on."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """peft's folder of a LoRA of all linears, rank 3."""
    return write_hf_peft(random_adapter(LLAMA, preset="lora"), LLAMA, tmp_path / "lora", None)


# Keys of adapter_config.json.


def test_every_field_of_pefts_lora_config_is_classified_and_its_default_is_accepted(folder: Path) -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == set(KNOWN_KEYS), fields ^ set(KNOWN_KEYS)
    default = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM").to_dict()
    (folder / CONFIG).write_text(json.dumps(default, default=str))
    read_peft_config(folder)


@pytest.mark.parametrize("key", ON)
def test_a_feature_beyond_plain_lora_is_refused_by_name_and_accepted_when_it_is_off(folder: Path, key: str) -> None:
    (problem,) = problems_of(lambda: read_peft_config(edit(folder, **{key: ON[key]})))
    assert f"{CONFIG}: {key}=" in problem
    off = peft.LoraConfig().to_dict()[key]
    assert read_peft_config(edit(folder, **{key: off}))[key] == off


@pytest.mark.parametrize("value", [True, 3, 0.5, "mean", [1], {"a": 1}])
def test_a_key_of_a_newer_peft_is_refused_when_it_is_on(folder: Path, value: Any) -> None:
    (problem,) = problems_of(lambda: read_peft_config(edit(folder, use_newer_lora=value)))
    assert f"use_newer_lora={value!r}: this release does not know this feature" in problem


@pytest.mark.parametrize("value", [False, None, "", [], {}])
def test_a_key_of_a_newer_peft_passes_when_it_is_off(folder: Path, value: Any) -> None:
    read_peft_config(edit(folder, use_newer_lora=value))


@pytest.mark.parametrize(
    "start", ["pissa", "PiSSA", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "future", 1, "true"]
)
def test_a_start_that_may_change_the_base_is_refused_with_pefts_way_out(folder: Path, start: Any) -> None:
    (problem,) = problems_of(lambda: read_peft_config(edit(folder, init_lora_weights=start)))
    assert f"init_lora_weights={start!r}" in problem
    # peft's own way to the plain base; it has none for LoftQ.
    assert ("merge_and_unload" if start == "loftq" else "path_initial_model_for_weight_conversion") in problem


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "Gaussian", "eva", "EVA", "orthogonal"])
def test_a_start_that_leaves_the_base_alone_is_accepted(folder: Path, start: Any) -> None:
    read_peft_config(edit(folder, init_lora_weights=start))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lora_alpha", value) for value in (0, -8, float("nan"), float("inf"), "16", None, True)),
        *(("r", value) for value in (0, -1, 2.5, "8", None, True)),
        ("alpha_pattern", {"q_proj": 0}),
        ("alpha_pattern", [1]),
        ("alpha_pattern", {"(": 4}),
        ("rank_pattern", {"q_proj": "4"}),
        ("target_modules", "(q_proj"),
        ("target_modules", 3),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", 1.5),
        ("use_rslora", "yes"),
        ("bias", "lora_only"),
        ("task_type", "SEQ_CLS"),
        ("peft_type", "VERA"),
        ("peft_type", "IA3"),
        ("peft_type", "PROMPT_TUNING"),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
    ],
)
def test_a_value_that_cannot_be_right_is_refused_by_name(folder: Path, key: str, value: Any) -> None:
    (problem,) = problems_of(lambda: read_peft_config(edit(folder, **{key: value})))
    assert f"{CONFIG}: {key}=" in problem


def test_all_keys_are_reported_together_and_torch_is_not_imported_for_them(tmp_path: Path, folder: Path) -> None:
    edit(folder, use_dora=True, lora_alpha=0, init_lora_weights="pissa")
    words = ["from=lora", f"path={folder}", f"output={tmp_path / 'out.pt'}", "rank=0"]
    program = (
        "import sys; sys.modules['torch'] = None; from nemo_tied_lora.commands.main import main;"
        f"sys.exit(main({['import', *words]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    for part in ("use_dora=True", "lora_alpha=0", "init_lora_weights='pissa'", "output=", "rank=0"):
        assert part in done.stderr
    assert len(done.stderr.splitlines()) == 6


# What peft computes.


def peft_folder(path: Path, **fields: Any) -> tuple[Path, torch.Tensor]:
    """A LoRA that peft makes, changes and saves; and the logits of the plain model with it."""
    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields}
    model = peft.get_peft_model(hugging_face_model(LLAMA), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.3
    model.save_pretrained(path)
    return path, logits(peft.PeftModel.from_pretrained(hugging_face_model(LLAMA), str(path)).eval())


def read_logits(folder: Path) -> torch.Tensor:
    """Logits of the plain model plus what is read from the folder."""
    return logits(with_update(hugging_face_model(LLAMA), folder))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3}},
        {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 1, "v_proj": 9}, "rank_pattern": {".*down_proj": 5}},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.[13]\.(self_attn\.o_proj|mlp\.gate_proj)"},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"layers_to_transform": 3},
        {"exclude_modules": ["v_proj"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
        {"init_lora_weights": "orthogonal", "ensure_weight_tying": True, "fan_in_fan_out": True},
        {"init_lora_weights": False, "task_type": "CAUSAL_LM", "bias": "none"},
        {"eva_config": peft.EvaConfig(), "loftq_config": {"loftq_bits": 4}},
    ],
    ids=lambda fields: ", ".join(fields) or "plain",
)
def test_what_is_accepted_has_pefts_logits(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder, expected = peft_folder(tmp_path / "lora", **fields)
    plain = logits(hugging_face_model(LLAMA))
    assert (expected - plain).abs().max() > 1e-2
    assert torch.allclose(read_logits(folder), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{"layers": [2], "targets": ["linear_proj", "mlp_fc1"]}, {"alpha": 7.0}])
def test_a_lora_of_a_gpt2_is_read_as_it_was_exported(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Two of its linears are named c_proj; its weights are transposed, its A and B are not."""
    file = random_adapter(GPT2, preset="lora", **fields)
    lora = read_lora(write_hf_peft(file, GPT2, tmp_path / "lora", None), GPT2)
    assert lora.deltas.keys() == file.shapes.keys()
    for target, shape in file.shapes.items():
        assert tuple(lora.deltas[target]) == shape.layers
        for layer, found in lora.deltas[target].items():
            assert torch.allclose(found.P @ found.Q, delta(file, layer, target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_is_right_after_pefts_conversion_and_wrong_before(
    tmp_path: Path, start: str
) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    model = peft.get_peft_model(hugging_face_model(LLAMA), config)
    plain, fresh = logits(hugging_face_model(LLAMA)), logits(model.eval())
    assert torch.allclose(fresh, plain, atol=1e-4), "a fresh adapter changes nothing"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = start
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    trained = logits(model)
    model.save_pretrained(tmp_path / "raw")
    problems_of(lambda: read_lora(tmp_path / "raw", LLAMA))
    assert not torch.allclose(read_logits(edit(tmp_path / "raw", init_lora_weights=True)), trained, atol=1e-2)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    assert torch.allclose(read_logits(tmp_path / "converted"), trained, rtol=1e-4, atol=1e-4)
