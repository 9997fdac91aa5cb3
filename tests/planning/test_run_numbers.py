# SPDX-License-Identifier: Apache-2.0
"""Pure Python: numbers of a run that contradict each other are given a meaning, or refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.config_folder import config_folder
from nemo_tied_lora.planning.settings.monitor_checks import monitor_problems
from nemo_tied_lora.planning.settings.number_checks import (
    generation_lines,
    generation_number_problems,
    number_lines,
    number_problems,
)
from nemo_tied_lora.planning.settings.resumed_step import resumed_step_problems
from nemo_tied_lora.planning.settings.run_length import REMOVED, adjusted_run, as_whole_number
from nemo_tied_lora.planning.settings.schedule_checks import run_lines, run_problems
from tests.harness.run_configs import changed

SCHED, PARAMS = "model.optim.sched", "exp_manager.checkpoint_callback_params"
STOPPING, TRAIN, VALIDATION = (
    "exp_manager.early_stopping_callback_params",
    "model.data.train_ds",
    "model.data.validation_ds",
)
RECOMPUTE = "model.activations_checkpoint"


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return plain(compose_config("finetune", [f"{TRAIN}.file_names=[a.jsonl]", f"{VALIDATION}.file_names=[b.jsonl]"]))


def problems(cfg: dict[str, Any]) -> list[str]:
    return [*run_problems(cfg), *number_problems(cfg), *monitor_problems(cfg), *resumed_step_problems(cfg)]


def lines(cfg: dict[str, Any]) -> list[str]:
    return [*run_lines(cfg), *number_lines(cfg)]


@pytest.mark.parametrize("recipe", [None, "quickstart_smollm2", "quickstart", "quickstart_base", "llama2"])
def test_every_shipped_recipe_passes_without_a_word(recipe: str | None) -> None:
    assert (config_folder() / "recipe" / f"{recipe or 'llama2'}.yaml").is_file()
    command = "pretrain" if recipe == "quickstart_base" else "finetune"
    words = [] if recipe is None else [f"recipe={recipe}"]
    cfg = plain(
        compose_config(command, [*words, f"{TRAIN}.file_names=[a.jsonl]", f"{VALIDATION}.file_names=[b.jsonl]"])
    )
    assert problems(cfg) == []
    assert lines(cfg) == []
    assert adjusted_run(cfg).values == {}


def test_ten_steps_with_all_else_as_it_is_validate_once_at_the_end(composed: dict[str, Any]) -> None:
    cfg = changed(composed, trainer__max_steps=10)
    assert problems(cfg) == []
    assert adjusted_run(cfg).values == {"trainer.val_check_interval": 10}
    assert lines(cfg) == [
        "trainer.val_check_interval=200: more than trainer.max_steps=10; validates once, after the last step",
        f"{SCHED}.warmup_steps=50: not less than trainer.max_steps=10; the learning rate only reaches 1.96e-05 of "
        "model.optim.lr=0.0001",
    ]


@pytest.mark.parametrize(
    ("value", "steps", "used"),
    [
        (200, 200, None),  # Lightning's epoch has 201 steps then
        (199, 200, None),
        (201, 200, 200),
        (1, 200, None),
        (1.0, 1000, 1000),  # as a share of Lightning's 1005 steps, it would never come
        (0.25, 1000, 250),
        (0.0001, 1000, 1),
        (200.0, 1000, 200),
        ("200", 1000, 200),
        (None, 1000, 1000),
        (1e9, 1000, 1000),
    ],
)
def test_a_run_validates_at_least_once(composed: dict[str, Any], value: Any, steps: int, used: int | None) -> None:
    cfg = changed(composed, trainer__max_steps=steps, trainer__val_check_interval=value)
    assert problems(cfg) == []
    assert adjusted_run(cfg).values.get("trainer.val_check_interval") == used


def test_whole_numbers_are_recognized_as_people_write_them(composed: dict[str, Any]) -> None:
    assert [as_whole_number(value) for value in (10, 1e3, "20", "-1")] == [10, 1000, 20, -1]
    assert [as_whole_number(v) for v in (True, None, 1.5, "x", "1.5", [1], float("nan"), float("inf"))] == [None] * 8
    assert adjusted_run(changed(composed, trainer__max_steps=1e3)).values == {"trainer.max_steps": 1000}
    warm = changed(composed, **{f"{SCHED}.warmup_steps": 1e2, f"{SCHED}.constant_steps": "20"})
    assert adjusted_run(warm).values == {f"{SCHED}.warmup_steps": 100, f"{SCHED}.constant_steps": 20}
    assert problems(warm) == []


def test_validations_counted_over_all_epochs_do_not_meet_a_number_of_epochs(composed: dict[str, Any]) -> None:
    cfg = changed(composed, trainer__check_val_every_n_epoch=None)
    assert problems(cfg) == []
    assert adjusted_run(cfg).values == {"trainer.max_epochs": -1}


def test_checkpoints_that_would_come_after_the_end_are_saved_at_the_end(composed: dict[str, Any]) -> None:
    cfg = changed(composed, **{f"{PARAMS}.every_n_epochs": 3})
    assert adjusted_run(cfg).values == {f"{PARAMS}.every_n_epochs": 1}
    assert lines(cfg) == [f"{PARAMS}.every_n_epochs=3: more than the run's epochs, 1; saves after every validation"]
    three_epochs = changed(cfg, trainer__max_steps=300, trainer__limit_train_batches=100)
    assert f"{PARAMS}.every_n_epochs" not in adjusted_run(three_epochs).values
    late = changed(composed, **{f"{PARAMS}.every_n_train_steps": 30000})
    assert lines(late) == [
        f"{PARAMS}.every_n_train_steps=30000: more than trainer.max_steps=20000; saves once, at the end"
    ]


def test_a_run_without_validation_says_so_and_nothing_more(composed: dict[str, Any]) -> None:
    cfg = changed(composed, trainer__max_steps=100, trainer__limit_val_batches=0.0)
    assert adjusted_run(cfg).values == {
        "trainer.val_check_interval": 100,  # else Lightning fails even so
        f"{PARAMS}.every_n_epochs": None,
        f"{PARAMS}.every_n_train_steps": 100,
    }
    said = (
        "trainer.limit_val_batches=0: no validation; the last checkpoint is written every 100 steps, no best one, and no "
        "early stopping"
    )
    assert lines(cfg) == [said]
    assert problems(cfg) == []
    without = lines(changed(cfg, exp_manager__create_early_stopping_callback=False))
    assert without == [said.replace("no best one, and no early stopping", "and no best one")]
    own = changed(cfg, **{f"{PARAMS}.every_n_train_steps": 50})
    assert adjusted_run(own).values == {"trainer.val_check_interval": 100, f"{PARAMS}.every_n_epochs": None}
    none = changed(cfg, exp_manager__create_checkpoint_callback=False)
    assert adjusted_run(none).values == {"trainer.val_check_interval": 100}


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({"trainer__max_steps": value}, f"trainer.max_steps={shown}: must be a whole number of at least 1")
        for value, shown in ((-1, "-1"), (0, "0"), (None, "null"), (1.5, "1.5"), ("ten", "'ten'"), (True, "true"))
    ),
    ({"trainer__max_epochs": 0}, "trainer.max_epochs=0: must be a whole number of at least 1; -1 or null: no limit"),
    ({"trainer__min_steps": 30000}, "trainer.min_steps=30000: more than trainer.max_steps=20000"),
    ({"trainer__max_time": "4h"}, "trainer.max_time='4h': must be days:hours:minutes:seconds"),
    ({"trainer__max_time": "00:00:00:00"}, "more than 0"),
    ({"trainer__max_time": 14400}, "trainer.max_time=14400: must be days:hours:minutes:seconds"),  # 4:00:00 in a YAML
    ({"exp_manager__max_time_per_run": "00:10"}, "exp_manager.max_time_per_run='00:10': must be days:hours"),
    (
        {f"{PARAMS}.train_time_interval": {"minutes": 30}},
        "cannot take it from a configuration; set every_n_train_steps",
    ),
    ({"trainer__val_check_interval": 0}, "to validate never, set trainer.limit_val_batches=0"),
    ({"trainer__val_check_interval": -1}, "trainer.val_check_interval=-1: must be a whole number"),
    ({"trainer__val_check_interval": 2.5}, "trainer.val_check_interval=2.5: must be a whole number"),
    ({"trainer__check_val_every_n_epoch": 2}, "the run has fewer epochs, so it would never validate"),
    ({"trainer__check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch=0: must be a whole number"),
    ({"trainer__limit_val_batches": -1}, "trainer.limit_val_batches=-1: must be a share"),
    ({"trainer__limit_val_batches": 2.5}, "trainer.limit_val_batches=2.5: must be a share"),
    ({"trainer__limit_train_batches": 0}, "trainer.limit_train_batches=0: leaves no batch to train on"),
    ({"trainer__limit_train_batches": 50}, "trainer.val_check_interval=200: more than the 50 steps of an epoch"),
    ({"trainer__accumulate_grad_batches": 4}, "must be 1, because NeMo accumulates itself"),
    ({"trainer__gradient_clip_val": -1}, "trainer.gradient_clip_val=-1: must be a number of at least 0"),
    ({"trainer__log_every_n_steps": -1}, "trainer.log_every_n_steps=-1: must be a whole number of at least 0"),
    ({"trainer__fast_dev_run": True}, "trainer.fast_dev_run=true: not possible"),
    ({"model__optim__lr": 0}, "model.optim.lr=0: the run would train nothing"),
    ({"model__optim__lr": -1e-4}, "model.optim.lr=-0.0001: must be greater than 0"),
    ({"model__optim__lr": "fast"}, "model.optim.lr='fast': must be a number"),
    ({"model__optim__lr": float("nan")}, "model.optim.lr=nan: must be a number"),
    ({"model__optim__weight_decay": -0.1}, "model.optim.weight_decay=-0.1: must be a number of at least 0"),
    ({"model__optim__betas": [0.9, 1.0]}, "model.optim.betas=[0.9, 1.0]: must be two numbers"),
    ({"model__optim__betas": [0.9]}, "model.optim.betas=[0.9]: must be two numbers"),
    ({"model__optim__sched": None}, f"write ~{SCHED} for a constant learning rate"),
    ({f"{SCHED}.name": "Cosine"}, f"{SCHED}.name=Cosine: unknown; choose one of CosineAnnealing"),
    ({f"{SCHED}.name": "ExponentialLR"}, "after each epoch, but the run is one epoch"),
    ({f"{SCHED}.name": "T5InverseSquareRootAnnealing"}, f"has no such key; write ~{SCHED}.warmup_steps"),
    ({f"{SCHED}.hold_steps": 5}, f"{SCHED}.hold_steps=5: CosineAnnealing has no such key"),
    ({f"{SCHED}.min_lr": 1e-3}, f"{SCHED}.min_lr=0.001: more than model.optim.lr=0.0001"),
    ({f"{SCHED}.min_lr": 1e-4, f"{SCHED}.constant_steps": 9}, "must be less than model.optim.lr=0.0001"),
    ({f"{SCHED}.min_lr": -1}, f"{SCHED}.min_lr=-1: must be a number of at least 0"),
    ({f"{SCHED}.warmup_steps": -1}, f"{SCHED}.warmup_steps=-1: must be a whole number of at least 0"),
    ({f"{SCHED}.warmup_ratio": 0.1}, f"warmup_steps=50 is set too; add {SCHED}.warmup_steps=null"),
    ({f"{SCHED}.warmup_ratio": 2, f"{SCHED}.warmup_steps": None}, f"{SCHED}.warmup_ratio=2: must be a number from 0"),
    ({f"{SCHED}.constant_ratio": 0.1}, f"constant_steps=0 is set too; add {SCHED}.constant_steps=null"),
    ({f"{SCHED}.constant_steps": 25, "trainer__max_steps": 60}, "warmup_steps=50 and constant_steps=25 leave no step"),
    (
        {f"{SCHED}.constant_steps": 9, f"{SCHED}.warmup_steps": 0, "trainer__max_steps": 9},
        "leave no step of max_steps=9",
    ),
    ({f"{SCHED}.max_steps": -1}, f"{SCHED}.max_steps=-1: must be a whole number"),
    ({f"{PARAMS}.monitor": "val_acc"}, f"{PARAMS}.monitor=val_acc: this run logs no such number"),
    ({f"{PARAMS}.mode": "best"}, f"{PARAMS}.mode=best: unknown; choose one of min, max"),
    ({f"{PARAMS}.save_top_k": -2}, f"{PARAMS}.save_top_k=-2: must be a whole number of at least -1"),
    ({f"{PARAMS}.every_n_train_steps": 5, f"{PARAMS}.every_n_epochs": 1}, "Lightning takes only one of them"),
    ({f"{STOPPING}.monitor": "accuracy"}, f"{STOPPING}.monitor=accuracy: this run logs no such number"),
    ({f"{STOPPING}.patience": 0}, f"{STOPPING}.patience=0: must be a whole number of at least 1"),
    ({f"{STOPPING}.min_delta": -1}, f"{STOPPING}.min_delta=-1: must be a number of at least 0"),
    ({f"{TRAIN}.concat_sampling_probabilities": [-1.0]}, "=[-1.0]: must be numbers of at least 0"),
    ({f"{TRAIN}.concat_sampling_probabilities": ["half"]}, "must be numbers of at least 0"),
    ({f"{TRAIN}.concat_sampling_probabilities": [1.0, 0]}, "file 2 would never be read; remove it from file_names"),
    ({f"{TRAIN}.min_seq_length": 4096}, f"{TRAIN}.min_seq_length=4096: more than max_seq_length=2048"),
    ({f"{TRAIN}.num_workers": -1}, f"{TRAIN}.num_workers=-1: must be a whole number of at least 0"),
    (
        {f"{TRAIN}.truncation_method": "middle"},
        f"{TRAIN}.truncation_method=middle: unknown; choose one of left, right",
    ),
    ({f"{VALIDATION}.tokens_to_generate": 2048}, "leaves nothing of max_seq_length=2048 for the prompt"),
    ({f"{VALIDATION}.metric.name": "bleurt"}, f"{VALIDATION}.metric.name=bleurt: unknown"),
    ({f"{VALIDATION}.metric": {}}, f"{VALIDATION}.metric.name=None: unknown"),
    (
        {f"{VALIDATION}.names": ["a", "b"]},
        f"{VALIDATION}.names=['a', 'b']: must hold one name for each of the 1 files",
    ),
    (
        {f"{VALIDATION}.tokens_to_generate": 0},
        f"{VALIDATION}.tokens_to_generate=0: must be a whole number of at least 1",
    ),
    ({"model__megatron_amp_O2": True, "trainer__precision": 32}, "not possible with trainer.precision=32"),
    ({"model__seed": 0}, "model.seed=0: must be a whole number from 1 to 4294967295"),
    ({"model__seed": -3}, "model.seed=-3: must be a whole number from 1"),
    ({"model__hidden_dropout": 1.5}, "model.hidden_dropout=1.5: must be a number of at least 0 and below 1"),
    ({f"{RECOMPUTE}_granularity": "some"}, f"{RECOMPUTE}_granularity=some: unknown"),
    ({f"{RECOMPUTE}_granularity": "full"}, f"{RECOMPUTE}_method=null: granularity=full needs uniform or block"),
    (
        {f"{RECOMPUTE}_granularity": "selective", f"{RECOMPUTE}_num_layers": 1},
        "must be null with granularity=selective",
    ),
    ({"preemption__exit_code": 2}, "preemption.exit_code=2: has another meaning"),
    ({"model__resume_from_checkpoint": "nowhere"}, "model.resume_from_checkpoint=nowhere: no such checkpoint"),
    ({"model__resume_from_checkpoint": "/"}, "model.resume_from_checkpoint=/: is not a checkpoint"),
    ({"exp_manager__resume_ignore_no_checkpoint": False}, "the run has no checkpoint yet; set it to true"),
    ({f"{VALIDATION}.metric.name": "f1"}, "metric.name=f1: NeMo cannot build it with the installed torchmetrics"),
    (
        {"trainer__check_val_every_n_epoch": None, "trainer__limit_train_batches": 50, "trainer__max_epochs": 3},
        "set max_epochs=-1 and trainer.max_steps=150",
    ),
]


@pytest.mark.parametrize(("values", "expected"), REFUSED, ids=[expected[:60] for _, expected in REFUSED])
def test_what_has_no_meaning_is_refused(composed: dict[str, Any], values: dict[str, Any], expected: str) -> None:
    found = problems(changed(composed, **values))
    assert any(expected in problem for problem in found), found
    assert all("\n" not in problem for problem in found)


ALLOWED: list[tuple[dict[str, Any], list[str]]] = [
    ({"trainer__max_epochs": -1}, []),
    ({"trainer__max_epochs": None}, []),
    ({"trainer__max_epochs": 3}, ["trainer.max_epochs=3: has no effect"]),
    ({"trainer__check_val_every_n_epoch": None}, []),
    ({"trainer__limit_val_batches": 1}, []),
    ({"trainer__limit_train_batches": 500}, []),
    (
        {"trainer__limit_train_batches": 500, "trainer__max_epochs": 2},
        ["the run ends after 1000 of trainer.max_steps=20000"],
    ),
    ({"trainer__gradient_clip_val": 0}, []),
    ({"trainer__gradient_clip_val": None}, []),
    ({"trainer__max_time": "00:04:00:00"}, []),
    ({"trainer__log_every_n_steps": 30000}, ["more than trainer.max_steps=20000; logs once, at the last step"]),
    ({f"{SCHED}.warmup_ratio": 0.1, f"{SCHED}.warmup_steps": None}, []),
    ({f"{SCHED}.constant_steps": 100}, ["NeMo's warmup then starts at 0, so step 1 changes nothing"]),
    ({f"{SCHED}.constant_steps": 100, f"{SCHED}.warmup_steps": 0}, []),
    ({f"{SCHED}.constant_steps": 19950}, ["step 1 changes nothing", "nothing is left to decay"]),
    ({f"{SCHED}.warmup_steps": 20000}, ["warmup_steps=20000: not less than trainer.max_steps=20000"]),
    ({f"{SCHED}.max_steps": 100}, ["less than trainer.max_steps=20000; the other steps have min_lr=0"]),
    (
        {f"{SCHED}.name": "PolynomialHoldDecayAnnealing", f"{SCHED}.hold_steps": 30000},
        ["the learning rate never falls"],
    ),
    ({f"{SCHED}.min_lr": 1e-4}, []),
    (
        {f"{SCHED}.name": "T5InverseSquareRootAnnealing", f"{SCHED}.warmup_steps": 0, f"{SCHED}.constant_steps": 10},
        ["does not read model.optim.lr=0.0001"],
    ),
    ({f"{PARAMS}.monitor": "validation_exact_string_match", f"{PARAMS}.mode": "max"}, []),
    ({f"{PARAMS}.monitor": "validation_loss_dataloader0"}, []),
    ({f"{PARAMS}.mode": "max"}, ["mode=max: taken as min, because validation_loss is better when it is lower"]),
    (
        {f"{PARAMS}.monitor": "validation_exact_string_match"},
        ["mode=min: taken as max, because validation_exact_string_match is better when it is higher"],
    ),
    ({f"{STOPPING}.mode": "max"}, [f"{STOPPING}.mode=max: taken as min, because val_loss"]),
    ({f"{PARAMS}.monitor": "lr", f"{PARAMS}.mode": "max"}, []),
    ({f"{PARAMS}.monitor": "reduced_train_loss"}, []),
    ({f"{PARAMS}.save_top_k": -1}, []),
    ({f"{PARAMS}.every_n_train_steps": 50}, []),
    ({f"{TRAIN}.min_seq_length": 16}, [f"{TRAIN}.min_seq_length=16: has no effect"]),
    ({f"{VALIDATION}.write_predictions_to_file": True}, ["get names that begin with None_"]),
    ({"exp_manager__create_checkpoint_callback": False, f"{PARAMS}.monitor": "nothing"}, []),
    ({f"{TRAIN}.concat_sampling_probabilities": [3]}, ["the sum is 3, not 1; taken as shares: a.jsonl 100.0%"]),
    ({f"{VALIDATION}.tokens_to_generate": 4096, f"{VALIDATION}.metric.name": "loss"}, []),
    ({f"{RECOMPUTE}_granularity": "selective"}, []),
    ({"watchdog__stuck_s": 60}, ["watchdog.stuck_s=60: less than watchdog.timeout_s=120"]),
]


@pytest.mark.parametrize(("values", "expected"), ALLOWED)
def test_what_has_a_meaning_works_and_says_so(
    composed: dict[str, Any], values: dict[str, Any], expected: list[str]
) -> None:
    cfg = changed(composed, **values)
    assert problems(cfg) == []
    said = lines(cfg)
    assert len(said) == len(expected)
    assert all(part in line for part, line in zip(expected, said, strict=True)), said


def test_keys_that_another_optimizer_or_schedule_does_not_have_are_left_out(composed: dict[str, Any]) -> None:
    cfg = changed(composed, **{"model.optim.name": "sgd", f"{SCHED}.name": "WarmupAnnealing", f"{SCHED}.min_lr": None})
    assert problems(cfg) == []
    assert adjusted_run(cfg).values == dict.fromkeys(
        ("model.optim.betas", f"{SCHED}.constant_steps", f"{SCHED}.min_lr"), REMOVED
    )


def test_an_evaluation_set_that_is_dropped_whole_is_refused(composed: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text("{}\n\n{}\n{}\n")
    values = {f"{VALIDATION}.file_names": [str(file)], f"{VALIDATION}.drop_last": True}
    for size, refused in ((4, True), (3, False)):
        found = problems(changed(composed, **values, **{f"{VALIDATION}.global_batch_size": size}))
        assert any("has fewer lines than global_batch_size=4, so all are dropped" in p for p in found) is refused


def test_a_share_of_less_than_one_batch_of_an_evaluation_set_is_refused(
    composed: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text("{}\n" * 7)
    values = {f"{VALIDATION}.file_names": [str(file)], f"{VALIDATION}.global_batch_size": 4}
    for share, refused in ((0.4, True), (0.5, False), (1.0, False)):
        found = problems(changed(composed, **values, trainer__limit_val_batches=share))
        text = f"trainer.limit_val_batches={share}: is less than one of the 2 batches of {file}; use at least 0.5"
        assert found == ([text] if refused else [])


@pytest.mark.parametrize("form", ["ours", "NeMo's"])
def test_a_run_that_ends_before_its_checkpoint_is_refused(composed: dict[str, Any], tmp_path: Path, form: str) -> None:
    checkpoint = (
        tmp_path / "checkpoints" / ("a-last" if form == "ours" else "a--step=6-consumed_samples=24.0-last.ckpt")
    )
    checkpoint.mkdir(parents=True)
    if form == "ours":
        (checkpoint / "checkpoint.json").write_text(json.dumps({"step": 6}))
    else:
        (checkpoint / "metadata.json").write_text("{}")
    (tmp_path / "checkpoints" / ".b-last.partial").mkdir()
    values = {"exp_manager__explicit_log_dir": str(tmp_path)}
    for steps, refused in ((5, True), (6, False), (7, False)):
        found = list(resumed_step_problems(changed(composed, **values, trainer__max_steps=steps)))
        assert (found != []) is refused
        assert not refused or f"{checkpoint} has trained 6 steps already" in found[0]
    fresh = changed(composed, **values, trainer__max_steps=5, exp_manager__resume_if_exists=False)
    assert list(resumed_step_problems(fresh)) == []
    given = changed(composed, trainer__max_steps=5, model__resume_from_checkpoint=str(checkpoint))
    assert len(list(resumed_step_problems(given))) == 1


def test_numbers_of_generation_are_checked() -> None:
    cfg, base = plain(compose_config("generate", [])), {"max_position_embeddings": 256}
    assert list(generation_number_problems(cfg, base)) == []
    assert list(generation_number_problems({**cfg, "top_k": -1, "top_p": 1.5, "tokens_to_generate": 256}, base)) == [
        "top_k=-1: must be a whole number of at least 0; 0: all tokens",
        "top_p=1.5: must be a number from 0 to 1; 0 or 1: all tokens",
        "tokens_to_generate=256: the base has 256 positions, for prompt and answer together; use fewer",
    ]
    wrong = {"repetition_penalty": 0, "min_tokens_to_generate": 9, "tokens_to_generate": 4}
    assert list(generation_number_problems({**cfg, **wrong, "model": {"context_parallel_size": 2}}, base)) == [
        "repetition_penalty=0: must be a number above 0; 1: none",
        "min_tokens_to_generate=9: more than tokens_to_generate=4; lower it",
        "model.context_parallel_size=2: each prompt is read on one rank; set it to 1",
    ]
    sampled = {**cfg, "top_k": 40, "repetition_penalty": 1.2}
    assert generation_lines({**sampled, "temperature": 0.7}) == []
    assert [line.split("=")[0] for line in generation_lines(sampled)] == ["top_k", "repetition_penalty"]
    assert generation_lines({**cfg, "top_k": 40}) == [
        "top_k=40: has no effect, because temperature=null always takes the likeliest token"
    ]


def test_exp_managers_own_logger_and_checkpoints_replace_the_trainers(composed: dict[str, Any]) -> None:
    cfg = changed(composed, trainer__logger=True, trainer__enable_checkpointing=True)
    assert adjusted_run(cfg).values == {"trainer.logger": False, "trainer.enable_checkpointing": False}
    assert [line.partition(":")[0] for line in lines(cfg)] == [
        "trainer.logger=true",
        "trainer.enable_checkpointing=true",
    ]
    off = {f"exp_manager.create_{name}": False for name in ("tensorboard_logger", "checkpoint_callback")}
    assert adjusted_run(changed(cfg, **off)).values == {}


def test_the_checkpoint_that_is_kept_is_the_best_one(composed: dict[str, Any]) -> None:
    cfg = changed(composed, **{f"{PARAMS}.monitor": "validation_exact_string_match"})
    assert adjusted_run(cfg).values == {f"{PARAMS}.mode": "max"}
