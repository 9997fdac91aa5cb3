# SPDX-License-Identifier: Apache-2.0
"""Refuses a list, a section or null in place of a text: a name, a folder, a file. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.composing.dotted_keys import flat
from nemo_tied_lora.planning.data.data_files import SECTIONS

__all__ = ["text_problems"]

# Keys that hold a text or null.
_OR_NULL = (
    "base",
    "adapter",
    "prompts_file",
    "output",
    "exp_manager.explicit_log_dir",
    "exp_manager.exp_dir",
    "exp_manager.version",
    "model.restore_from_path",
    "model.peft.restore_from_path",
    "model.data.train_ds.index_mapping_dir",
    "model.data.validation_ds.output_file_path_prefix",
    "model.data.test_ds.output_file_path_prefix",
    # `prompt_template` checks these more closely: null truncates the whole, and conversations need no template.
    *(f"model.data.{name}.{key}" for name in SECTIONS for key in ("truncation_field", "prompt_template")),
)
_ACCELERATORS = ("auto", "gpu", "cuda", "cpu")
_OTHERS = ("trainer.precision", "trainer.accelerator", "model.peft.peft_scheme")
"""Texts with a check of their own."""


def text_problems(command: str, cfg: Mapping[str, Any]) -> Problems:
    """Checks every key that holds a text in the shipped configuration of the command, and the accelerator."""
    problems = Problems()
    problems.one_of("trainer.accelerator", cfg["trainer"].get("accelerator", "auto"), _ACCELERATORS)
    texts = _texts(command)
    for key, value in flat(cfg).items():
        if key not in (*texts, *_OR_NULL) or isinstance(value, (str, int, float)):
            continue
        if key not in _OR_NULL:
            problems.append(f"{key}={value!r}: must be a text")
        elif value is not None:
            problems.append(f"{key}={value!r}: must be a text, or null")
    return problems


@lru_cache
def _texts(command: str) -> frozenset[str]:
    shipped = flat(plain(compose_config(command, [])))
    return frozenset(key for key, value in shipped.items() if isinstance(value, str) and key not in _OTHERS)
