# SPDX-License-Identifier: Apache-2.0
"""`tied-lora export`: writes an adapter as a peft folder, as stock NeMo's LoRA, or as safetensors.

Runs in one process without a GPU. Imports neither Megatron nor NeMo.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_tied_lora.commands.local_command import check_paths, run_composed
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.base_config import base_model_config, recorded_model_keys
from nemo_tied_lora.planning.nemo_model_config import adapter_problems

if TYPE_CHECKING:
    from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile

__all__ = ["FORMATS", "SUMMARY", "main"]

SUMMARY = "write an adapter as plain LoRA for peft, vLLM and llama.cpp or for stock NeMo, or as safetensors"
FORMATS = ("hf-peft", "nemo-lora", "safetensors")

_EXAMPLES = """  tied-lora export adapter=adapter.nemo to=hf-peft output=adapter-peft base_model=my-org/my-base
  tied-lora export adapter=adapter.nemo to=nemo-lora output=lora.nemo base=base.nemo
  tied-lora export adapter=adapter.nemo to=safetensors output=adapter.safetensors
"""
# The expanded factors are float32 products of float32 numbers.
_LARGEST_DIFFERENCE = 1e-4


def main(argv: list[str]) -> int:
    """The command; see `run_composed` for what it returns."""
    return run_composed("export", argv, _run, summary=SUMMARY, examples=_EXAMPLES)


def _run(cfg: Mapping[str, Any]) -> int:
    _check(cfg)
    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
    from nemo_tied_lora.conversion.to_nemo_lora import check_nemo_lora, write_nemo_lora
    from nemo_tied_lora.conversion.to_peft_lora import check_hf_peft, write_hf_peft
    from nemo_tied_lora.conversion.to_safetensors import check_full_state, write_full_state

    file, output = read_adapter(cfg["adapter"]), Path(cfg["output"])
    if cfg["uniform_rank"]:
        file = dataclasses.replace(file, masks={})  # what is pruned is 0 in u
    base = _base(cfg, file.yaml)
    try:
        if cfg["to"] == "hf-peft":
            write_hf_peft(file, base, output, cfg["base_model"])
            difference = check_hf_peft(output, file, base)
        elif cfg["to"] == "nemo-lora":
            write_nemo_lora(file, base, output)
            difference = check_nemo_lora(output, file)
        else:
            write_full_state(file, output)
            difference = check_full_state(output, file)
    except OSError as error:
        raise ConfigError([f"output={output}: cannot be written: {error}"]) from error
    size = sum(part.stat().st_size for part in ([output] if output.is_file() else output.iterdir()))
    print(f"written: {output} ({size:,} bytes)")
    print(f"check: read back, its updates differ from the tied formula by {difference}")
    for note in _notes(cfg["to"], file):
        print(f"note: {note}")
    if not difference.relative <= _LARGEST_DIFFERENCE:
        print(f"tied-lora export: {output} is wrong: more than {_LARGEST_DIFFERENCE:.0e} apart", file=sys.stderr)
        return 1
    return 0


def _notes(to: str, file: AdapterFile) -> Iterator[str]:
    """What a reader of the format does not take."""
    from nemo_tied_lora.conversion.to_nemo_lora import REFUSED_BY_TENSORRT_LLM

    refused = [target for target in REFUSED_BY_TENSORRT_LLM if target in file.shapes]
    if to == "nemo-lora" and refused:
        yield f"TensorRT-LLM reads linear_qkv alone from this format, and refuses a file with {', '.join(refused)}"
    if to == "hf-peft" and file.masks:
        yield "llama.cpp and TensorRT-LLM do not read the ranks of a pruned adapter; for them, add uniform_rank=true"


def _check(cfg: Mapping[str, Any]) -> None:
    """Checks the arguments before any file is read.

    Raises:
        ConfigError: all problems together.
    """
    check_paths(cfg, "adapter", "output", "base")
    problems = Problems()
    problems.one_of("to", cfg["to"], FORMATS)
    problems += adapter_problems(cfg["adapter"], "adapter")
    if cfg["output"] is None:
        problems.append("output=null: name the folder (to=hf-peft) or the file to write")
    elif cfg["to"] in FORMATS:
        output = Path(cfg["output"])
        if cfg["to"] != "hf-peft" and output.is_dir():
            problems.append(f"output={output}: is a folder; to={cfg['to']} writes a file")
        if any(cfg[key] is not None and output.resolve() == Path(cfg[key]).resolve() for key in ("adapter", "base")):
            problems.append(f"output={output}: is an input; name another")
    if cfg["base_model"] is not None and cfg["to"] in FORMATS and cfg["to"] != "hf-peft":
        problems.append(f"base_model={cfg['base_model']}: only to=hf-peft records it; remove it")
    if not isinstance(cfg["uniform_rank"], bool):
        problems.append(f"uniform_rank={cfg['uniform_rank']!r}: must be true or false")
    elif cfg["uniform_rank"] and cfg["to"] in FORMATS and cfg["to"] != "hf-peft":
        problems.append("uniform_rank=true: only to=hf-peft has it; the other formats hold the whole rank; remove it")
    if cfg["base"] is not None:
        problems.file("base", cfg["base"], "null uses the adapter's own record of its base")
    problems.raise_if_any()


def _base(cfg: Mapping[str, Any], description: Mapping[str, Any]) -> Mapping[str, Any]:
    """NeMo's model keys of the base, from its `.nemo` if it is named, else from the adapter's record."""
    if cfg["base"] is not None:
        return base_model_config(cfg["base"], key="base")
    return recorded_model_keys(description)
