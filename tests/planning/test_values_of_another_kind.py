# SPDX-License-Identifier: Apache-2.0
"""Pure Python: a text, a list or null in place of another kind of value is refused, and never ends in another error."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.preflight import check_finetuning
from nemo_tied_lora.planning.settings.flag_checks import flag_problems, section_problems
from tests.harness.base_files import write_base
from tests.harness.run_configs import changed

TRAIN, VALIDATION = "model.data.train_ds", "model.data.validation_ds"


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return plain(compose_config("finetune", [f"{TRAIN}.file_names=[a.jsonl]", f"{VALIDATION}.file_names=[b.jsonl]"]))


def test_a_text_in_place_of_true_or_false_is_refused(composed: dict[str, Any]) -> None:
    assert flag_problems("finetune", composed) == []
    values = {f"{TRAIN}.drop_last": "no", "model__answer_only_loss": "off", "exp_manager__resume_if_exists": "false"}
    assert flag_problems("finetune", changed(composed, **values)) == [
        "exp_manager.resume_if_exists='false': must be true or false",
        "model.answer_only_loss='off': must be true or false",
        f"{TRAIN}.drop_last='no': must be true or false",
    ]
    assert flag_problems("finetune", changed(composed, **{f"{TRAIN}.shuffle": None, "verbose": 0})) == []
    for command in ("pretrain", "generate"):
        assert flag_problems(command, plain(compose_config(command, []))) == []


def test_a_value_in_place_of_a_section_is_refused(composed: dict[str, Any]) -> None:
    assert section_problems("finetune", composed) == []
    values = {"trainer": None, "watchdog": "on", f"{VALIDATION}.metric": "loss", "exp_manager": [1]}
    assert set(section_problems("finetune", changed(composed, **values))) == {
        "watchdog='on': must be a section of keys",
        "trainer=None: must be a section of keys",
        "exp_manager=[1]: must be a section of keys",
        f"{VALIDATION}.metric='loss': must be a section of keys",
    }
    assert section_problems("finetune", changed(composed, guards=None, **{"model.peft.tied_lora": None})) == []


def keys_of(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


@pytest.mark.parametrize("value", [None, "abc", [1]], ids=["null", "text", "list"])
def test_no_value_of_any_key_ends_the_check_in_another_error_than_a_refusal(tmp_path: Path, value: Any) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    words = [f"model.restore_from_path={write_base(tmp_path / 'base.nemo')}", "model.global_batch_size=8"]
    words += [f"{section}.file_names=[{data}]" for section in (TRAIN, VALIDATION)]
    lengths = [f"{TRAIN}.max_seq_length=16", f"{VALIDATION}.tokens_to_generate=4"]
    cfg = plain(compose_config("finetune", [*words, *lengths, f"exp_manager.exp_dir={tmp_path}"]))
    check_finetuning(cfg)
    refused = 0
    for key in keys_of(cfg):
        with suppress(ConfigError):
            check_finetuning(changed(cfg, **{key: copy.deepcopy(value)}))
            continue
        refused += 1
    assert refused > 30
