# SPDX-License-Identifier: Apache-2.0
"""Tiny bases in Hugging Face's form, exports of random adapters on them, and what vLLM and peft make of both."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.commands.main import main as tied_lora
from nemo_tied_lora.conversion.hf_config import nemo_keys
from tests.harness.hugging_face_models import save_model
from tests.harness.paths import ROOT

__all__ = ["NEW_TOKENS", "Base", "Served", "by_peft", "by_vllm", "prompt", "run_with_vllm", "serving_python"]

NEW_TOKENS = 8
# vLLM's attention on a CPU wants heads of 32 at least. Llama's heads are wider than hidden / heads, as some models' are.
_SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 64, "head_dim": 32},
    "qwen2": {"hidden_size": 128},
}
_LAYERS = 3


def serving_python() -> str:
    """The interpreter of vLLM's environment."""
    return os.environ["SERVING_PYTHON"]


@dataclass(frozen=True)
class Served:
    """What a model makes of a prompt: NEW_TOKENS greedy tokens, and their (NEW_TOKENS, vocab) log-probabilities."""

    tokens: list[int]
    logprobs: torch.Tensor


class Base:
    """A random model in a folder, and adapters on it.

    Args:
        family: llama or qwen2. Both have two query groups.
    """

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder, self.adapters = family, folder / "base", folder / "adapters"
        save_model(family, self.folder, num_hidden_layers=_LAYERS, max_position_embeddings=64, **_SIZES[family])
        self.keys = nemo_keys(json.loads((self.folder / "config.json").read_text())).model

    def export(self, name: str, file: AdapterFile) -> Path:
        """Writes an adapter's file, and exports it with `tied-lora export to=hf-peft`. Returns the folder."""
        self.adapters.mkdir(exist_ok=True)
        folder = self.adapters / name.replace(" ", "_")
        path = folder.with_suffix(".nemo")
        write_adapter(path, file.config, file.shapes, file.state, file.yaml, file.masks or None)
        assert tied_lora(["export", f"adapter={path}", "to=hf-peft", f"output={folder}"]) == 0
        return folder

    def model(self) -> Any:
        """The model of transformers, in float32."""
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(str(self.folder), attn_implementation="eager").eval()


def prompt(number: int) -> list[int]:
    """A prompt of random tokens; the lengths differ."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, 256, (6 + 3 * number,), generator=generator).tolist()


def run_with_vllm(script: Path, *arguments: str, cwd: Path, **variables: str) -> str:
    """Runs a Python file in vLLM's environment, and returns what it prints."""
    # Not this checkout's packages: only what vLLM's environment has.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [serving_python(), str(script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout


def by_vllm(base: Base, folders: Mapping[str, Path], prompts: Sequence[tuple[str | None, list[int]]]) -> list[Served]:
    """Serves the prompts, each for a named adapter or for the base alone, in one batch of one engine."""
    request, answer = base.adapters / "request.json", base.adapters / "answer.json"
    ranks = [json.loads((folder / "adapter_config.json").read_text())["r"] for folder in folders.values()]
    asked = {
        "base": str(base.folder),
        "adapters": {name: str(folder) for name, folder in folders.items()},
        "largest_rank": min(size for size in (8, 16, 32, 64) if size >= max(ranks)),
        "new_tokens": NEW_TOKENS,
        "prompts": [{"adapter": name, "tokens": tokens} for name, tokens in prompts],
    }
    request.write_text(json.dumps(asked))
    script = ROOT / "tests" / "serving" / "vllm_engine.py"
    run_with_vllm(script, str(request), str(answer), cwd=base.adapters)
    served = json.loads(answer.read_text())
    return [Served(one["tokens"], torch.tensor(one["logprobs"])) for one in served]


def by_peft(base: Base, folder: Path | None, tokens: list[int]) -> Served:
    """The same from transformers, with the adapter as peft loads it."""
    import peft

    model = base.model()
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, str(folder))
    known = list(tokens)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([known])).logits[0]
            known.append(int(logits[-1].argmax()))
    return Served(known[len(tokens) :], logits[-NEW_TOKENS:].log_softmax(-1))
