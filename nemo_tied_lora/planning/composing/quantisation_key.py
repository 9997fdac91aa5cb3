# SPDX-License-Identifier: Apache-2.0
"""Answers `model.base_quantization` in the commands that do not have it, with the reason and what to write instead."""

from __future__ import annotations

__all__ = ["misplaced_quantisation"]

_KEY = "base_quantization"
_FILE = "it works on the base's file, which is not quantised; leave it out"
# Command -> the answer. The others hold no base, or run commands that have the key.
_ANSWERS = {
    "merge": f"{_FILE}: the check measures what an adapter that was trained on a quantised base loses",
    "export": "an adapter's file records what its base was held in, and export reads no more; leave it out",
    "show": "an adapter's file records what its base was held in, and show prints it; leave it out",
    "pretrain": "pretrain trains all weights, and a quantised weight is frozen; leave it out, and give it to finetune",
    "compare": "it belongs to a method of the study; write methods.NAME.base_quantization=nf4",
    "quickstart": "a key of finetune; write \"overrides=['{text}']\"",
}
_OTHERS = "{command} holds no base; leave it out, and give it to finetune, generate, evaluate or plan"
_HAVE_IT = ("evaluate", "finetune", "generate", "launch", "plan")


def misplaced_quantisation(key: str, command: str, text: str) -> str | None:
    """Returns why the command has no such key, or None if it has it or the key is another one.

    Args:
        text: the whole override, such as ``+model.base_quantization=nf4``.
    """
    names = key.removeprefix("model.").split(".")
    if names[0] != _KEY or command in _HAVE_IT:
        return None
    plain = f"model.{text.lstrip('+').removeprefix('model.')}"
    return f"{text}: {_ANSWERS.get(command, _OTHERS).format(command=command, text=plain)}"
