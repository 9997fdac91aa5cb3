# SPDX-License-Identifier: Apache-2.0
"""A user's whole YAML for NeMo's scripts, read by --config-path and --config-name: what it sets, what it is told. Pure Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.base_config import adapter_section
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.composing.dotted_keys import flat
from nemo_tied_lora.planning.composing.nemo_keys import no_effect, other_scheme
from nemo_tied_lora.planning.composing.yaml_sources import YamlSources
from nemo_tied_lora.planning.preflight import check_finetuning
from tests.harness.nemo_yamls import FINETUNING
from tests.harness.paths import ROOT
from tests.harness.run_configs import changed
from tests.harness.user_yaml import composed, refused, write

DATA = [f"model.data.{name}_ds.file_names=[{name}.jsonl]" for name in ("train", "validation")]
# Keys of NeMo's file that this command changes or leaves out, and says so in its notes.
CHANGED = {"trainer.accelerator", "model.peft.peft_scheme", "model.data.train_ds.concat_sampling_probabilities"}
LEFT_OUT: tuple[str, ...] = (
    "model.fsdp_",
    "model.peft.adapter_tuning",
    "model.peft.lora_tuning",
    "model.peft.p_tuning",
)
LEFT_OUT += ("model.peft.ia3_tuning", "model.peft.selective_tuning")


def test_nemos_whole_file_keeps_every_value_but_those_that_the_notes_name(tmp_path: Path) -> None:
    values, notes = composed(write(tmp_path, FINETUNING), *DATA)
    theirs = flat(OmegaConf.to_container(OmegaConf.create(FINETUNING), resolve=False))  # type: ignore[arg-type]
    ours, kept = flat(values), 0
    for key, value in theirs.items():
        if key in CHANGED or key.startswith(LEFT_OUT) or value == "???" or "${" in str(value):
            continue
        assert ours[key] == value, key
        kept += 1
    assert kept > 100
    assert values["name"] == "megatron_gpt_peft_tied_lora_tuning"
    assert values["exp_manager"]["checkpoint_callback_params"]["monitor"] == "validation_loss"
    assert values["model"]["data"]["train_ds"]["concat_sampling_probabilities"] == [1.0]
    assert not any(key.startswith(LEFT_OUT) for key in ours)
    text = "\n".join(notes)
    for named in ("mine.yaml", "peft_scheme=adapter", "adapter_tuning", "p_tuning", "ia3_tuning", "selective_tuning"):
        assert named in text
    assert "model.peft.lora_tuning: taken as model.peft.tied_lora.rank=32" in text
    with pytest.raises(ConfigError) as error:
        check_finetuning(values)
    assert all("restore_from_path" in one or "file_names" in one for one in error.value.problems), (
        "only the files are missing"
    )
    config = adapter_section(values["model"]["peft"])
    assert (config.rank, config.targets, config.scale) == (32, ("linear_qkv",), 1)


def test_lora_tuning_is_translated_where_it_has_a_meaning(tmp_path: Path) -> None:
    section = {
        "adapter_dim": 16,
        "alpha": 32,
        "adapter_dropout": 0.1,
        "target_modules": ["attention_dense", "mlp"],
        "layer_selection": [1, 3],
        "column_init_method": "normal",
        "row_init_method": "zero",
    }
    file = write(tmp_path, changed(FINETUNING, model__peft__peft_scheme="lora", model__peft__lora_tuning=section))
    config = adapter_section(composed(file)[0]["model"]["peft"])
    assert (config.rank, config.alpha, config.dropout) == (16, 32, 0.1)
    assert config.targets == ("linear_proj", "linear_fc1", "linear_fc2")
    assert (config.layers, config.init_of("A"), config.init_of("v")) == ((0, 2), "normal", 0.0)
    plain_lora = adapter_section(composed(file, "preset=lora")[0]["model"]["peft"])
    assert (plain_lora.trained, plain_lora.init_of("B")) == (("B", "A"), "zero")


def test_what_is_typed_wins_over_the_file_and_typed_groups_too(tmp_path: Path) -> None:
    file = write(tmp_path, changed(FINETUNING, model__optim__lr=3e-5, model__tensor_model_parallel_size=4))
    values, _ = composed(file, "layout=pp2", "model.optim.lr=1e-3", "model.peft.lora_tuning.adapter_dim=4")
    assert values["model"]["optim"]["lr"] == 1e-3
    assert (values["model"]["tensor_model_parallel_size"], values["trainer"]["devices"]) == (1, 2)
    assert values["model"]["peft"]["tied_lora"]["rank"] == 4
    values, _ = composed(file)
    assert (values["model"]["optim"]["lr"], values["model"]["tensor_model_parallel_size"]) == (3e-5, 4)
    values, notes = composed(file, "model.peft.tied_lora.rank=8")
    assert (values["model"]["peft"]["tied_lora"]["rank"], adapter_section(values["model"]["peft"]).scale) == (8, 1)
    assert any("its own value (rank)" in note for note in notes)


def test_a_file_with_tied_lora_of_its_own_needs_no_translation(tmp_path: Path) -> None:
    own = {"preset": "tl5", "rank": 4}
    values = changed(FINETUNING, model__peft__peft_scheme="tied_lora", model__peft__tied_lora=own)
    peft, notes = composed(write(tmp_path, values))
    config = adapter_section(peft["model"]["peft"])
    assert (config.rank, config.trained, len(config.targets)) == (4, ("B", "A"), 4)
    assert not any("peft_scheme" in note for note in notes)


@pytest.mark.parametrize("scheme", ["ptuning", "ia3", "none", None, "lora,ptuning"])
def test_a_scheme_that_means_other_training_stays_for_the_check_that_refuses_it(tmp_path: Path, scheme: Any) -> None:
    file = write(tmp_path, changed(FINETUNING, model__peft__peft_scheme=scheme))
    assert composed(file)[0]["model"]["peft"]["peft_scheme"] == scheme
    assert composed(file, "model.peft.peft_scheme=tied_lora")[0]["model"]["peft"]["peft_scheme"] == "tied_lora"


def test_what_a_file_takes_from_a_section_that_is_translated_or_left_out_stays(tmp_path: Path) -> None:
    name = "r${model.peft.lora_tuning.adapter_dim}_${model.peft.p_tuning.virtual_tokens}_lr${model.optim.lr}"
    file = write(tmp_path, changed(FINETUNING, name=name, model__fsdp_grad_reduce_dtype="${trainer.precision}"))
    assert composed(file, "model.peft.lora_tuning.adapter_dim=4")[0]["name"] == "r4_10_lr0.0001"


def test_a_small_file_and_an_empty_one_leave_the_rest_to_the_defaults(tmp_path: Path) -> None:
    shipped = plain(compose_config("finetune", []))
    values, _ = composed(write(tmp_path, "trainer:\nmodel:\n  optim: {lr: 2e-4}\n"))
    assert values["trainer"] == shipped["trainer"]
    assert values["model"]["optim"] == {**shipped["model"]["optim"], "lr": 2e-4}
    assert composed(write(tmp_path, "# nothing yet\n"))[0] == shipped


def test_defaults_lists_groups_hydra_sections_and_resolvers_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    write(tmp_path / "tune", "rate: 5e-5\n", "fast.yaml")
    write(tmp_path / "tune", "rate: 1e-5\n", "slow.yaml")
    write(tmp_path, FINETUNING, "base.yaml")
    file = write(
        tmp_path,
        """
defaults: [base, {tune: fast}, _self_]
hydra: {run: {dir: .}, output_subdir: null}
exp_manager: {exp_dir: "${oc.env:SCRATCH}/runs"}
model:
  global_batch_size: ${multiply:${model.micro_batch_size},8}
  optim: {lr: "${tune.rate}"}
""",
    )
    values, _ = composed(file)
    assert values["exp_manager"]["exp_dir"] == "/scratch/me/runs"
    assert (values["model"]["global_batch_size"], values["model"]["optim"]["lr"]) == (32, 5e-5)
    assert composed(file, "tune=slow")[0]["model"]["optim"]["lr"] == 1e-5
    # A folder that has the name of a shipped group: each choice is found where it is, and no other typed group is lost.
    write(tmp_path / "layout", "# @package _global_\nmodel: {seed: 7}\n", "mine.yaml")
    values, _ = composed(file, "+layout=mine", "preset=tl5")
    assert (values["model"]["seed"], values["model"]["peft"]["tied_lora"]["preset"]) == (7, "tl5")
    assert composed(file, "layout=tp2", "preset=tl5")[0]["trainer"]["devices"] == 2
    assert "layout=tp5" in refused(file, "layout=tp5")[0]
    assert "nosuch" in refused(file, "tune=nosuch")[0]
    assert composed(file, "~model.peft.lora_tuning")[0]["model"]["peft"]["tied_lora"]["rank"] is None
    over_ours = write(tmp_path, "defaults: [finetune, _self_, {override layout: tp2}]\nname: mine\n", "ours.yaml")
    assert composed(over_ours)[0]["trainer"]["devices"] == 2
    write(tmp_path / "far" / "speed", "model: {optim: {lr: 0.5}}\n", "high.yaml")
    text = f"defaults: [{{speed@_global_: high}}, _self_]\nhydra: {{searchpath: ['file://{tmp_path}/far']}}\n"
    assert composed(write(tmp_path, text, "far.yaml"))[0]["model"]["optim"]["lr"] == 0.5
    write(tmp_path / "more" / "layout", "# @package _global_\ntrainer: {devices: 3}\n", "three.yaml")
    sources = YamlSources(own=over_ours, config_dir=tmp_path / "more")
    assert compose_config("finetune", ["layout=three"], sources).trainer.devices == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trainer:\n\tdevices: 1\n", "line 2"),
        ("trainer: {devices: 1\nmodel: [\n", "not YAML"),
        ("a: 1\na: 2\n", "line 2"),
        ("- trainer\n- model\n", "a list, not keys"),
        ("just words\n", "name another file"),
        ("trainer: 5\n", "trainer=5: must be a section"),
        ("model: {optim: adam}\n", "model.optim='adam': must be a section"),
        ("model: {optim: {learning_rate: 1e-4}}\n", "write model.optim.lr"),
        ("optim: {lr: 1e-4}\n", "write model.optim.lr"),
        ("services: {web: {image: nginx}}\n", "name another file"),
        ("trainer: {gpus: 8}\n", "trainer.devices"),
        ("trainer: {strategy: ddp}\n", "NeMo chooses it"),
        ("trainer: {max_stps: 8}\n", "did you mean trainer.max_steps"),
        ("trainer: {use_distributed_sampler: true}\n", "must stay false"),
        ("exp_manager: {resume: true}\n", "exp_manager has no such key"),
        ("model: {tensor_model_paralel_size: 2}\n", "did you mean model.tensor_model_parallel_size"),
        ("model: {data: {train_ds: {file_path: a.jsonl}}}\n", "file_names"),
        ("model: {peft: {lora_tuning: {dropout: 0.1}}}\n", "adapter_dropout"),
        ("model: {peft: {lora_tuning: {target_modules: [q_proj]}}}\n", "attention_qkv"),
        ("modle: {optim: {lr: 1, betas: [0, 0]}, seed: 5}\n", "modle: not a section of NeMo; did you mean model?"),
        ("model: {data: {trian_ds: {shuffle: true, seed: 3}}}\n", "did you mean model.data.train_ds?"),
        ("model.optim.lr: 1e-3\n", "a key with dots"),
        ("hydra: {nosuch: 1}\n", "nosuch"),
        ("defaults: [mine, _self_]\n", "leads back to the same file"),
        ("defaults: mine\n", "must be a list"),
        ("name: a\n---\nname: b\n", "line 2"),
        ("name: !!python/object/apply:os.system [ls]\n", "line 1"),
        ("layout: tp2\n", "override layout: tp2"),
        ("model: {peft: {lora_tuning: [1]}}\n", "must be a section"),
        ("defaults: [nosuch]\n", "nosuch"),
        ("defaults: [{override hydra/launcher: submitit_slurm}]\n", "tied-lora launch"),
        ("name: ${nosuch.key}\n", "nosuch.key"),
        ("name: ${oc.env:NO_SUCH_VARIABLE_HERE}\n", "NO_SUCH_VARIABLE_HERE"),
        ("name: ${nosuch:1}\n", "nosuch"),
        ("name: ${open\n", "mine.yaml: name: an interpolation that cannot be read"),
        (
            "name: ${peft.model.seed}\n",
            "name=${peft.model.seed}: the configuration has no key peft.model.seed; write ${model.seed}",
        ),
        ("name: ${env:HOME}\n", "write ${oc.env:NAME}"),
        ("model: {data: {train_ds: {file_names: ['${folder}/a.jsonl']}}}\n", "has no key folder"),
    ],
)
def test_a_wrong_file_is_answered_with_its_name_and_the_place(tmp_path: Path, text: str, told: str) -> None:
    problems = refused(write(tmp_path, text))
    assert len(problems) == 1
    assert told in problems[0]


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"name: \xff\xfe\n")
    assert refused(tmp_path / "mine.yaml")[0].endswith("mine.yaml: is not UTF-8: byte 0xff; save it as UTF-8")


def test_every_cause_of_a_failed_interpolation_is_told_once(tmp_path: Path) -> None:
    text = (
        "name: ${nosuch}\nmodel: {data: {validation_ds: {file_names: ['${nowhere}/a'], context_key: '${nosuch}'}}}\n"
    )
    problems = refused(write(tmp_path, text))
    assert [problem.partition("=")[0] for problem in problems] == ["name", "model.data.validation_ds.file_names"]


def test_what_has_no_effect_need_not_be_resolved(tmp_path: Path) -> None:
    text = "model: {data: {validation_ds: {context_key: '${model.data.train_ds.nosuch}'}}}\n"
    values, notes = composed(write(tmp_path, text))
    assert "context_key" not in values["model"]["data"]["validation_ds"]
    assert any("context_key" in note for note in notes)


def test_a_section_without_rank_or_targets_says_that_nemos_defaults_differ(tmp_path: Path) -> None:
    for section, here, absent in (
        ({"adapter_dim": 4}, "targets: all four linears (NeMo: target_modules=[attention_qkv])", "NeMo: adapter_dim"),
        ({"target_modules": ["mlp"]}, "rank: 8 (NeMo: adapter_dim=32)", "all four"),
    ):
        _, notes = composed(write(tmp_path, {"model": {"peft": {"lora_tuning": section}}}))
        (note,) = [note for note in notes if "taken as" in note]
        assert here in note
        assert absent not in note


def test_keys_that_nobody_knows_are_passed_on_and_named(tmp_path: Path) -> None:
    values, notes = composed(write(tmp_path, {"my_notes": "first try", "model": {"mcore_gpt": True, "xyzzy": 1}}))
    assert (values["my_notes"], values["model"]["xyzzy"], values["model"]["mcore_gpt"]) == ("first try", 1, True)
    (note,) = [note for note in notes if "unknown" in note]
    assert {"my_notes", "model.xyzzy"} == set(note.partition(": ")[2].split(", "))
    assert "mcore_gpt" not in note


def test_a_changed_value_without_effect_is_told_and_nemos_default_is_not(tmp_path: Path) -> None:
    _, notes = composed(write(tmp_path, FINETUNING))
    assert not any("fsdp" in note for note in notes)
    _, notes = composed(write(tmp_path, changed(FINETUNING, model__fsdp_sharding_strategy="hybrid")))
    assert any("model.fsdp_sharding_strategy=hybrid" in note for note in notes)


def test_pretrain_takes_the_file_without_its_peft_section(tmp_path: Path) -> None:
    values, notes = composed(write(tmp_path, FINETUNING), command="pretrain")
    assert values["model"]["peft"]["peft_scheme"] == "none"
    assert "tied_lora" not in values["model"]["peft"]
    assert any("model.peft: not read" in note for note in notes)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("conf", "mine"),
        ("conf", "mine.yaml"),
        ("./conf/", "mine"),
        ("{here}/conf", "mine"),
        (None, "mine"),
        (None, "conf/mine"),
        (None, "{here}/conf/mine.yaml"),
        ("conf/mine.yaml", None),
        ("nemo", None),
    ],
)
def test_the_flags_find_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any, name: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "conf", {"name": "mine"})
    write(tmp_path / "nemo", {"name": "mine"}, "megatron_gpt_finetuning_config.yaml")
    given = [None if word is None else word.format(here=tmp_path) for word in (path, name)]
    found = YamlSources.from_flags("finetune", None, *given)
    assert composed(found.own)[0]["name"] == "mine"  # type: ignore[arg-type]
    flags = {name[2:].replace("-", "_"): value for name, value in (flag.split("=") for flag in found.flags())}
    monkeypatch.chdir("/")
    assert YamlSources.from_flags("finetune", None, **flags) == found, "a job finds the same file from another folder"


@pytest.mark.parametrize(
    ("command", "path", "name", "told"),
    [
        ("finetune", "nosuch", "mine", "no such folder"),
        ("finetune", "conf", "mime", "did you mean mine"),
        ("finetune", "conf", "qqq", "the YAMLs there are mine, old"),
        ("finetune", "conf", None, "--config-name"),
        ("finetune", "empty", "mine", "no YAMLs"),
        ("finetune", "pkg://nemo.conf", "mine", "only folders"),
        ("finetune", "conf", "short", "must end in .yaml"),
        ("plan", "conf", "mine", "finetune, generate, pretrain and launch do"),
        ("export", None, "mine", "reads no YAML"),
    ],
)
def test_wrong_flags_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, path: Any, name: Any, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "conf", {"name": "mine"})
    write(tmp_path / "conf", {"name": "mine"}, "old.yaml")
    write(tmp_path / "conf", "name: mine\n", "short.yml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        YamlSources.from_flags(command, None, path, name)
    assert len(error.value.problems) == 1
    assert told in error.value.problems[0]


def test_the_page_lists_every_default_that_differs_from_nemos() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text().partition("<!-- defaults:")[2].partition("\n\nNot in")[0]
    rows = [
        [cell.strip(" `") for cell in row.strip("|").split("|")] for row in page.splitlines() if row.startswith("| `")
    ]
    listed = {key: (yaml.safe_load(theirs), ours) for key, theirs, ours in rows}
    theirs = flat(FINETUNING)
    ours = flat(OmegaConf.to_container(compose_config("finetune", []), resolve=False))  # type: ignore[arg-type]
    differing = {
        key: value for key, value in ours.items() if key in theirs and theirs[key] != value and theirs[key] != "???"
    }
    assert listed.keys() == differing.keys()
    for key, value in differing.items():
        shown = listed[key][1]
        assert listed[key][0] == theirs[key], key
        assert yaml.safe_load(shown) == value or (shown == "that of train_ds" and "train_ds" in value), key
    for key in theirs.keys() - ours.keys():
        assert no_effect(key) or other_scheme(key) or key.startswith(("model.peft.lora_tuning", "model.data.chat_")), (
            key
        )
