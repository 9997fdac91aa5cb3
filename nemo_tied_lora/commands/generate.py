# SPDX-License-Identifier: Apache-2.0
"""`tied-lora generate`: completes prompts with a base and an adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_tied_lora.commands.distributed_command import run_command
from nemo_tied_lora.files import write_atomically
from nemo_tied_lora.planning.data.data_files import check_prompts_file
from nemo_tied_lora.planning.data.jsonl_lines import examples
from nemo_tied_lora.planning.data.prompt_template import fill, template_fields
from nemo_tied_lora.planning.preflight import check_generation

__all__ = ["SUMMARY", "main"]

SUMMARY = "complete prompts with a base and an adapter"

_EXAMPLES = """  tied-lora generate base=base.nemo adapter=adapter.nemo "prompts=['de 1234:','de 7:']" trainer.precision=32
  tied-lora generate base=base.nemo adapter=null prompts_file=test.jsonl output=answers.jsonl layout=tp2
"""


def main(argv: list[str]) -> int:
    """The command; see `run_command` for what it returns."""
    return run_command(
        "generate",
        argv,
        summary=SUMMARY,
        examples=_EXAMPLES,
        groups=("layout",),
        check=check_generation,
        check_files=check_prompts_file,
        run=lambda cfg, rank: _run(cfg),
    )


def _run(cfg: DictConfig) -> None:
    import torch

    from nemo_tied_lora.nemo.base_precision_note import say_precision
    from nemo_tied_lora.nemo.generation import complete, load_base
    from nemo_tied_lora.nemo.token_rows import rowless_note

    rows = _rows(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    model = load_base(cfg)
    if torch.distributed.get_rank() == 0:
        for note in rowless_note(model):
            print(f"note: {note}", file=sys.stderr, flush=True)
    if cfg.adapter is not None:
        model.load_adapters(cfg.adapter)
        say_precision(model, cfg.adapter, model.tokenizer.text_to_ids(rows[0]["prompt"]) if rows else ())
    sampling = {key: cfg[key] for key in _SAMPLING}
    completions = complete(model, [row["prompt"] for row in rows], **sampling)
    if torch.distributed.get_rank() == 0:
        _write([{**row, "completion": text} for row, text in zip(rows, completions, strict=True)], cfg.output)


_SAMPLING = (
    "tokens_to_generate",
    "min_tokens_to_generate",
    "batch_size",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
)


def _rows(cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per prompt; a row of `prompts_file` keeps the other fields of its line."""
    if cfg["prompts"] is not None:
        return [{"prompt": prompt} for prompt in cfg["prompts"]]
    template = cfg["prompt_template"]
    found = examples(Path(cfg["prompts_file"]), template_fields(template))
    return [{**example, "prompt": fill(template, example)} for example in found]


def _write(rows: list[dict[str, Any]], output: str | None) -> None:
    if output is None:
        for row in rows:
            print(f"{row['prompt']}{row['completion']}", flush=True)
        return
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        path = write_atomically(Path(output), lines.encode())
    except OSError:  # a full disk: hours of generation are worth more than the place where they were to go
        print(lines, end="", flush=True)
        raise
    print(f"written: {path} ({len(rows)} completions)", flush=True)
