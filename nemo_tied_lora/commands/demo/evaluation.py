# SPDX-License-Identifier: Apache-2.0
"""Measures the exact match of a base and its adapters on a JSONL file. Loads the base once for all adapters.

python -m nemo_tied_lora.commands.demo.evaluation base.nemo test.jsonl answers.json [adapter.nemo ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.program import run_program

__all__ = ["evaluate", "exact_match", "main"]

_TOKENS = 40  # the longest answer of the quickstart's language has fewer


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers that equal the expected text, except for blanks at the ends."""
    pairs = zip(answers, expected, strict=True)
    return sum(answer.strip() == text.strip() for answer, text in pairs) / len(expected)


def evaluate(base: str, examples: Sequence[dict[str, str]], adapters: Sequence[str]) -> dict[str, Any]:
    """Greedy answers and exact match of the base alone (key "base") and with each adapter (key: its path)."""
    from omegaconf import OmegaConf

    from nemo_tied_lora.nemo.generation import complete, load_base
    from nemo_tied_lora.planning.composing.compose import compose_config

    cfg = compose_config("generate", [f"base={json.dumps(base)}", "trainer.precision=32"])
    OmegaConf.resolve(cfg)
    model = load_base(cfg)
    prompts, expected = [e["input"] for e in examples], [e["output"] for e in examples]
    results = {}
    for name in ["base", *adapters]:
        if name != "base":
            model.load_adapters(name)
        answers = complete(model, prompts, tokens_to_generate=_TOKENS, batch_size=100)
        results[name] = {"exact_match": exact_match(answers, expected), "answers": answers}
        model.remove_adapter()
    return results


def main(argv: list[str]) -> int:
    """Evaluates, and writes the answers as JSON. Returns 0."""
    base, examples_file, output, *adapters = argv
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    examples = [json.loads(line) for line in Path(examples_file).read_text(encoding="utf-8").splitlines()]
    results = evaluate(base, examples, adapters)
    from nemo_tied_lora.files import write_json

    write_json(Path(output), {"examples": examples, "results": results})
    return 0


if __name__ == "__main__":
    run_program(main, sys.argv[1:], "quickstart: evaluation")
