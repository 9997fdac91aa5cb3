# SPDX-License-Identifier: Apache-2.0
"""NeMo's keys of generation, typed or in a YAML: what they set, and how those without a meaning are answered. Pure Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, compose_with_notes, plain
from tests.harness.nemo_yamls import GENERATION
from tests.harness.user_yaml import composed, refused, write


def test_nemos_file_for_generation_becomes_this_commands_keys(tmp_path: Path) -> None:
    lines = ["model.restore_from_path=base.nemo", "model.peft.restore_from_path=a.nemo", "trainer.precision=32"]
    lines += ["model.data.test_ds.file_names=[test.jsonl]", "model.data.test_ds.names=[test]"]
    values, notes = composed(write(tmp_path, GENERATION), *lines, command="generate")
    shipped = plain(compose_config("generate", []))
    ours = {"base": "base.nemo", "adapter": "a.nemo", "prompts_file": "test.jsonl", "batch_size": 1}
    assert values == {**shipped, **ours, "trainer": {**shipped["trainer"], "precision": 32}}
    assert any("base=base.nemo, adapter=a.nemo" in note for note in notes)


def test_typed_prompts_win_over_those_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, {"gpt_model_file": "b.nemo", "prompts": ["a"], "inference": {"add_BOS": True}})
    values, notes = composed(file, command="generate")
    assert (values["base"], values["prompts"], values["prompts_file"]) == ("b.nemo", ["a"], None)
    assert any("add_BOS" in note for note in notes)
    values, _ = composed(file, "prompts_file=t.jsonl", "base=c.nemo", command="generate")
    assert (values["base"], values["prompts"], values["prompts_file"]) == ("c.nemo", None, "t.jsonl")
    file = write(tmp_path, {"model": {"data": {"test_ds": {"file_names": ["t.jsonl"]}}}})
    values, _ = composed(file, "prompts=['b']", command="generate")
    assert (values["prompts"], values["prompts_file"]) == (["b"], None)


@pytest.mark.parametrize("text", ["inference: 5", "model: {data: {test_ds: 3}}", "inference: {gredy: true}"])
def test_a_wrong_section_of_generation_is_answered(tmp_path: Path, text: str) -> None:
    assert len(refused(write(tmp_path, text), command="generate")) == 1


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["gpt_model_file=b.nemo", "prompts=['How are you?']"], {"base": "b.nemo", "prompts": ["How are you?"]}),
        (["sentences=['a','b']"], {"prompts": ["a", "b"]}),
        (["inference.greedy=False", "inference.temperature=0.7"], {"temperature": 0.7}),
        (["inference.greedy=False"], {"temperature": 1.0}),
        (["inference.greedy=True", "inference.temperature=0.7"], {"temperature": None}),
        (["inference.top_k=5", "inference.top_p=0.5"], {"top_k": 5, "top_p": 0.5}),
        (["++inference.repetition_penalty=1.2"], {"repetition_penalty": 1.2}),
        (["inference.tokens_to_generate=30"], {"tokens_to_generate": 30}),
        (["+model.data.test_ds.tokens_to_generate=10"], {"tokens_to_generate": 10}),
        (["model.data.test_ds.global_batch_size=4"], {"batch_size": 4}),
        (["model.data.test_ds.prompt_template='Q: {input}\\nA: {output}'"], {"prompt_template": "Q: {input}\\nA:"}),
        (["model.data.test_ds.file_names=['/a=b/t.jsonl']"], {"prompts_file": "/a=b/t.jsonl"}),
        (
            [
                "model.data.test_ds.write_predictions_to_file=True",
                "model.data.test_ds.output_file_path_prefix=/tmp/out",
            ],
            {"output": "/tmp/out.jsonl"},
        ),
        (["inference.outfile_path='/tmp/out.jsonl'"], {"output": "/tmp/out.jsonl"}),
        (["tensor_model_parallel_size=2"], {"model.tensor_model_parallel_size": 2}),
        (["tensor_model_parallel_size=-1"], {"model.tensor_model_parallel_size": 1}),
        (["server=False", "inference.compute_logprob=False"], {"base": None}),
        (["model.global_batch_size=2", "model.micro_batch_size=1"], {"batch_size": 64}),
    ],
)
def test_a_line_of_nemos_generation_keeps_its_meaning(lines: list[str], expected: dict[str, Any]) -> None:
    cfg, _ = compose_with_notes("generate", lines)
    values = plain(cfg)
    for key, value in expected.items():
        assert OmegaConf.select(OmegaConf.create(values), key) == value
    assert set(values) == set(plain(compose_config("generate", [])))
    assert not {"data", "peft", "restore_from_path"} & set(values["model"])


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["server=True"], "prompts_file"),
        (["inference.compute_logprob=true"], "only texts"),
        (["inference.all_probs=true"], "only texts"),
        (["+inference.end_strings=['###']"], "end-of-text"),
        (["model.data.test_ds.file_names=[a.jsonl,b.jsonl]"], "one file"),
        (["model.data.test_ds.prompt_template='{output} {input}'"], "prompt_template='{input}'"),
        (["model.peft.restore_from_ckpt.checkpoint_dir=/runs/c"], "convert-checkpoint"),
        (["checkpoint_dir=/runs/c"], "base="),
        (["gpt_model_file=a.nemo", "base=b.nemo"], "give one of them"),
        (["inference.greedy=False", "temperature=null"], "give one of them"),
        (["model.data.test_ds.add_bos=True"], "prompts are completed as they are"),
        (["inference.add_BOS=True"], "prompts are completed as they are"),
        (["inference.greedy=maybe"], "true or false"),
        (["data.test_ds.file_names=[a.jsonl]"], "write model.data.test_ds.file_names"),
        (["peft.restore_from_path=a.nemo"], "write model.peft.restore_from_path"),
        (["max_new_tokens=5"], "write tokens_to_generate"),
        (["inference.temprature=1"], "did you mean inference.temperature"),
        (["inference.nosuch=1"], "its keys are"),
        (["sentences=['a']", "prompts=['b']"], "give one of them"),
    ],
)
def test_a_line_of_nemos_generation_without_a_meaning_is_answered(lines: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config("generate", lines)
    assert len(error.value.problems) == 1
    assert told in error.value.problems[0]
