# SPDX-License-Identifier: Apache-2.0
"""Compares a run that will resume with the run that wrote the checkpoint. Imports no Bridge.

Bridge loads what the checkpoint has into the adapter that the configuration describes. Tensors of another shape stop it;
another alpha, dropout or list of targets does not.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["ResumedRun", "field_problems", "notices", "resumed_run"]

_RECORD, _LATEST = "run_config.yaml", "latest_checkpointed_iteration.txt"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumedRun:
    """A checkpoint of Bridge's, and the whole configuration that it records."""

    folder: Path
    recorded: Mapping[str, Any]

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the configuration; empty if it has none."""
        found = self.recorded.get(name)
        return found if isinstance(found, Mapping) else {}


def resumed_run(checkpoint: Any) -> ResumedRun | None:
    """The checkpoint from which Bridge will resume; None if there is none, or it has no record.

    Args:
        checkpoint: Bridge's `CheckpointConfig`.
    """
    folder = None if checkpoint.load is None else _folder(Path(checkpoint.load), checkpoint.ckpt_step)
    if folder is None or not (folder / _RECORD).is_file():
        return None
    return ResumedRun(folder, yaml.safe_load((folder / _RECORD).read_text(encoding="utf-8")) or {})


def _folder(load: Path, step: int | None) -> Path | None:
    """As Bridge chooses it: a checkpoint itself, the step that the configuration names, or the latest."""
    if (load / _RECORD).is_file():
        return load
    if step is None:
        latest = load / _LATEST
        text = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
        if not text.isdecimal():
            return None
        step = int(text)
    return load / f"iter_{step:07d}"


def field_problems(config: TiedLoraConfig, resumed: ResumedRun, load: str) -> Iterator[str]:
    """Yields one line per field of the adapter that the checkpoint's run had otherwise."""
    section, names = resumed.section("peft"), [one.name for one in dataclasses.fields(TiedLoraConfig)]
    if "rank" not in section or "tied" not in section:
        other = section.get("_target_", "no adapter")
        yield f"checkpoint.load={load}: its checkpoint is of {other}, not of TiedLoRA; name another folder"
        return
    known = TiedLoraConfig(**{name: section[name] for name in names if name in section}).as_dict()
    for name, value in config.as_dict().items():
        if value != known[name]:
            yield (
                f"peft.{name}={value!r}: the run resumes from {resumed.folder}, which has {known[name]!r}; set it to that, or "
                "train in another folder"
            )


def notices(restored: str | None, resumed: ResumedRun, checkpoint: Any) -> None:
    """Warns, on rank 0, of what a resumed run does otherwise than its configuration may suggest.

    Args:
        restored: `TiedLoRA.restore_from_path`.
    """
    was, is_now = resumed.section("checkpoint").get("pretrained_checkpoint"), checkpoint.pretrained_checkpoint
    lines = []
    if was and is_now and os.path.realpath(was) != os.path.realpath(is_now):
        lines.append(
            f"checkpoint.pretrained_checkpoint={is_now}: the adapter in {resumed.folder} was trained on {was}, and is "
            "continued on another base"
        )
    if restored is not None and restored != resumed.section("peft").get("restore_from_path"):
        lines.append(f"peft.restore_from_path={restored}: no effect; the run resumes from {resumed.folder}")
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            _logger.warning(line)
