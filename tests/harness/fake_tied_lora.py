# SPDX-License-Identifier: Apache-2.0
"""Stands in for `tied-lora finetune` and `tied-lora evaluate` in tests of a study: milliseconds, and no model.

FAKE_FAULTS, JSON, maps a part of a command line to what happens: an exit code, "diverge", or "hang". Each call appends
its arguments to the file FAKE_CALLS; one that hangs writes its number beside it.
"""

import io
import json
import os
import sys
import tarfile
import time
from pathlib import Path


def main() -> int:
    """Does what the arguments ask for; returns the exit code."""
    command, *words = sys.argv[1:]
    values = dict(word.partition("=")[::2] for word in words)
    with open(os.environ["FAKE_CALLS"], "a") as file:
        file.write(json.dumps([command, *words]) + "\n")
    for part, what in json.loads(os.environ.get("FAKE_FAULTS", "{}")).items():
        if part in f"{command} {' '.join(words)}":
            if what == "hang":
                Path(os.environ["FAKE_CALLS"]).with_suffix(".hangs").write_text(str(os.getpid()))
                time.sleep(60)
            print("the gradient of layers.0.linear_qkv.u holds NaN or infinity on rank 0")
            return 3 if what == "diverge" else int(what)
    (_finetune if command == "finetune" else _evaluate)(values)
    return 0


def _finetune(values: dict[str, str]) -> None:
    adapter = Path(values["output"])
    config = b"peft: {peft_scheme: tied_lora, tied_lora: {rank: 8}}\nbase: {fingerprint: {value: f1}}\n"
    with tarfile.open(adapter, "w") as tar:
        info = tarfile.TarInfo("model_config.yaml")
        info.size = len(config)
        tar.addfile(info, io.BytesIO(config))
    metrics = {
        "trained_parameters": 110 if values["preset"] == "tl6" else 1000,
        "lora_parameters": 1000,
        "base_parameters": 10**6,
        "steps": [{"loss": 3.0 - step / 10} for step in range(int(values["trainer.max_steps"]))],
    }
    adapter.with_name("metrics.json").write_text(json.dumps(metrics))


def _evaluate(values: dict[str, str]) -> None:
    output = Path(values["output"])
    output.mkdir(parents=True, exist_ok=True)
    with (Path(values["task.folder"]) / f"{values['split']}.jsonl").open() as file:
        items = [json.loads(line) for line in file]
    with (output / "it.jsonl").open("w") as file:
        for number, item in enumerate(items):
            right = values["adapter"] != "null" and number % 4
            found = {"loss": 5.0 + number, "tokens": 7, "completion": item["references"][0] if right else "?"}
            file.write(json.dumps({"id": item["id"], **found}) + "\n")
    (output / "results.json").write_text(json.dumps({"adapters": {"it": {"predictions": "it.jsonl"}}}))


if __name__ == "__main__":
    sys.exit(main())
