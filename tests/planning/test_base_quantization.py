# SPDX-License-Identifier: Apache-2.0
"""Pure Python: what `model.base_quantization` accepts, what it is refused with, and the bytes that `plan` prints for it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.commands.main import main
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.composing.yaml_sources import YamlSources
from nemo_tied_lora.planning.nemo_model_config import adapter_problems, recorded_config
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.planning.preflight import check_evaluation, check_finetuning, check_generation
from nemo_tied_lora.planning.quantised_memory import quantised_bytes
from nemo_tied_lora.planning.settings.base_quantization import (
    BaseQuantization,
    continued_lines,
    quantization_lines,
    quantization_problems,
)
from tests.harness.adapter_files import CONFIG, STATE, write_tar
from tests.harness.base_files import write_base

KEY = "model.base_quantization"
# Row-parallel inputs of 256 (linear_proj) and 384 (linear_fc2).
SIZES = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 384,
    "num_attention_heads": 4,
    "encoder_seq_length": 16,
}


def problems(setting: object, tp_size: int = 1, here: bool = True, **model: Any) -> list[str]:
    arch = Architecture.from_model_config({**SIZES, **model})
    layout = Layout(tp_size=tp_size, devices=tp_size)
    return list(quantization_problems(setting, {**SIZES, **model}, arch, layout, here=here))


@pytest.mark.parametrize(
    ("setting", "precision"),
    [
        ("nf4", "nf4/64"),
        ("int8", "int8/row"),
        ({"kind": "nf4", "double": True}, "nf4/64 double"),
        ({"kind": "nf4", "block_size": 128, "statistics": "float32", "double": None}, "nf4/128 float32"),
    ],
)
def test_a_setting_has_one_name_that_reads_back(setting: object, precision: str) -> None:
    read = BaseQuantization.from_setting(setting)
    assert read is not None
    assert read.precision == precision
    assert BaseQuantization.from_precision(precision) == read
    assert problems(setting) == []


@pytest.mark.parametrize("precision", [None, "bfloat16", "nf4", "nf4/48", "nf4/64 treble", "fp4/64"])
def test_no_quantization_is_read_of_other_precisions(precision: str | None) -> None:
    assert BaseQuantization.from_precision(precision) is None


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("int4", [f"{KEY}='int4': unknown; choose one of null, nf4, int8"]),
        (True, [f"{KEY}=True: unknown"]),
        (["nf4"], [f"{KEY}=['nf4']: unknown"]),
        ({"double": True}, [f"{KEY}.kind: missing"]),
        (
            {"kind": "nf4", "doubel": True, "double": "yes"},
            [f"{KEY}.doubel: not a key", f"{KEY}.double='yes': must be"],
        ),
        ({"kind": "nf4", "double": True, "statistics": "float32"}, [f"{KEY}.statistics=float32: double"]),
        ({"kind": "nf4", "block_size": 48, "statistics": "float16"}, [f"{KEY}.block_size=48", f"{KEY}.statistics="]),
        (
            {"kind": "int8", "double": True, "block_size": 128},
            [f"{KEY}.block_size=128: only nf4", f"{KEY}.double=True"],
        ),
        ({"kind": "nf4", "double": 1}, [f"{KEY}.double=1: must be true or false"]),
        ({"kind": "nf4", "block_size": 64.0}, [f"{KEY}.block_size=64.0: unknown; choose one of 32, 64"]),
    ],
)
def test_a_wrong_setting_is_refused_with_all_its_problems(setting: object, expected: list[str]) -> None:
    found = problems(setting)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)
    with pytest.raises(ConfigError):
        BaseQuantization.from_setting(setting)


def test_a_shard_that_is_no_whole_number_of_blocks_is_refused_with_what_fits() -> None:
    assert problems("nf4", tp_size=2) == []
    [line] = problems("nf4", tp_size=4)
    assert line == (
        f"{KEY}: the inputs of linear_fc2, 384 / tensor_model_parallel_size=4, are not divisible by the block size 64; use "
        f"tensor_model_parallel_size=2 or {KEY}={{kind: nf4, block_size: 32}} or {KEY}=int8"
    )
    assert problems({"kind": "nf4", "block_size": 32}, tp_size=4) == []
    assert problems("int8", tp_size=4) == []
    # A column-parallel linear's input is whole on every rank, and must be divisible too.
    lines = problems("nf4", hidden_size=96, kv_channels=64)
    assert [line.split(",")[0] for line in lines] == [
        f"{KEY}: the inputs of linear_qkv",
        f"{KEY}: the inputs of linear_fc1",
    ]


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        ({"transformer_engine": True}, "model.transformer_engine=false"),
        ({"name": "megatron_gpt_full_te_layer_autocast"}, "model.name=''"),
        ({"fp8": True}, "model.fp8=false"),
        ({"enable_cuda_graph": True}, "model.enable_cuda_graph=false"),
        ({"cpu_offloading": True}, "model.cpu_offloading=false"),
    ],
)
def test_what_needs_other_linears_is_refused_by_name(model: dict[str, Any], remedy: str) -> None:
    [line] = problems("nf4", **model)
    assert f"model.{next(iter(model))}=" in line
    assert remedy in line
    assert problems(None, **model) == []
    assert problems("nf4", **dict.fromkeys(model)) == []


def test_a_missing_bitsandbytes_is_refused_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems("nf4") == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [line] = problems("nf4")
    install = "pip install 'nemo_tied_lora[quantized]'"
    assert line == f"{KEY}=nf4: needs bitsandbytes, which is not installed: {install}; int8 does without it"
    assert problems("nf4", here=False) == problems("int8") == problems(None) == []


def test_double_quantisation_says_what_it_costs() -> None:
    assert quantization_lines({"kind": "nf4", "double": True}) == [
        f"{KEY}.double=true: the statistics' codes depend on the tensor-parallel size, so the base, and with it losses and "
        "adapter, differ a little from one size to another; double: false does not"
    ]
    assert quantization_lines("nf4") == quantization_lines(None) == []


@pytest.mark.parametrize(
    ("recorded", "setting", "held", "remedy"),
    [
        ("nf4/64", None, "in nf4/64, this run's is not quantised", "nf4"),
        (None, "int8", "not quantised, this run's is in int8/row", "null"),
        ("bfloat16", "nf4", "not quantised, this run's is in nf4/64", "null"),
        ("nf4/128 double", "nf4", "in nf4/128 double, this run's", "{kind: nf4, block_size: 128, double: true}"),
    ],
)
def test_an_adapter_of_another_precision_is_named_before_its_training_continues(
    recorded: str | None, setting: str | None, held: str, remedy: str
) -> None:
    [line] = continued_lines("model.peft.restore_from_path", "a.nemo", recorded, setting)
    assert line.startswith(f"model.peft.restore_from_path=a.nemo: its training had a base that was {held}")
    assert line.endswith(f"; {KEY}={remedy} gives the base of the adapter")


@pytest.mark.parametrize(
    ("recorded", "setting"),
    [("nf4/64", {"kind": "nf4", "block_size": 64}), ("float32", None), (None, None), ("int8/row", "int8")],
)
def test_an_adapter_of_the_same_precision_continues_in_silence(recorded: str | None, setting: object) -> None:
    assert continued_lines("model.peft.restore_from_path", "a.nemo", recorded, setting) == []


def test_finetune_reads_the_precision_of_the_adapter_that_it_continues(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    config = b"peft: {peft_scheme: tied_lora, tied_lora: {rank: 4}}\nbase_precision: int8/row\n"
    adapter = write_tar(tmp_path / "adapter.nemo", {CONFIG: config, STATE: b"-"})
    words = [
        f"model.restore_from_path={write_base(tmp_path / 'base.nemo', **SIZES, kv_channels=64)}",
        "model.global_batch_size=8",
    ]
    words += [f"model.data.{section}.file_names=[{data}]" for section in ("train_ds", "validation_ds")]
    words += ["model.data.train_ds.max_seq_length=16", "model.data.validation_ds.tokens_to_generate=4"]
    words += [f"exp_manager.exp_dir={tmp_path}", f"model.peft.restore_from_path={adapter}"]
    said = {}
    for setting in ("null", "int8", "nf4"):
        lines = check_finetuning(plain(compose_config("finetune", [*words, f"{KEY}={setting}"])))
        said[setting] = [line for line in lines if f"model.peft.restore_from_path={adapter}: its training" in line]
    assert {setting: len(lines) for setting, lines in said.items()} == {"null": 1, "int8": 0, "nf4": 1}


@pytest.mark.parametrize(
    "config", [b"base_precision: nf4/64\n", b"peft: {peft_scheme: tied_lora}\n", b"peft: {tied_lora: 4}\n"]
)
def test_an_adapters_file_without_its_configuration_is_refused_by_name(config: bytes, tmp_path: Path) -> None:
    adapter = write_tar(tmp_path / "adapter.nemo", {CONFIG: config, STATE: b"-"})
    [line] = adapter_problems(adapter, "model.peft.restore_from_path")
    assert line.startswith(f"model.peft.restore_from_path={adapter}: its model_config.yaml has no peft.tied_lora")
    with pytest.raises(
        ConfigError, match=r"adapter\.nemo: its model_config\.yaml has no peft\.tied_lora, .*; name the file"
    ):
        recorded_config(adapter)


@pytest.mark.parametrize("command", ["finetune", "generate", "evaluate"])
def test_each_command_reports_it_beside_its_other_problems(command: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.nemo", **SIZES, transformer_engine=True)
    cfg = plain(compose_config(command, [f"{KEY}=int5", "trainer.precision=7"]))
    if command == "finetune":
        cfg["model"]["restore_from_path"] = str(base)
        with pytest.raises(ConfigError) as refused:
            check_finetuning(cfg)
    else:
        cfg["base"] = str(base)
        with pytest.raises(ConfigError) as refused:
            check_generation(cfg) if command == "generate" else check_evaluation(cfg, [])
    text = str(refused.value)
    for part in (f"{KEY}='int5': unknown", "not possible with model.transformer_engine=true", "trainer.precision='7'"):
        assert text.count(part) == 1, text


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("merge", "works on the base's file, which is not quantised; leave it out: the check measures"),
        ("export", "an adapter's file records what its base was held in, and export reads no more; leave it out"),
        ("show", "an adapter's file records what its base was held in, and show prints it; leave it out"),
        ("pretrain", "pretrain trains all weights, and a quantised weight is frozen; leave it out"),
        ("compare", "it belongs to a method of the study; write methods.NAME.base_quantization=nf4"),
        ("quickstart", f"a key of finetune; write \"overrides=['{KEY}=nf4']\""),
        ("import", "import holds no base; leave it out, and give it to finetune, generate, evaluate or plan"),
    ],
)
@pytest.mark.parametrize("typed", [f"{KEY}=nf4", f"++{KEY}=nf4", "base_quantization=nf4"])
def test_a_command_without_the_key_says_why(command: str, reason: str, typed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_config(command, [typed])
    [line] = refused.value.problems
    assert line.startswith(f"{typed}: ")
    assert reason in line


def test_a_method_of_a_study_takes_the_key_and_a_yaml_of_pretrain_does_not(tmp_path: Path) -> None:
    study = compose_config("compare", ["study=tiny", "methods.tl6.base_quantization=nf4"])
    assert study.methods.tl6.base_quantization == "nf4"
    own = tmp_path / "own.yaml"
    own.write_text("model: {base_quantization: {kind: nf4}}\ntrainer: {max_steps: 1}\n")
    with pytest.raises(ConfigError, match=r"own.yaml: model.base_quantization.kind=nf4: pretrain trains all weights"):
        compose_config("pretrain", [], YamlSources(own=own))


@pytest.mark.parametrize("setting", ["nf4", "null"])
def test_plan_and_finetune_refuse_fsdp_with_the_same_words(setting: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "layout").mkdir()
    (tmp_path / "layout" / "sharded.yaml").write_text("# @package _global_\nmodel: {fsdp: true}\n")
    words = ["layout=sharded", f"{KEY}={setting}"]
    assert main(["plan", "--config-dir", str(tmp_path), "model=llama2_7b", *words]) == 2
    [line] = [line.strip() for line in capsys.readouterr().err.splitlines() if "fsdp" in line]
    with pytest.raises(ConfigError) as refused:
        check_finetuning(plain(compose_config("finetune", words, YamlSources(config_dir=tmp_path))))
    assert line in refused.value.problems
    assert line.startswith("model.fsdp=true: not possible; FSDP would shard what all layers share")


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "format=json"]) == 0
    return json.loads(capsys.readouterr().out)["memory"]


def test_plan_counts_the_codes_of_llama2_70b(capsys: pytest.CaptureFixture[str]) -> None:
    """68.5 billion weights in the linears: 127.5 GiB in bfloat16, 33.9 GiB at 4.25 bits."""
    whole = planned(capsys, "model=llama2_70b", "layout=tp8")
    nf4, double, int8 = (
        planned(capsys, "model=llama2_70b", "layout=tp8", f"{KEY}={setting}")
        for setting in ("nf4", "{kind: nf4, double: true}", "int8")
    )
    linears = nf4["quantised"]
    assert whole["quantised"] is None
    assert 8 * linears["unquantised_bytes"] == pytest.approx(127.5 * 2**30, rel=1e-3)
    assert 8 * linears["held_bytes"] == pytest.approx(33.9 * 2**30, rel=2e-3)
    assert linears["bits_per_weight"] == 4.25
    assert double["quantised"]["bits_per_weight"] == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, rel=1e-4)
    assert 8 < int8["quantised"]["bits_per_weight"] < 8.02
    # fc1 holds gate and up: 2 x 28672 / 8 rows of 8192, in bfloat16.
    assert linears["peak_bytes"] == 2 * 28672 // 8 * 8192 * 2 == nf4["dequantised"]
    assert whole["base"] - nf4["base"] == linears["unquantised_bytes"] - linears["held_bytes"]
    assert nf4["sum"] == nf4["base"] + nf4["adapter"] + nf4["activations"] + nf4["dequantised"]


def test_the_plans_table_shows_base_codes_and_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=smollm2", f"{KEY}={{kind: nf4, statistics: float32}}"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "base: linears in nf4/64 float32, 4.5 bits a weight in place of",
        "base: one linear, dequantised for its product",
        "base: kept for backward beside the codes",
    ):
        assert part in printed
    assert main(["plan", "model=smollm2", "layout=tp3", f"{KEY}={{kind: nf4, block_size: 128}}"]) == 2
    assert "the inputs of linear_qkv, 576, are not divisible by the block size 128" in capsys.readouterr().err


def test_bytes_of_one_weight() -> None:
    assert quantised_bytes(1024, 512, BaseQuantization(kind="nf4", statistics="float32")) * 8 / 1024 / 512 == 4.5
    assert quantised_bytes(1024, 512, BaseQuantization(kind="int8")) == 1024 * 512 + 4 * 1024
