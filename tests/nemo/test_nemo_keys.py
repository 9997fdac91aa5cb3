# SPDX-License-Identifier: Apache-2.0
"""The table of NeMo's keys is that of the installed NeMo and Lightning. Reads their sources, and imports neither."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from nemo_tied_lora.planning.composing.nemo_keys import is_nemo_key, unknown_to_nemo

CHOSEN_BY_NEMO = {"strategy", "plugins", "callbacks"}


def source(package: str, *parts: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).parent.joinpath(*parts).read_text())


def the_class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)


def test_the_trainers_keys_are_lightnings() -> None:
    tree = the_class(source("lightning", "pytorch", "trainer", "trainer.py"), "Trainer")
    init = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = {argument.arg for argument in init.args.kwonlyargs}
    assert len(names) > 30
    assert {name for name in names if not is_nemo_key(f"trainer.{name}")} == CHOSEN_BY_NEMO
    assert {name for name in names if unknown_to_nemo(f"trainer.{name}")} == CHOSEN_BY_NEMO
    assert unknown_to_nemo("trainer.gpus_per_task")


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("ExpManagerConfig", "exp_manager"),
        ("CallbackParams", "exp_manager.checkpoint_callback_params"),
        ("EarlyStoppingParams", "exp_manager.early_stopping_callback_params"),
    ],
)
def test_exp_managers_keys_are_nemos(name: str, section: str) -> None:
    body = the_class(source("nemo", "utils", "exp_manager.py"), name).body
    fields = {node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assert len(fields) > 5
    assert [field for field in sorted(fields) if unknown_to_nemo(f"{section}.{field}")] == []
    assert unknown_to_nemo(f"{section}.no_such_key")


def test_the_datasets_keys_that_nemo_reads_are_known() -> None:
    """What NeMo reads with `data_cfg.get(...)`."""
    model = source("nemo", "collections", "nlp", "models", "language_modeling", "megatron_gpt_sft_model.py")
    read = {
        node.args[0].value
        for node in ast.walk(model)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "data_cfg"
        and isinstance(node.args[0], ast.Constant)
    }
    assert {"packed_sequence", "pad_to_max_length"} <= read
    assert [key for key in sorted(map(str, read)) if not is_nemo_key(f"model.data.train_ds.{key}")] == []
