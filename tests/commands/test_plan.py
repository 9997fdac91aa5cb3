# SPDX-License-Identifier: Apache-2.0
"""Pure maths and the whole `tied-lora plan` command: layouts, bytes by hand, refusals, every shipped YAML."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.numpy import save

from nemo_tied_lora.checkpoint.nemo_adapter_packing import largest_file
from nemo_tied_lora.commands.plan import SUMMARY, main
from nemo_tied_lora.config import FACTORS, PRESETS, TARGETS, TiedLoraConfig
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning import config_folder as config_folder_module
from nemo_tied_lora.planning.adapter_cost import Precision, RankShare, plan, rank_share
from nemo_tied_lora.planning.architecture import Architecture, selected_linears
from nemo_tied_lora.planning.config_folder import config_folder
from nemo_tied_lora.planning.parallel_layout import Layout, check, stage_layers
from tests.harness.paths import ROOT

FOLDER = config_folder()
YAMLS = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
# The YAMLs that are this command's: its own and the groups that it uses.
PLAN_YAMLS = [name for name in YAMLS if name == "plan.yaml" or name.split("/")[0] in ("model", "layout", "peft")]
O2 = Precision.from_names("bf16", True)

# Sizes in which no two are alike: heads of 6, grouped queries, a gated MLP.
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 20,
    "ffn_hidden_size": 44,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 6,
    "activation": "fast-swiglu",
    "encoder_seq_length": 16,
    "override_vocab_size": 100,
}


def small(**changes: Any) -> Architecture:
    return Architecture.from_model_config({**SMALL, **changes})


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, started in `folder`."""
    command = [sys.executable, "-m", "nemo_tied_lora.commands.plan", *arguments]
    root = str(ROOT)
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": root}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=env)


def refusals(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines of the command's refusal; the command must fail with 2 and print nothing else."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *problems = captured.err.splitlines()
    assert first == "tied-lora plan: not possible:"
    assert "Traceback" not in captured.err
    return [problem.removeprefix("  ") for problem in problems]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The command's JSON."""
    assert main([*arguments, "format=json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return dict(json.loads(captured.out))


# The command, in a process of its own


def test_the_command_prints_the_papers_counts_as_json(tmp_path: Path) -> None:
    arguments = "model=llama2_7b model.peft.tied_lora.preset=tl6 model.peft.tied_lora.rank=8"
    done = run(*arguments.split(), "model.peft.tied_lora.targets=[linear_qkv]", "format=json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["trained_parameters"] == 524_544
    assert result["lora_parameters"] == 4_194_304
    assert list(result["targets"]) == ["linear_qkv"]
    assert result["file_bytes"] >= 2 * 524_544
    assert result["reduced_bytes_per_step"] == 0
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


def test_a_refusal_is_one_message_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = run("trainer.devices=3", "layout=tp2", "format=xml", "model.peft.tied_lora.adapter_dim=8", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == "tied-lora plan: not possible:"
    assert len(done.stderr.splitlines()) == 4
    assert "Traceback" not in done.stderr


def test_neither_torch_nor_nemo_is_imported() -> None:
    code = (
        "import sys; from nemo_tied_lora.commands.plan import main; main(['model=quickstart']); "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'nemo', 'megatron', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_help_shows_examples_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert SUMMARY[1:] in " ".join(text.split())
    examples = [line.strip() for line in text.splitlines() if line.startswith("  tied-lora plan ")]
    assert len(examples) >= 3
    for example in examples:
        if "--config-dir" not in example:
            assert main(shlex.split(example)[2:]) == 0
    assert "\n" not in SUMMARY


def test_cfg_job_prints_the_composed_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "job", "layout=tp8pp4", "trainer.num_nodes=8"]) == 0
    cfg = yaml.safe_load(capsys.readouterr().out)
    assert cfg["model"]["tensor_model_parallel_size"] == 8
    assert cfg["model"]["pipeline_model_parallel_size"] == 4
    assert cfg["trainer"]["num_nodes"] == 8
    assert cfg["model"]["peft"]["peft_scheme"] == "tied_lora"


def test_a_folder_of_ones_own_is_searched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "my configs" / "model").mkdir(parents=True)
    (tmp_path / "my configs" / "model" / "mine.yaml").write_text(yaml.safe_dump(SMALL))
    result = planned(capsys, "--config-dir", str(tmp_path / "my configs"), "model=mine")
    assert result["architecture"]["hidden_size"] == 20
    (problem,) = refusals(capsys, "--config-dir", str(tmp_path / "other"), "model=mine")
    assert "no such folder" in problem


def test_the_table_shows_the_numbers_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=llama2_7b", "layout=tp2pp2", "model.peft.tied_lora.rank=8"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    result = planned(capsys, *arguments)
    row = next(line.split() for line in lines if line.startswith("trained parameters "))
    assert row[2:4] == [f"{result['trained_parameters']:,}", f"{result['lora_parameters']:,}"]
    for target in TARGETS:
        row = next(line.split() for line in lines if line.strip().startswith(target))
        assert row[1] == f"{result['targets'][target]['trained_parameters']:,}"
    tied = next(line for line in lines if line.startswith("sent per step: tied gradients"))
    assert f"{result['reduced_bytes_per_step'] / 2**20:.2f} MiB" in tied
    assert tied.endswith(" -"), "LoRA sends nothing, so there is no share"
    assert "tensor 2 x pipeline 2 x context 1 x data 1 = 4 ranks" in lines[1]
    assert all(len(line) < 130 for line in lines)


# The shipped YAMLs


@pytest.mark.parametrize("layout", [name for name in PLAN_YAMLS if name.startswith("layout/")])
def test_a_layouts_name_says_its_sizes_and_the_ranks_are_all_used(layout: str) -> None:
    option = layout.removeprefix("layout/").removesuffix(".yaml")
    with initialize_config_dir(version_base="1.3", config_dir=str(FOLDER)):
        cfg: Any = OmegaConf.to_container(compose("plan", [f"layout={option}"]))
    tp_size, pp_size = cfg["model"]["tensor_model_parallel_size"], cfg["model"]["pipeline_model_parallel_size"]
    name = (f"tp{tp_size}" if tp_size > 1 else "") + (f"pp{pp_size}" if pp_size > 1 else "")
    assert option == (name or "single")
    assert cfg["trainer"]["devices"] * cfg["trainer"]["num_nodes"] == tp_size * pp_size
    assert "layout" not in cfg, "the layout's keys must land in model and trainer"


def test_the_peft_yaml_lists_every_field_and_no_default() -> None:
    section = yaml.safe_load((FOLDER / "peft" / "tied_lora.yaml").read_text())
    fields = {field.name for field in dataclasses.fields(TiedLoraConfig)}
    assert set(section["tied_lora"]) == fields | {"preset"}
    assert set(section["tied_lora"].values()) == {None}
    assert (section["peft_scheme"], section["restore_from_path"]) == ("tied_lora", None)


def test_the_shipped_layouts_are_all_there() -> None:
    expected = {"single", "tp2", "pp2", "tp2pp2", "tp4", "tp8", "tp8pp4", "tp8pp8"}
    assert expected <= {path.stem for path in (FOLDER / "layout").glob("*.yaml")}


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        # The models' published sizes; for gpt_2b what NeMo prints is 2.25e9.
        ("llama2_7b", 6_738_415_616),
        ("llama2_13b", 13_015_864_320),
        ("llama2_70b", 68_976_648_192),
        ("gpt_2b", 2_253_590_528),
    ],
)
def test_a_shipped_model_has_its_published_number_of_parameters(model: str, parameters: int) -> None:
    cfg = yaml.safe_load((FOLDER / "model" / f"{model}.yaml").read_text())
    assert Architecture.from_model_config(cfg).num_parameters == parameters


def test_the_installed_package_looks_inside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "nemo_tied_lora"
    monkeypatch.setattr(config_folder_module, "__file__", str(package / "planning" / "config_folder.py"))
    with pytest.raises(FileNotFoundError, match="install the package again"):
        config_folder()
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "plan.yaml").touch()
    assert config_folder() == (package / "configs").resolve()


# Architecture


def test_null_and_absent_sizes_mean_what_nemo_means() -> None:
    cfg = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "encoder_seq_length": 8}
    arch = Architecture.from_model_config({**cfg, "kv_channels": None})
    assert (arch.ffn_hidden_size, arch.num_query_groups, arch.kv_channels) == (96, 4, 6)
    assert (arch.gated, arch.bias, arch.norm_bias, arch.learned_positions, arch.shared_output) == (
        *(False, True, True, True, True),
    )
    assert (arch.vocab_size, arch.num_parameters) == (None, None)


@pytest.mark.parametrize(
    ("activation", "gated"),
    [
        ("gelu", False),
        ("squared-relu", False),
        ("swiglu", True),
        ("fast-swiglu", True),
        ("geglu", True),
        ("reglu", True),
    ],
)
def test_a_gated_mlp_doubles_fc1(activation: str, gated: bool) -> None:
    shapes = selected_linears(small(activation=activation), TiedLoraConfig())
    assert shapes["linear_fc1"].out_features == (88 if gated else 44)
    assert shapes["linear_fc2"].in_features == 44


def test_target_shapes_with_grouped_queries_and_wide_heads() -> None:
    shapes = selected_linears(small(), TiedLoraConfig(layers=(1, 3)))
    assert {target: (s.in_features, s.out_features, len(s.layers)) for target, s in shapes.items()} == {
        "linear_qkv": (20, 6 * (4 + 2 * 2), 2),
        "linear_proj": (24, 20, 2),
        "linear_fc1": (20, 88, 2),
        "linear_fc2": (44, 20, 2),
    }


@pytest.mark.parametrize(
    ("changes", "per_layer", "outside"),
    [
        ({}, 20 * 48 + 24 * 20 + 20 * 88 + 44 * 20 + (48 + 20 + 88 + 20) + 80, 40 + 2000 + 16 * 20),
        ({"bias": False, "normalization": "rmsnorm"}, 20 * 48 + 24 * 20 + 20 * 88 + 44 * 20 + 40, 20 + 2000 + 320),
        ({"bias": False, "qkv_bias": True}, 20 * 48 + 24 * 20 + 20 * 88 + 44 * 20 + 48 + 80, 40 + 2000 + 320),
        (
            {"bias": False, "qk_layernorm": True, "share_embeddings_and_output_weights": False}
            | {"position_embedding_type": "rope"},
            20 * 48 + 24 * 20 + 20 * 88 + 44 * 20 + 80 + 24,
            40 + 4000,
        ),
    ],
)
def test_the_bases_parameters_counted_by_hand(changes: dict[str, Any], per_layer: int, outside: int) -> None:
    assert small(**changes).num_parameters == 4 * per_layer + outside


def test_missing_and_bad_sizes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Architecture.from_model_config({"hidden_size": 10, "num_attention_heads": 3, "ffn_hidden_size": 0})
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        *("model.num_layers", "model.encoder_seq_length", "model.hidden_size=10", "model.ffn_hidden_size=0"),
    ]
    with pytest.raises(ConfigError) as caught:
        small(num_query_groups=3, num_moe_experts=0, multi_latent_attention=True)
    assert len(caught.value.problems) == 3
    for key, value in (("num_layers", "4"), ("kv_channels", 1.5), ("override_vocab_size", 0)):
        with pytest.raises(ConfigError, match=f"model.{key}={value!r}: must be a whole number"):
            small(**{key: value})


# Layouts


def test_stages_and_chunks_hold_the_layers_in_megatrons_order() -> None:
    arch = small(num_layers=8)
    assert stage_layers(arch, Layout(pp_size=2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert stage_layers(arch, Layout(pp_size=2, virtual_pp_size=2)) == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("changes", "layout", "words"),
    [
        ({}, {"tp_size": 2, "devices": 3}, ["world size 3", "tensor 2 x pipeline 1 x context 1 = 2", "4 ranks"]),
        ({}, {"tp_size": 2, "devices": 4, "num_nodes": 2, "dp_size": 2}, ["world size 8", "set dp_size to 4"]),
        ({"num_layers": 6}, {"pp_size": 4, "devices": 4}, ["num_layers=6", "use one of 1, 2, 3, 6"]),
        (
            {"num_layers": 8},
            {"pp_size": 2, "virtual_pp_size": 3, "devices": 2},
            ["virtual_pipeline_model_parallel_size=3", "a stage's layers, 4", "use one of 1, 2, 4"],
        ),
        ({}, {"virtual_pp_size": 2}, ["virtual_pipeline_model_parallel_size=2", "at least 2 pipeline stages"]),
        (
            {"num_attention_heads": 6, "ffn_hidden_size": 40},
            {"tp_size": 4, "devices": 4},
            ["num_attention_heads=6", "num_query_groups=2"],
        ),
        ({"ffn_hidden_size": 45}, {"tp_size": 2, "devices": 2}, ["ffn_hidden_size=45", "use one of 1"]),
        ({"override_vocab_size": 99}, {"tp_size": 2, "devices": 2}, ["override_vocab_size=99"]),
        (
            {"encoder_seq_length": 15},
            {"tp_size": 2, "devices": 2, "sequence_parallel": True},
            ["sequence_parallel=true", "encoder_seq_length=15", "length of 16", "or sequence_parallel=false"],
        ),
        (
            {"encoder_seq_length": 20, "num_query_groups": 4},
            {"tp_size": 4, "cp_size": 2, "devices": 8, "sequence_parallel": True},
            ["sequence_parallel=true", "encoder_seq_length=20 / context_parallel_size=2", "length of 24"],
        ),
        ({"encoder_seq_length": 18}, {"cp_size": 2, "devices": 2}, ["context_parallel_size=2", "length of 20"]),
        (
            {},
            {"devices": 3, "micro_batch_size": 2, "global_batch_size": 8},
            ["global_batch_size=8", "micro_batch_size=2 x data-parallel size 3", "use 12"],
        ),
        (
            {},
            {"pp_size": 2, "virtual_pp_size": 2, "devices": 2, "micro_batch_size": 1, "global_batch_size": 3},
            ["global_batch_size=3", "number of microbatches, 3", "use 4"],
        ),
    ],
    ids=[
        "world size",
        "data parallel size",
        "layers over stages",
        "layers over chunks",
        "chunks without stages",
        "heads",
        "mlp",
        "vocabulary",
        "sequence over tensor parallel",
        "sequence over tensor and context parallel",
        "sequence over context parallel",
        "batch",
        "microbatches of an interleaved schedule",
    ],
)
def test_a_bad_layout_is_refused_with_value_and_fix(
    changes: dict[str, Any], layout: dict[str, Any], words: list[str]
) -> None:
    problems = check(small(**changes), Layout(**layout), TiedLoraConfig(rank=2))
    assert problems
    text = "\n".join(problems)
    for word in words:
        assert word in text
    assert all(": " in problem and ("use" in problem or "set" in problem or "ask" in problem) for problem in problems)


def test_every_problem_of_a_layout_is_reported() -> None:
    layout = Layout(tp_size=8, pp_size=3, cp_size=3, devices=5, sequence_parallel=True)
    problems = check(small(), layout, TiedLoraConfig(rank=21, layers=(3, 4)))
    named = [problem.split(":")[0].split("=")[0] for problem in problems]
    assert named == [
        "trainer.num_nodes",
        *(["model.tensor_model_parallel_size"] * 4),
        "model.context_parallel_size",
        "model.pipeline_model_parallel_size",
        "layers",
        *(["rank"] * 4),
    ]


def test_a_good_layout_is_accepted_and_the_rank_need_not_be_divisible() -> None:
    layout = Layout(
        tp_size=2,
        pp_size=2,
        cp_size=2,
        devices=8,
        num_nodes=2,
        dp_size=2,
        sequence_parallel=True,
        virtual_pp_size=2,
        micro_batch_size=2,
        global_batch_size=16,
    )
    assert check(small(), layout, TiedLoraConfig(rank=3)) == []
    assert (layout.world_size, layout.resolved_dp_size) == (16, 2)


def test_the_rank_may_reach_the_smaller_side_of_each_target() -> None:
    assert check(small(), Layout(), TiedLoraConfig(rank=20)) == []
    (problem,) = check(small(), Layout(), TiedLoraConfig(rank=21, targets=("linear_fc2",)))
    assert problem == "rank=21: more than the 20 of linear_fc2's smaller side; use at most 20, " + (
        "or leave linear_fc2 out of targets"
    )


def test_a_layout_from_nemos_keys() -> None:
    model: dict[str, Any] = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "sequence_parallel": True,
    }
    model |= {"virtual_pipeline_model_parallel_size": 2, "context_parallel_size": None, "global_batch_size": 8}
    layout = Layout.from_config({"model": model, "trainer": {"devices": [0, 1, 2, 3], "num_nodes": 2}})
    assert layout == Layout(
        tp_size=2, pp_size=4, virtual_pp_size=2, sequence_parallel=True, devices=4, num_nodes=2, global_batch_size=8
    )
    assert Layout.from_config({"model": None}) == Layout()


def test_bad_layout_values_are_reported_together() -> None:
    model = {"tensor_model_parallel_size": 0, "sequence_parallel": "yes", "num_layers_in_first_pipeline_stage": 3}
    with pytest.raises(ConfigError) as caught:
        Layout.from_config({"model": model, "trainer": {"devices": "auto"}})
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "model.num_layers_in_first_pipeline_stage=3",
        "model.tensor_model_parallel_size=0",
        "trainer.devices='auto'",
        "model.sequence_parallel='yes'",
    ]


# Bytes


@pytest.mark.parametrize("tied", [(), ("A",), ("B",), ("A", "B")])
@pytest.mark.parametrize("name", PRESETS)
def test_a_ranks_share_is_the_sum_of_its_tensors(name: str, tied: tuple[str, ...]) -> None:
    """Against the shapes that the adapter itself gives its tensors."""
    config = TiedLoraConfig.preset(name, rank=3, tied=tied, layers=[0, 1, 2])
    arch, layout = small(), Layout(tp_size=2, pp_size=2, devices=4)
    expected = dict.fromkeys(("held", "trained", "tied", "partial"), 0)
    for target, shape in selected_linears(arch, config).items():
        kind = "column" if target in ("linear_qkv", "linear_fc1") else "row"
        for factor in FACTORS:
            if factor in "uv" and factor not in config.trained:
                continue
            numel = math.prod(shape.local_factor_shape(factor, 3, 2))
            copies = 1 if factor in tied else 2  # the first stage has layers 0 and 1, the second only 2
            trained = factor in config.trained
            expected["held"] += copies * numel
            expected["trained"] += copies * numel * trained
            expected["tied"] += numel * (trained and factor in tied)
            expected["partial"] += copies * numel * (trained and (kind, factor) in PARTIAL)
    assert rank_share(arch, layout, config) == RankShare(**expected)


# architecture.md: under sequence parallelism these gradients are partial over the sequence.
PARTIAL = {("column", "A"), ("column", "u"), ("row", "B"), ("row", "u"), ("row", "v")}


def test_bytes_of_a_small_case_by_hand() -> None:
    config = TiedLoraConfig(rank=3, targets=("linear_qkv", "linear_fc2"))
    layout = Layout(tp_size=2, pp_size=2, devices=8, sequence_parallel=True, micro_batch_size=2, global_batch_size=8)
    result = plan(small(), layout, config, O2)
    # qkv is 20 -> 48, fc2 is 44 -> 20. TP 2, PP 2, DP 2, two layers on each stage.
    tied = (3 * 20 + 48 // 2 * 3) + (3 * 44 // 2 + 20 * 3)
    per_layer = (3 + 48 // 2) + (3 + 20)
    local = tied + 2 * per_layer
    numbers = result["numbers"]
    assert result["trained_parameters"] == (3 * 20 + 48 * 3) + (3 * 44 + 20 * 3) + 4 * ((3 + 48) + (3 + 20))
    assert numbers["trained_parameters_per_rank"] == local
    assert numbers["weight_bytes_per_rank"] == 2 * local
    assert numbers["gradient_bytes_per_rank"] == 4 * local
    assert numbers["optimizer_bytes_per_rank"] == 12 * local
    assert numbers["bytes_per_rank"] == 18 * local
    # Rings of two: each rank sends as many bytes as are summed.
    assert result["reduced_bytes_per_step"] == numbers["reduced_bytes_per_step"] == 4 * tied
    assert numbers["data_parallel_bytes_per_step"] == 4 * local
    partial = 3 * 20 + 2 * 3 + (20 * 3 + 2 * (3 + 20))
    assert numbers["sequence_parallel_bytes_per_step"] == 4 * partial
    # Two targets of two layers, 2 sequences of 16 tokens, 3 wide, 2 bytes.
    assert numbers["activation_bytes_per_microbatch"] == 2 * 2 * (2 * 16) * 3 * 2
    halved = plan(small(), dataclasses.replace(layout, cp_size=2), config, O2)["numbers"]
    assert halved["activation_bytes_per_microbatch"] == 2 * 2 * 16 * 3 * 2
    assert halved["data_parallel_bytes_per_step"] == 4 * local, "context-parallel ranks hold the same parameters"
    lora = result["lora_numbers"]
    lora_local = 2 * tied
    assert (lora["trained_parameters_per_rank"], lora["reduced_bytes_per_step"]) == (lora_local, 0)
    assert result["share_of_lora"]["reduced_bytes_per_step"] is None
    assert result["share_of_lora"]["bytes_per_rank"] == local / lora_local
    assert result["percent_of_base"] == 100 * result["trained_parameters"] / small().num_parameters


def test_rings_of_more_ranks_and_no_ring_of_one() -> None:
    config = TiedLoraConfig(rank=4, targets=("linear_qkv",))
    tied_bytes = 4 * (4 * 20 + 48 * 4)
    for pp_size, expected in ((1, 0), (2, tied_bytes), (4, tied_bytes * 3 // 2)):
        result = plan(small(), Layout(pp_size=pp_size, devices=pp_size), config, O2)
        assert result["reduced_bytes_per_step"] == expected
        assert result["numbers"]["activation_bytes_per_microbatch"] == 0
        assert result["numbers"]["sequence_parallel_bytes_per_step"] == 0


def test_frozen_tied_factors_are_held_and_never_summed() -> None:
    config = TiedLoraConfig.preset("vera", rank=4, targets=["linear_qkv"])
    result = plan(small(), Layout(pp_size=2, devices=2), config, O2)
    held = 4 * 20 + 48 * 4 + 2 * (4 + 48)
    assert result["reduced_bytes_per_step"] == 0
    assert result["numbers"]["weight_bytes_per_rank"] == 2 * held
    assert result["numbers"]["gradient_bytes_per_rank"] == 4 * 2 * (4 + 48)


def test_each_chunk_holds_its_own_tied_tensors_and_a_stage_sums_once() -> None:
    config = TiedLoraConfig.preset("tl5", rank=4, targets=["linear_qkv"])
    layout = Layout(pp_size=2, devices=2)
    plain = plan(small(), layout, config, O2)
    chunks = plan(small(), dataclasses.replace(layout, virtual_pp_size=2), config, O2)
    assert chunks["numbers"]["bytes_per_rank"] == 2 * plain["numbers"]["bytes_per_rank"]
    assert chunks["reduced_bytes_per_step"] == plain["reduced_bytes_per_step"] > 0


@pytest.mark.parametrize(
    ("precision", "amp_O2", "per_parameter"),
    [("bf16", True, 2 + 4 + 12), ("16-mixed", True, 18), ("bf16-mixed", False, 4 + 4 + 8), (32, False, 16)],
)
def test_precisions_are_nemos(precision: object, amp_O2: bool, per_parameter: int) -> None:
    config = TiedLoraConfig.preset("tl5", rank=4)
    numbers = plan(small(), Layout(), config, Precision.from_names(precision, amp_O2))["numbers"]
    assert numbers["bytes_per_rank"] == per_parameter * numbers["trained_parameters"]


@pytest.mark.parametrize("dtype", [numpy.float16, numpy.float32])
@pytest.mark.parametrize(
    "config",
    [
        TiedLoraConfig(rank=3),
        TiedLoraConfig.preset("lora", rank=2, targets=["mlp"]),
        TiedLoraConfig.preset("vera", rank=20),
        TiedLoraConfig(rank=1, targets=("linear_proj",), layers=(9, 10, 11), tied=("A",), trained=("u", "B")),
    ],
)
def test_the_file_is_at_most_64_kib_smaller_than_planned(config: TiedLoraConfig, dtype: Any) -> None:
    """Against a file written as the adapter's own are: a tar of the YAML and the safetensors."""
    arch = small(num_layers=120)
    shapes = selected_linears(arch, config)
    layers = config.layers or range(120)
    state = {}
    for target, shape in shapes.items():
        sides = {"A": (config.rank, shape.in_features), "B": (shape.out_features, config.rank)}
        for factor, side in {**sides, "u": (config.rank,), "v": (shape.out_features,)}.items():
            if factor in "AB" or factor in config.trained:
                lead = () if factor in config.tied else (len(layers),)
                state[f"{target}.{factor}"] = numpy.zeros((*lead, *side), dtype)
    description = {"targets": {target: {"layers": list(layers)} for target in shapes}, "peft": config.as_dict()}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (("model_config.yaml", yaml.safe_dump(description).encode()), ("x", save(state))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    actual = len(file.getvalue())
    assert actual <= largest_file(config, shapes, dtype().itemsize) <= actual + 64 * 1024


# Refusals of the command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["format=xml"], ["format='xml'", "table, json"]),
        (["model=llama3"], ["model=llama3", "gpt_2b, llama2_13b"]),
        (["layout=tp3"], ["layout=tp3", "tp2pp2"]),
        (["trainer.device=2"], ["trainer.device=2", "did you mean trainer.devices?"]),
        (["model.hiddensize=2"], ["model.hiddensize=2", "did you mean model.hidden_size?"]),
        (["format"], ["'format'", "key=value"]),
        (["model.num_layers=[1"], ["'model.num_layers=[1'", "not an override"]),
        (["layout=tp2,pp2"], ["layout=tp2,pp2", "a sweep"]),
        (["~trainer.nothing"], ["~trainer.nothing"]),
        (["model.peft.peft_scheme=lora"], ["peft_scheme='lora'", "only tied_lora"]),
        (["model.peft.tied_lora.adapter_dim=8"], ["adapter_dim=8", "write rank"]),
        (["model.peft.tied_lora.weight_tying=true"], ["weight_tying=True", "tied: [A, B]"]),
        (["+model.peft.tied_lora.rnk=8"], ["rnk=8", "did you mean rank?"]),
        (["model.peft.tied_lora.preset=tl9"], ["preset='tl9'", "lora, vera, tl5, tl6"]),
        (["model.peft.tied_lora=8"], ["model.peft.tied_lora=8", "section"]),
        (["trainer=8"], ["trainer=8", "section"]),
        (["model.hidden_size=???"], ["hidden_size"]),
        (["model.num_layers=null"], ["model.num_layers: missing"]),
        (["trainer.precision=fp8"], ["trainer.precision='fp8'", "bf16"]),
        (["trainer.precision=32"], ["model.megatron_amp_O2=true", "precision=bf16"]),
        (["layout=tp8pp4", "trainer.num_nodes=3"], ["trainer.num_nodes=3", "= 32"]),
        (["trainer.devices=auto"], ["trainer.devices='auto'", "whole number"]),
        (["model.peft.tied_lora.rank=4097"], ["rank=4097", "4096", "linear_proj"]),
        (["model.peft.tied_lora.layers=[32]"], ["layers: [32]", "0 to 31"]),
    ],
)
def test_what_cannot_work_is_refused(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(refusals(capsys, *arguments))
    for word in words:
        assert word in text


def test_a_section_is_no_value_where_nemo_has_made_a_group_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    import nemo.core.config.pytorch_lightning  # noqa: F401

    assert "trainer=8: trainer is a section" in "\n".join(refusals(capsys, "trainer=8"))


def test_all_bad_overrides_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    problems = refusals(capsys, "model=llama3", "trainer.device=2", "format", "layout=tp3", "trainer.num_nodes=1")
    assert len(problems) == 4


def test_bad_values_of_all_parts_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    problems = refusals(
        capsys,
        "format=xml",
        "model.num_layers=31",
        "layout=tp2pp2",
        "trainer.devices=3",
        "trainer.precision=8",
        "model.peft.tied_lora.rank=0",
        "model.peft.tied_lora.r=8",
    )
    assert [problem.split("=")[0] for problem in problems] == [
        *("format", "r", "rank", "trainer.precision", "trainer.num_nodes", "model.pipeline_model_parallel_size"),
    ]


# Several adapters on one model


def test_adapters_of_llama2_7b_counted_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    several = planned(capsys, "model=llama2_7b", "preset=vera", "model.peft.tied_lora.rank=8")["several"]
    # 32 layers; out: qkv 12288, proj 4096, fc1 22016, fc2 4096; in: 4096, 4096, 4096, 11008; 2 bytes.
    u_and_v, A_and_B = 32 * (4 * 8 + 42_496) * 2, 8 * (42_496 + 23_296) * 2
    assert several["numbers"] == [1, 10, 1000]
    wanted = {
        "this adapter": (u_and_v, A_and_B),
        "lora": (32 * A_and_B, 0),
        "vera": (u_and_v, A_and_B),
        "tl5": (A_and_B, 0),
        "tl6": (u_and_v + A_and_B, 0),
    }
    assert list(several["adapters"]) == list(wanted)
    for name, (own, shared) in wanted.items():
        entry = several["adapters"][name]
        assert (entry["own_bytes"], entry["shared_bytes"]) == (own, shared), name
        assert entry["bytes"] == entry["bytes_per_rank"] == [shared + number * own for number in (1, 10, 1000)]


def test_adapters_over_stages_and_tensor_parallel_ranks_counted_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama2_7b", "layout=tp2pp2", "preset=vera", "model.peft.tied_lora.rank=8", "adapters=[3]"]
    targets = ["model.peft.tied_lora.targets=[linear_qkv,linear_proj]", "model.peft.tied_lora.layers=[0,1,20]"]
    entry = planned(capsys, *words, *targets)["several"]["adapters"]["this adapter"]
    # qkv: A whole, B and v halved; proj: A halved, B and v whole. Two of the three layers are in the first stage.
    shared = 2 * 8 * (4096 + 12_288 // 2 + 4096 // 2 + 4096)
    a_layer = 2 * (8 + 12_288 // 2 + 8 + 4096)
    assert (entry["own_bytes"], entry["shared_bytes"]) == (2 * a_layer, shared)
    assert entry["bytes_per_rank"] == [shared + 3 * 2 * a_layer]
    assert entry["bytes"] == [2 * (2 * shared + 3 * 3 * a_layer)]


def test_the_table_shows_several_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=llama2_7b", "preset=vera", "model.peft.tied_lora.rank=8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("adapters on one model"))
    assert head.split()[-3:] == ["1", "10", "1,000"]
    (row,) = [line for line in lines if line.startswith("per rank: this adapter")]
    assert row.split()[-6:] == ["3.60", "MiB", "26.96", "MiB", "2.54", "GiB"]
    assert sum(line.startswith("all ranks: ") for line in lines) == 5


@pytest.mark.parametrize("numbers", ["null", "[]", "[0]", "[1.5]", "12", "[true]", "some"])
def test_bad_numbers_of_adapters_are_refused(capsys: pytest.CaptureFixture[str], numbers: str) -> None:
    (problem,) = refusals(capsys, f"adapters={numbers}")
    assert problem.startswith("adapters=")
    assert "whole numbers of at least 1" in problem


def test_the_pages_table_of_adapters_is_the_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=llama2_7b", "preset=vera", "model.peft.tied_lora.rank=8"]) == 0
    printed = {
        line.split()[2]: [" ".join(cells) for cells in zip(*[iter(line.split()[3:])] * 2, strict=True)]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("all ranks: ") and "this adapter" not in line
    }
    page = (ROOT / "docs" / "several_adapters.md").read_text()
    for position, number in enumerate(("1", "10", "1,000")):
        cells = [printed[preset][position] for preset in ("lora", "vera", "tl5", "tl6")]
        assert f"| {number} | {' | '.join(cells)} |" in page
