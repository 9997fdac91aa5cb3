# SPDX-License-Identifier: Apache-2.0
"""`tied-lora convert-checkpoint`: writes a training checkpoint's adapter as a `.nemo`. Needs neither a GPU nor the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.local_command import run_composed
from nemo_tied_lora.errors import ConfigError

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
    output = _checked_output(cfg)
    if cfg["checkpoint"] is None:
        raise ConfigError(["checkpoint: missing; name a training checkpoint's folder, or a run's"])
    from nemo_tied_lora.checkpoint import training_checkpoint

    checkpoint = _find_checkpoint(Path(str(cfg["checkpoint"])), training_checkpoint)
    from tqdm import tqdm

    from nemo_tied_lora.checkpoint.checkpoint_to_adapter import write_adapter_of

    try:
        description = write_adapter_of(checkpoint, output, lambda names: tqdm(names, desc="converting", unit="tensor"))
    except OSError as error:
        raise ConfigError([f"output={output}: {error}"]) from error
    print(_verify(checkpoint, output, description["step"]))
    return 0


def _checked_output(cfg: Mapping[str, Any]) -> Path:
    if cfg["output"] is None or Path(str(cfg["output"])).suffix != ".nemo":
        raise ConfigError([f"output={cfg['output']}: must be the path of a .nemo file"])
    return Path(str(cfg["output"]))


def _find_checkpoint(path: Path, training_checkpoint: Any) -> Path:
    """Returns `path` if it is a checkpoint, else the newest checkpoint in it: `path` is then a run's folder."""
    if not path.exists():
        raise ConfigError([f"checkpoint={path}: no such folder"])
    if training_checkpoint.is_checkpoint(path):
        return path
    found = [p for place in (path, path / "checkpoints") if place.is_dir() for p in sorted(place.iterdir())]
    steps = [
        (training_checkpoint.read_description(p)["step"], p) for p in found if training_checkpoint.is_checkpoint(p)
    ]
    if not steps:
        problem = (
            "neither it nor a folder in it is a checkpoint of tied-lora finetune; NeMo's .ckpt files cannot be read"
        )
        raise ConfigError([f"checkpoint={path}: {problem}"])
    return max(steps)[1]


def _verify(checkpoint: Path, output: Path, step: int) -> str:
    """Reads the file back and compares it with the checkpoint, bit for bit. Returns the report.

    Raises:
        ConfigError: a tensor differs.
    """
    import torch

    from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
    from nemo_tied_lora.checkpoint.training_checkpoint import read_tensors

    written, kept = read_adapter(output).state, read_tensors(checkpoint, "adapter")
    wrong = [name for name in kept if name not in written or not torch.equal(written[name], kept[name])]
    if wrong or written.keys() != kept.keys():
        raise ConfigError([f"{output}: differs from the checkpoint in {', '.join(wrong) or 'its tensors'}"])
    values = sum(tensor.numel() for tensor in written.values())
    return (
        f"written: {output} ({output.stat().st_size:,} bytes), the adapter of step {step} of {checkpoint}\n"
        f"checked: {len(written)} tensors, {values:,} values, equal to the checkpoint's bit for bit"
    )
