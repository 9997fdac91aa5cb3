# SPDX-License-Identifier: Apache-2.0
"""`tied-lora status`: shows what a run is doing. Reads only the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.local_command import run_composed
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.resilience.status_file import ENDED, STALE_S, read_status
from nemo_tied_lora.tables import duration

__all__ = ["SUMMARY", "main"]

SUMMARY = "show what a run is doing: step, loss, tokens per second, time left, last checkpoint"

_EXAMPLES = """  tied-lora status run=runs/tied_lora
  tied-lora status run=runs/tied_lora format=json
"""


def main(argv: list[str]) -> int:
    """Returns 0, or 2 if there is no run."""
    return run_composed("status", argv, _show, summary=SUMMARY, examples=_EXAMPLES)


def _show(cfg: dict[str, Any]) -> int:
    problems = Problems()
    if cfg["run"] is None:
        problems.append("run: missing; name the run's folder: run=runs/tied_lora")
    problems.one_of("format", cfg["format"], ("text", "json"))
    status = read_status(Path(str(cfg["run"]))) if cfg["run"] is not None else {}
    if status is None:
        problems.append(f"run={cfg['run']}: no status.json in it; is it a run's folder?")
    problems.raise_if_any()
    assert status is not None
    age = (datetime.now(timezone.utc) - datetime.fromisoformat(status["updated"])).total_seconds()
    alive = status["state"] in ENDED or age <= STALE_S
    if cfg["format"] == "json":
        print(json.dumps({**status, "seconds_since_update": round(age), "alive": alive}, indent=2))
    else:
        print("\n".join(_lines(status, age, alive)))
    return 0


def _lines(status: Mapping[str, Any], age: float, alive: bool) -> list[str]:
    state = status["state"]
    if not alive:
        state += f", but no sign of life since {status['updated']} ({duration(age)} ago): it was killed, or its machine is gone"
    rows = {"state": state}
    if status.get("reason"):
        rows["reason"] = status["reason"]
    if status.get("max_steps"):
        rows["step"] = f"{status.get('step', 0)} of {status['max_steps']}"
    for key in ("loss", "tokens_per_second"):
        if status.get(key) is not None:
            rows[key.replace("_", " ")] = f"{status[key]:.4g}" if key == "loss" else f"{status[key]:,.0f}"
    if status.get("seconds_left") is not None and status["state"] not in ENDED and alive:
        rows["time left"] = duration(status["seconds_left"])
    if status.get("last_checkpoint"):
        rows["last checkpoint"] = f"{status['last_checkpoint']} (step {status.get('saved_step')})"
    if status.get("output"):
        rows["output"] = status["output"]
    if status.get("restarts"):
        rows["restarts"] = f"{status['restarts']}, of which {status['fruitless_restarts']} in a row saved nothing new"
    rows["rank 0"] = f"node {status.get('node')}, process {status.get('pid')}"
    rows["updated"] = f"{status['updated']} ({duration(age)} ago)"
    return [f"{name:<18}{value}" for name, value in rows.items()]
