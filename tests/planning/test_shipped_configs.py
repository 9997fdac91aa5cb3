# SPDX-License-Identifier: Apache-2.0
"""The shipped YAMLs: each opens with a command that composes it, and NeMo's keys keep their names. Pure Python."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_tied_lora.commands.main import COMMANDS
from nemo_tied_lora.config import PRESETS, RankBudget, TiedLoraConfig
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning import config_folder as config_folder_module
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.base_config import adapter_section
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.config_folder import config_folder

FOLDER = config_folder()
YAMLS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))

# Keys of NeMo's megatron_gpt_finetuning_config.yaml that people override.
NEMOS_KEYS = [
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.precision",
    "trainer.max_steps",
    "trainer.val_check_interval",
    "trainer.gradient_clip_val",
    "trainer.log_every_n_steps",
    "exp_manager.explicit_log_dir",
    "exp_manager.exp_dir",
    "exp_manager.create_wandb_logger",
    "exp_manager.wandb_logger_kwargs.project",
    "exp_manager.resume_if_exists",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end",
    "exp_manager.checkpoint_callback_params.save_best_model",
    "exp_manager.create_early_stopping_callback",
    "exp_manager.early_stopping_callback_params.patience",
    "model.seed",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.global_batch_size",
    "model.micro_batch_size",
    "model.restore_from_path",
    "model.megatron_amp_O2",
    "model.sequence_parallel",
    "model.activations_checkpoint_granularity",
    "model.activations_checkpoint_method",
    "model.activations_checkpoint_num_layers",
    "model.answer_only_loss",
    "model.hidden_dropout",
    "model.peft.peft_scheme",
    "model.peft.restore_from_path",
    "model.data.train_ds.file_names",
    "model.data.train_ds.concat_sampling_probabilities",
    "model.data.train_ds.max_seq_length",
    "model.data.train_ds.prompt_template",
    "model.data.train_ds.label_key",
    "model.data.validation_ds.file_names",
    "model.data.validation_ds.metric.name",
    "model.data.validation_ds.tokens_to_generate",
    "model.data.test_ds.file_names",
    "model.optim.name",
    "model.optim.lr",
    "model.optim.betas",
    "model.optim.sched.warmup_steps",
    "model.optim.sched.min_lr",
]


@pytest.mark.parametrize("name", YAMLS)
def test_every_yaml_opens_with_a_command_that_composes(name: str) -> None:
    head = (FOLDER / name).read_text().splitlines()[:4]
    command = next(line for line in head if line.startswith("# tied-lora "))
    _, _, name_of_command, *overrides = shlex.split(command, comments=False)
    assert name_of_command in COMMANDS
    plain(compose_config(name_of_command, overrides))


@pytest.mark.parametrize("key", NEMOS_KEYS)
def test_nemos_keys_keep_their_names(key: str) -> None:
    node = plain(compose_config("finetune", []))
    for part in key.split("."):
        assert part in node, key
        node = node[part]


def test_the_peft_section_lists_every_field_and_leaves_the_defaults_to_the_dataclass() -> None:
    peft = compose_config("finetune", []).model.peft
    section = dict(peft.tied_lora)
    assert (peft.peft_scheme, peft.restore_from_path) == ("tied_lora", None)
    assert section.keys() == {"preset"} | {field.name for field in dataclasses.fields(TiedLoraConfig)}
    assert section["rank_budget"].keys() == {field.name for field in dataclasses.fields(RankBudget)}
    assert {*section.pop("rank_budget").values(), *section.values()} == {None}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_group_is_the_preset(preset: str) -> None:
    peft = plain(compose_config("finetune", [f"preset={preset}"]))["model"]["peft"]
    assert adapter_section(peft) == TiedLoraConfig.preset(preset)


def test_an_override_that_fits_nothing_is_explained() -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config("finetune", ["model.optim.learning_rate=1", "layout=tp5", "preset"])
    text = str(caught.value)
    assert "write model.optim.lr" in text
    assert "layout=tp5: unknown; choose one of" in text
    assert "'preset': not an override" in text


@pytest.mark.parametrize("layout", [name for name in YAMLS if name.startswith("layout/")])
def test_a_layouts_name_has_its_sizes_and_all_ranks_are_used(layout: str) -> None:
    option = layout.removeprefix("layout/").removesuffix(".yaml")
    with initialize_config_dir(version_base="1.3", config_dir=str(FOLDER)):
        cfg: Any = OmegaConf.to_container(compose("plan", [f"layout={option}"]))
    tp_size, pp_size = cfg["model"]["tensor_model_parallel_size"], cfg["model"]["pipeline_model_parallel_size"]
    name = (f"tp{tp_size}" if tp_size > 1 else "") + (f"pp{pp_size}" if pp_size > 1 else "")
    assert option == (name or "single")
    assert cfg["trainer"]["devices"] * cfg["trainer"]["num_nodes"] == tp_size * pp_size
    assert "layout" not in cfg, "the layout's keys must land in model and trainer"


def test_the_shipped_layouts_are_all_there() -> None:
    expected = {"single", "tp2", "tp3", "pp2", "tp2pp2", "tp4", "tp8", "tp8pp4", "tp8pp8"}
    assert expected <= {path.stem for path in (FOLDER / "layout").glob("*.yaml")}


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        # The models' published sizes; for gpt_2b, NeMo prints 2.25e9.
        ("llama2_7b", 6_738_415_616),
        ("llama2_13b", 13_015_864_320),
        ("llama2_70b", 68_976_648_192),
        ("gpt_2b", 2_253_590_528),
        ("smollm2", 134_515_008),
    ],
)
def test_a_shipped_model_has_its_published_number_of_parameters(model: str, parameters: int) -> None:
    cfg = yaml.safe_load((FOLDER / "model" / f"{model}.yaml").read_text())
    assert Architecture.from_model_config(cfg).num_parameters == parameters


def test_the_installed_package_finds_its_own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "nemo_tied_lora"
    monkeypatch.setattr(config_folder_module, "__file__", str(package / "planning" / "config_folder.py"))
    with pytest.raises(FileNotFoundError, match="install the package again"):
        config_folder()
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "plan.yaml").touch()
    assert config_folder() == (package / "configs").resolve()
