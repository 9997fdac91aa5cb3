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
from tests.planning.override_lines import ACCEPTED, EXPLAINED, QUOTED, REFUSED, TYPES


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
