# SPDX-License-Identifier: Apache-2.0
"""Override lines that people type for NeMo's scripts: each keeps its meaning, or its answer names the key to write. Pure Python."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, compose_with_notes, plain
from nemo_tied_lora.planning.composing.yaml_sources import YamlSources
from nemo_tied_lora.planning.preflight import check_finetuning

_WITHOUT_SCHEDULE = {
    "name": "fused_adam",
    "lr": 1e-4,
    "weight_decay": 0.01,
    "betas": [0.9, 0.98],
    "lr_multipliers": dict.fromkeys(("A", "B", "u", "v")),
}
# From NeMo's continuous integration, its tutorials for LoRA, the scripts' own docstrings, and public shell scripts.
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("trainer.devices=2", {"trainer.devices": 2}),
    ("trainer.num_nodes=4", {"trainer.num_nodes": 4}),
    ("trainer.accelerator=gpu", {"trainer.accelerator": "gpu"}),
    ("trainer.precision=16", {"trainer.precision": 16}),
    ("trainer.precision=bf16-mixed", {"trainer.precision": "bf16-mixed"}),
    ("trainer.max_epochs=9999", {"trainer.max_epochs": 9999}),
    ("trainer.max_steps=4", {"trainer.max_steps": 4}),
    ("trainer.val_check_interval=0.1", {"trainer.val_check_interval": 0.1}),
    ("trainer.log_every_n_steps=1", {"trainer.log_every_n_steps": 1}),
    ("trainer.gradient_clip_val=1.0", {"trainer.gradient_clip_val": 1.0}),
    ("trainer.enable_checkpointing=False", {"trainer.enable_checkpointing": False}),
    ("+trainer.limit_val_batches=2", {"trainer.limit_val_batches": 2}),
    ("++trainer.limit_val_batches=2", {"trainer.limit_val_batches": 2}),
    ("trainer.limit_test_batches=2", {"trainer.limit_test_batches": 2}),
    ("+trainer.detect_anomaly=False", {"trainer.detect_anomaly": False}),
    (
        "exp_manager.exp_dir=/tmp/gpt_finetuning_pp2_megatron",
        {"exp_manager.exp_dir": "/tmp/gpt_finetuning_pp2_megatron"},
    ),
    ("exp_manager.explicit_log_dir=./results", {"exp_manager.explicit_log_dir": "./results"}),
    ("exp_manager.name=chat-8b", {"exp_manager.name": "chat-8b"}),
    ("exp_manager.create_wandb_logger=True", {"exp_manager.create_wandb_logger": True}),
    ("exp_manager.wandb_logger_kwargs.project=sft", {"exp_manager.wandb_logger_kwargs.project": "sft"}),
    ("+exp_manager.wandb_logger_kwargs.entity=us", {"exp_manager.wandb_logger_kwargs.entity": "us"}),
    ("++exp_manager.create_tensorboard_logger=False", {"exp_manager.create_tensorboard_logger": False}),
    ("exp_manager.resume_if_exists=True", {"exp_manager.resume_if_exists": True}),
    ("exp_manager.resume_ignore_no_checkpoint=True", {"exp_manager.resume_ignore_no_checkpoint": True}),
    (
        "exp_manager.checkpoint_callback_params.save_best_model=False",
        {"exp_manager.checkpoint_callback_params.save_best_model": False},
    ),
    ("exp_manager.checkpoint_callback_params.mode=min", {"exp_manager.checkpoint_callback_params.mode": "min"}),
    (
        "exp_manager.checkpoint_callback_params.save_last=False",
        {"exp_manager.checkpoint_callback_params.save_last": False},
    ),
    (
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1000",
        {"exp_manager.checkpoint_callback_params.every_n_train_steps": 1000},
    ),
    (
        "++exp_manager.max_time_per_run=00:03:50:00",
        {"exp_manager.max_time_per_run": "00:03:50:00"},
    ),
    ("name=customer_support", {"name": "customer_support", "exp_manager.name": "customer_support"}),
    ("model.restore_from_path=/home/TestData/llama.nemo", {"model.restore_from_path": "/home/TestData/llama.nemo"}),
    ("model.restore_from_path=/my models/llama.nemo", {"model.restore_from_path": "/my models/llama.nemo"}),
    ("model.restore_from_path='/a=b/~c,d.nemo'", {"model.restore_from_path": "/a=b/~c,d.nemo"}),
    ("model.tensor_model_parallel_size=2", {"model.tensor_model_parallel_size": 2}),
    ("model.pipeline_model_parallel_size=2", {"model.pipeline_model_parallel_size": 2}),
    ("++model.context_parallel_size=2", {"model.context_parallel_size": 2}),
    ("model.sequence_parallel=True", {"model.sequence_parallel": True}),
    ("model.megatron_amp_O2=True", {"model.megatron_amp_O2": True}),
    ("model.global_batch_size=128", {"model.global_batch_size": 128, "model.data.train_ds.global_batch_size": 128}),
    ("model.micro_batch_size=1", {"model.micro_batch_size": 1, "model.data.validation_ds.micro_batch_size": 1}),
    ("model.activations_checkpoint_granularity=selective", {"model.activations_checkpoint_granularity": "selective"}),
    ("model.activations_checkpoint_method=uniform", {"model.activations_checkpoint_method": "uniform"}),
    ("model.answer_only_loss=True", {"model.answer_only_loss": True}),
    ("++model.mcore_gpt=True", {"model.mcore_gpt": True}),
    ("model.transformer_engine=True", {"model.transformer_engine": True}),
    ("+model.fp8=True", {"model.fp8": True}),
    ("+model.fp8_amax_history_len=32", {"model.fp8_amax_history_len": 32}),
    ("+model.ub_tp_comm_overlap=False", {"model.ub_tp_comm_overlap": False}),
    ("+model.tp_comm_overlap_disable_qkv=True", {"model.tp_comm_overlap_disable_qkv": True}),
    ("++model.use_flash_attention=True", {"model.use_flash_attention": True}),
    ("++model.dist_ckpt_load_strictness=log_all", {"model.dist_ckpt_load_strictness": "log_all"}),
    ("model.peft.restore_from_path=null", {"model.peft.restore_from_path": None}),
    ("+model.peft.tied_lora.rank=16", {"model.peft.tied_lora.rank": 16}),
    ("model.peft.lora_tuning.adapter_dim=16", {"model.peft.tied_lora.rank": 16}),
    ("model.peft.lora_tuning.alpha=32", {"model.peft.tied_lora.alpha": 32}),
    ("model.peft.lora_tuning.adapter_dropout=0.1", {"model.peft.tied_lora.dropout": 0.1}),
    ('model.peft.lora_tuning.column_init_method="kaiming"', {"model.peft.tied_lora.init_A": "kaiming"}),
    (
        'model.peft.lora_tuning.target_modules=["attention"]',
        {"model.peft.tied_lora.targets": ["linear_qkv", "linear_proj"]},
    ),
    (
        "++model.peft.lora_tuning.target_modules=['all']",
        {"model.peft.tied_lora.targets": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]},
    ),
    ("model.peft.lora_tuning.layer_selection=[1,12]", {"model.peft.tied_lora.layers": [0, 11]}),
    ("model.data.train_ds.file_names=[/data/squad.jsonl]", {"model.data.train_ds.file_names": ["/data/squad.jsonl"]}),
    ("model.data.train_ds.file_names=[a.jsonl,b.jsonl]", {"model.data.train_ds.file_names": ["a.jsonl", "b.jsonl"]}),
    ("model.data.train_ds.file_names=['/a=b/c.jsonl']", {"model.data.train_ds.file_names": ["/a=b/c.jsonl"]}),
    ("model.data.validation_ds.file_names=[v.jsonl]", {"model.data.validation_ds.file_names": ["v.jsonl"]}),
    ("model.data.validation_ds.names=[quarel,trec]", {"model.data.validation_ds.names": ["quarel", "trec"]}),
    ("model.data.validation_ds.metric.name=loss", {"model.data.validation_ds.metric.name": "loss"}),
    ("model.data.test_ds.tokens_to_generate=30", {"model.data.test_ds.tokens_to_generate": 30}),
    (
        "model.data.train_ds.concat_sampling_probabilities=[0.3,0.7]",
        {"model.data.train_ds.concat_sampling_probabilities": [0.3, 0.7]},
    ),
    ("model.data.train_ds.num_workers=0", {"model.data.train_ds.num_workers": 0}),
    ("model.data.train_ds.max_seq_length=4096", {"model.data.validation_ds.max_seq_length": 4096}),
    (
        "model.data.train_ds.prompt_template='{input} {output}'",
        {"model.data.train_ds.prompt_template": "{input} {output}"},
    ),
    (
        r"model.data.train_ds.prompt_template=\{input\} \{output\}",
        {"model.data.train_ds.prompt_template": "{input} {output}"},
    ),
    ('model.data.train_ds.truncation_field="input,output"', {"model.data.train_ds.truncation_field": "input,output"}),
    ("++model.data.train_ds.packed_sequence=True", {"model.data.train_ds.packed_sequence": True}),
    ("model.data.chat=True", {"model.data.chat": True}),
    ("model.optim.lr=2e-4", {"model.optim.lr": 2e-4}),
    ("model.optim.name=fused_adam", {"model.optim.name": "fused_adam"}),
    ("model.optim.betas=[0.9,0.98]", {"model.optim.betas": [0.9, 0.98]}),
    ("++model.optim.bucket_cap_mb=400", {"model.optim.bucket_cap_mb": 400}),
    ("model.optim.sched.name=CosineAnnealing", {"model.optim.sched.name": "CosineAnnealing"}),
    ("++model.optim.sched.warmup_steps=10", {"model.optim.sched.warmup_steps": 10}),
    ("model.optim.sched.min_lr=9e-6", {"model.optim.sched.min_lr": 9e-6}),
    (
        "~model.optim.sched",
        {"model.optim": _WITHOUT_SCHEDULE},
    ),
    (
        "model.optim.sched=null",
        {"model.optim": _WITHOUT_SCHEDULE},
    ),
    ("hydra.run.dir=.", {}),
    ("++model.my_own_key=3", {"model.my_own_key": 3}),
]

# Accepted: what is said about them.
EXPLAINED = [
    ("model.peft.lora_tuning.adapter_dim=16", "model.peft.tied_lora.rank=16"),
    ("model.peft.lora_tuning.weight_tying=True", "tied already"),
    ("+model.peft.lora_tuning.a2a_experimental=1", "no effect"),
    ("model.fsdp_sharding_strategy=hybrid", "FSDP would shard what all layers share"),
    ("model.fsdp_grad_reduce_dtype=bf16", "model.fsdp"),
    ("+cluster_type=BCP", "torchrun or SLURM"),
    ("model.data.train_ds.separate_prompt_and_response_with_newline=False", "prompt_template"),
    ("model.peft.restore_from_ckpt_name=null", "resumes by itself"),
    ("inference.greedy=True", "tied-lora generate"),
    ("hydra.run.dir=.", "exp_manager.explicit_log_dir"),
    ("hydra/job_logging=none", "no effect"),
]

REFUSED = [
    ("model.optim.lr = 1e-4", ['has blanks around =; write "model.optim.lr=1e-4"']),
    ("optim.learning_rate=1e-4", ["write model.optim.lr"]),
    ("model.optim.learning_rate=1e-4", ["write model.optim.lr"]),
    ("+model.optim.learning_rate=1e-4", ["write model.optim.lr"]),
    ("model.optim.warmup_steps=50", ["model.optim.sched.warmup_steps"]),
    ("model.peft.adapter_tuning.adapter_dim=64", ["peft_scheme=adapter", "model.peft.tied_lora.rank"]),
    ("model.peft.p_tuning.virtual_tokens=10", ["peft_scheme=ptuning"]),
    ("++model.peft.ia3_tuning.layer_selection=[1]", ["peft_scheme=ia3"]),
    ("model.peft.lora_tuning.dropout=0.05", ["adapter_dropout"]),
    ("model.peft.lora_tuning.variant=canonical", ["only nemo"]),
    ("model.peft.lora_tuning.target_modules=[q_proj,v_proj]", ["NeMo's name is attention_qkv"]),
    ("model.peft.lora_tuning.layer_selection=[0,1]", ["counted from 1"]),
    ("model.peft.lora_tuning.loraplus_lr_ratio=16", ["NeMo does not read it"]),
    ("trainer.gpus=8", ["trainer.devices"]),
    ("trainer.devices=-1", ["number of ranks", "layout=tp8"]),
    ("trainer.devices=auto", ["number of ranks"]),
    ("trainer.strategy=ddp", ["NeMo chooses it"]),
    ("trainer.strategy.find_unused_parameters=false", ["NeMo chooses it"]),
    ("++trainer.sft.max_epochs=1", ["Lightning's Trainer has no such key"]),
    ("pretrained_checkpoint.restore_from_path=a.nemo", ["model.restore_from_path"]),
    ("+trainer.plugins=[]", ["NeMo chooses it"]),
    ("trainer.use_distributed_sampler=true", ["must stay false"]),
    ("trainer.replace_sampler_ddp=False", ["trainer.use_distributed_sampler"]),
    ("+trainer.max_step=5", ["Lightning's Trainer has no such key", "trainer.max_steps"]),
    ("++exp_manager.create_wandb_loger=true", ["exp_manager has no such key", "create_wandb_logger"]),
    ("exp_manager.checkpoint_callback_params.every_n_steps=5", ["every_n_train_steps"]),
    ("model.data.train_ds.file_path=/data/train.jsonl", ["file_names"]),
    ("model.data.data_prefix=[1.0,/data/text_document]", ["file_names", "is not read"]),
    ("data.train_ds.file_names=[a.jsonl]", ["model.data.train_ds.file_names"]),
    ("train_ds.max_seq_length=5", ["model.data.train_ds.max_seq_length"]),
    ("model.data.train_ds.max_seq_lenght=5", ["did you mean model.data.train_ds.max_seq_length"]),
    ("model.tensor_model_paralell_size=2", ["did you mean model.tensor_model_parallel_size"]),
    ("model.tp_size=2", ["model.tensor_model_parallel_size"]),
    ("base=llama.nemo", ["model.restore_from_path"]),
    ("trainer=5", ["trainer is a section"]),
    ("model.data=null", ["is a section"]),
    ("exp_manager.checkpoint_callback_params=null", ["is a section"]),
    ("+model.seed.x=2", ["model.seed is a value"]),
    ("=5", ["has no key"]),
    ("model.peft.lora_tuning=5", ["must be a section"]),
    ("overrides=[a=1]", ["overrides=['a=1']"]),
    ("~model.data.test_ds", ["cannot be deleted", "=null"]),
    ("~trainer.max_epochs", ["cannot be deleted"]),
    ("~model.no_such_key", ["has no key"]),
    ("model.restore_from_path", ["key=value"]),
    ("conf/mine.yaml", ["--config-path=conf --config-name=mine"]),
    ("trainer.devices=2 trainer.num_nodes=2", ["several overrides in one word"]),
    ("trainer.max_steps=5,10", ["a sweep", "tied-lora launch"]),
    ("model.restore_from_path=/a,b.nemo", ["a sweep", "model.restore_from_path='/a,b.nemo'"]),
    ("model=llama2_7b", ["not a group of tied-lora finetune"]),
    ("layout=tp5", ["choose one of", "tp2pp2"]),
    ("hydra/launcher=submitit_slurm", ["tied-lora launch"]),
    ("hydra.sweeper.n_jobs=4", ["tied-lora launch"]),
    ("hydra.searchpath=[file:///configs]", ["--config-dir"]),
    ("nosuchgroup=mine", ["has no key nosuchgroup"]),
    ("model/peft=lora", ["model/peft"]),
]

# Hydra cannot read them: the quoted form is in the answer, and it works.
QUOTED = [
    ("model.data.train_ds.file_names=[/a=b/c.jsonl]", ["/a=b/c.jsonl"]),
    ("model.data.train_ds.file_names=[/a b/c.jsonl,/x=y.jsonl]", ["/a b/c.jsonl", "/x=y.jsonl"]),
    ("model.data.train_ds.file_names=[/a/~c.jsonl]", ["/a/~c.jsonl"]),
    ("model.data.train_ds.file_names=[/a(1).jsonl]", ["/a(1).jsonl"]),
    ("model.restore_from_path=/runs/lr=1e-4/base.nemo", "/runs/lr=1e-4/base.nemo"),
    ("model.restore_from_path=/a#b.nemo", "/a#b.nemo"),
    ("model.restore_from_path=/modèles/a.nemo", "/modèles/a.nemo"),
    ("model.restore_from_path=it's.nemo", "it's.nemo"),
    ("model.restore_from_path=~/base.nemo", str(Path("~/base.nemo").expanduser())),
    ("model.data.train_ds.prompt_template={input} {output}", "{input} {output}"),
    ("model.data.train_ds.prompt_template=Q: {input} A: {output}", "Q: {input} A: {output}"),
    ("name=a & b", "a & b"),
]

TYPES = [
    ("output=.", "is a folder"),
    (f"output={__file__}/adapter.nemo", "is a file, not a folder"),
    ("model.tokenizer.library=huggingface", "needs model.tokenizer.type too"),
    ("model.tokenizer.model=nosuch.model", "needs model.tokenizer.library too"),
    ("model.tokenizer={library: sentencepiece, model: nosuch.model}", "no such file"),
    ("trainer.max_steps=never", "must be a whole number"),
    ("trainer.max_steps=null", "must be a whole number"),
    ("trainer.val_check_interval=often", "must be a whole number"),
    ("trainer.accumulate_grad_batches=4", "model.global_batch_size"),
    ("name=[a]", "must be a text"),
    ('model.peft.peft_scheme="lora"', "preset=lora"),
    ("model.peft.peft_scheme=ptuning", "leave it out"),
    ("model.peft.peft_scheme=none", "leave it out"),
    ("model.peft.peft_scheme=null", "peft_scheme=null"),
    ("model.optim.name=distributed_fused_adam", "mcore_distributed_optim, or fused_adam"),
    ("model.fsdp=True", "FSDP would shard"),
    ("exp_manager.explicit_log_dir=[a]", "must be a text, or null"),
    ("exp_manager.checkpoint_callback_params.filename=null", "must be a text"),
    ("trainer.log_every_n_steps=[1]", "must be a whole number"),
    ("trainer.gradient_clip_val=high", "must be a number"),
    ("trainer.accelerator=h100", "choose one of auto, gpu, cuda, cpu"),
    ("exp_manager.resume_if_exists=yes", "must be true or false"),
    ("exp_manager.checkpoint_callback_params.mode=best", "choose one of min, max"),
    ("exp_manager.checkpoint_callback_params.save_top_k=all", "must be a whole number"),
    ("model.seed=abc", "must be a whole number"),
    ("model.sequence_parallel=2", "must be true or false"),
    ("model.hidden_dropout=none", "must be a number"),
    ("model.activations_checkpoint_granularity=half", "choose one of full, selective"),
    ("model.optim.lr=small", "must be a number"),
    ("model.optim.lr=true", "must be a number"),
    ("model.optim.betas=0.9", "two numbers"),
    ("model.optim.betas=[0.9]", "two numbers"),
    ("model.optim.lr='1e-4'", "must be a number"),
    ("model.optim.sched.name=cosine", "CosineAnnealing"),
    ("model.optim.sched.warmup_steps=0.1", "must be a whole number"),
    ("model.data.train_ds.truncation_method=middle", "left, right"),
    ("verbose=quiet", "must be true or false"),
]


@pytest.mark.parametrize(("line", "expected"), ACCEPTED, ids=[line for line, _ in ACCEPTED])
def test_a_line_keeps_its_meaning(line: str, expected: dict[str, Any]) -> None:
    cfg = compose_config("finetune", [line])
    values = plain(cfg)
    for key, value in expected.items():
        assert OmegaConf.select(OmegaConf.create(values), key) == value, key


@pytest.mark.parametrize(("line", "told"), EXPLAINED)
def test_a_line_that_changes_nothing_or_has_another_name_says_so(line: str, told: str) -> None:
    _, notes = compose_with_notes("finetune", [line])
    assert len(notes) == 1
    assert told in notes[0]
    assert line.lstrip("+").partition("=")[0].rpartition(".")[0] in notes[0], "the note names the key or its section"


@pytest.mark.parametrize(("line", "parts"), REFUSED)
def test_a_line_without_a_meaning_is_answered_in_one_line(line: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        plain(compose_config("finetune", [line]))
    assert len(refused.value.problems) == 1 + line.count("q_proj")
    assert "\n" not in refused.value.problems[0]
    assert all(
        part in refused.value.problems[0] for part in [*parts, line.lstrip("+~").partition("=")[0].partition(".")[0]]
    )


@pytest.mark.parametrize(("line", "value"), QUOTED)
def test_a_value_that_hydra_cannot_read_is_answered_with_the_quoted_form(line: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_config("finetune", [line])
    (problem,) = refused.value.problems
    (quoted,) = shlex.split(problem.partition("write it in quotes: ")[2])
    assert OmegaConf.select(compose_config("finetune", [quoted]), line.partition("=")[0]) == value


@pytest.mark.parametrize(("line", "told"), TYPES)
def test_a_value_that_cannot_be_is_named_before_the_start(line: str, told: str) -> None:
    def problems(*lines: str) -> set[str]:
        with pytest.raises(ConfigError) as error:  # there is neither a base nor data
            check_finetuning(plain(compose_config("finetune", lines)))
        return set(error.value.problems)

    found = problems(line) - problems()
    assert any(line.partition("=")[0] in problem and told in problem for problem in found), found


def test_an_added_key_that_nothing_reads_is_named_or_answered_with_its_neighbour() -> None:
    for command, line, right in (
        ("finetune", "++model.data.train_ds.max_seq_lenght=512", "model.data.train_ds.max_seq_length"),
        ("pretrain", "+model.optim.sched.warmup_step=5", "model.optim.sched.warmup_steps"),
        ("generate", "+tokens_to_generat=5", "tokens_to_generate"),
    ):
        with pytest.raises(ConfigError, match=f"did you mean {right}"):
            compose_config(command, [line])
    cfg, notes = compose_with_notes("finetune", ["+model.xyzzy=1", "++mine=2", "+trainer.max_time=1", "++name=a"])
    assert (cfg.model.xyzzy, cfg.mine) == (1, 2)
    assert notes == ["passed on as they are, unknown to this command: model.xyzzy, mine"]


def test_keys_that_have_no_effect_for_one_reason_share_a_line() -> None:
    _, notes = compose_with_notes("finetune", ["inference.greedy=true", "inference.top_k=3"])
    assert len(notes) == 1
    assert notes[0].startswith("inference.greedy=True, inference.top_k=3: have no effect here: ")


def test_all_problems_are_reported_together_and_no_note_is_lost() -> None:
    lines = [
        "model.optim.learning_rate=1",
        "trainer.strategy=ddp",
        "layout=tp2",
        "a=[=]",
        "model.data.train_ds.files=x",
    ]
    with pytest.raises(ConfigError) as refused:
        compose_config("finetune", lines)
    assert len(refused.value.problems) == 4


def test_the_keys_of_an_unknown_group_are_not_reported_beside_it() -> None:
    with pytest.raises(ConfigError) as refused:
        compose_config("finetune", ["task=squat", "task.limits.test=5", "trainer.max_step=5"])
    group, key = refused.value.problems
    assert group.startswith("task=squat: unknown; choose one of base, dialogsum")
    assert key.startswith("trainer.max_step=5: ")


@pytest.mark.parametrize("command", ["quickstart", "compare", "plan"])
def test_an_added_key_is_refused_where_nothing_can_read_it(command: str) -> None:
    with pytest.raises(ConfigError, match=f"has no key foo; tied-lora {command} --cfg job lists the keys"):
        compose_config(command, ["+foo=1"])


def test_a_yaml_that_includes_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("defaults: [mine, _self_]\n")
    with pytest.raises(
        ConfigError, match=r"^task=mine: its YAML, or one that it names in its defaults, includes itself"
    ):
        compose_config("finetune", ["task=mine"], YamlSources(config_dir=tmp_path))


def test_nemos_alpha_is_kept_where_it_is_not_divided_by_the_rank() -> None:
    own = ["model.peft.lora_tuning.adapter_dim=8", "model.peft.lora_tuning.alpha=8"]
    rule = ["model.peft.tied_lora.alpha_rule=sqrt"]
    follows, kept = (compose_config("finetune", [*own, *more]).model.peft.tied_lora for more in ([], rule))
    assert (follows.rank, follows.alpha, kept.rank, kept.alpha) == (8, None, 8, 8)


def test_the_same_lines_work_for_pretrain_and_the_adapters_for_plan() -> None:
    cfg, notes = compose_with_notes("pretrain", ["+trainer.limit_val_batches=2", "model.fsdp_sharding_strategy=full"])
    assert (cfg.trainer.limit_val_batches, len(notes)) == (2, 1)
    with pytest.raises(ConfigError, match="without an adapter"):
        compose_config("pretrain", ["model.peft.tied_lora.rank=4"])
    cfg, notes = compose_with_notes("plan", ["model.peft.lora_tuning.adapter_dim=4"])
    assert (cfg.model.peft.tied_lora.rank, len(notes)) == (4, 1)


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("rank=4", "did you mean model.peft.tied_lora.rank?"),
        ("layuot=tp2", "did you mean layout?"),
        ("trainer.max_steps=10", "a key of finetune, which plan does not read; leave it out"),
        ("model.data.train_ds.file_names=[a.jsonl]", "a key of finetune, which plan does not read"),
    ],
)
def test_what_plan_does_not_read_is_answered(word: str, answer: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config("plan", [word])
    assert [problem for problem in caught.value.problems if problem.startswith(word) and answer in problem]
