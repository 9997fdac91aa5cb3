# SPDX-License-Identifier: Apache-2.0
"""`tied-lora convert-checkpoint`: writes a training checkpoint's adapter as a `.nemo`. Needs neither a GPU nor the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.local_command import check_output, run_composed
from nemo_tied_lora.errors import ConfigError, Problems

__all__ = ["SUMMARY", "main"]

SUMMARY = "write a training checkpoint's adapter as a .nemo file, without a GPU"

_EXAMPLES = """  tied-lora convert-checkpoint checkpoint=runs/tied_lora output=adapter.nemo
  tied-lora convert-checkpoint "checkpoint='runs/tied_lora/checkpoints/tied_lora--validation_loss=0.1-step=200'" \\
      output=adapter.nemo
"""


def main(argv: list[str]) -> int:
    """Returns 0, or 2 if the configuration or the checkpoint is refused."""
    return run_composed("convert-checkpoint", argv, _run, summary=SUMMARY, examples=_EXAMPLES)


def _run(cfg: Mapping[str, Any]) -> int:
    problems = Problems()
    check_output(problems, cfg["output"], [cfg["checkpoint"]])
    if cfg["checkpoint"] is None:
        problems.append("checkpoint: missing; name a training checkpoint's folder, or a run's")
    problems.raise_if_any()

    from nemo_tied_lora.checkpoint.checkpoint_to_adapter import write_adapter_of
    from nemo_tied_lora.progress import Progress

    checkpoint, output = _find_checkpoint(Path(str(cfg["checkpoint"]))), Path(str(cfg["output"]))
    try:
        description = write_adapter_of(
            checkpoint, output, lambda names: Progress(names, desc="converting", unit="tensor")
        )
    except OSError as error:
        raise ConfigError([f"output={output}: {error}"]) from error
    size = f"{output.stat().st_size:,} bytes"
    print(f"written: {output} ({size}), the adapter of step {description['step']} of {checkpoint}")
    _verify(checkpoint, output)
    return 0


def _find_checkpoint(path: Path) -> Path:
    """Returns `path` if it is a checkpoint, else the newest checkpoint in it: `path` is then a run's folder."""
    from nemo_tied_lora.checkpoint.training_checkpoint import is_checkpoint, read_description

    if not path.exists():
        raise ConfigError([f"checkpoint={path}: no such folder"])
    if is_checkpoint(path):
        return path
    found = [p for folder in (path, path / "checkpoints") if folder.is_dir() for p in sorted(folder.iterdir())]
    steps = [(read_description(p)["step"], p) for p in found if is_checkpoint(p)]
    if not steps:
        problem = "neither it nor a folder in it is a checkpoint of tied-lora finetune; NeMo's .ckpt is not supported"
        raise ConfigError([f"checkpoint={path}: {problem}"])
    return max(steps)[1]


def _verify(checkpoint: Path, output: Path) -> None:
    """Reads the file back, compares it with the checkpoint bit for bit, and prints the result.

    Raises:
        ConfigError: a tensor differs.
    """
    import torch

    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
    from nemo_tied_lora.checkpoint.training_checkpoint import read_tensors

    written, kept = read_adapter(output).state, read_tensors(checkpoint, "adapter")
    wrong = [
        n for n in {**kept, **written} if n not in kept or n not in written or not torch.equal(kept[n], written[n])
    ]
    if wrong:
        raise ConfigError([f"{output}: differs from the checkpoint in {', '.join(wrong)}"])
    values = sum(tensor.numel() for tensor in written.values())
    print(f"checked: {len(written)} tensors, {values:,} values, equal to the checkpoint's bit for bit")
