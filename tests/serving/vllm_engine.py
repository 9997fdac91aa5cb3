# SPDX-License-Identifier: Apache-2.0
"""Serves adapters with vLLM's engine on a CPU. Runs in vLLM's environment: it imports vLLM, and nothing of this project.

python tests/serving/vllm_engine.py REQUEST ANSWER

REQUEST is a JSON file: the folder of a base, folders of adapters by name, and prompts, each for an adapter or for none. All
prompts are one batch. ANSWER gets, for each prompt, the greedy tokens, and for each of them the log-probabilities of the
whole vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["SETTINGS", "main"]

SETTINGS = {
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Without them, vLLM compiles a kernel for a minute, and asks the network."""


def main(request: Path, answer: Path) -> None:
    """Reads the one file and writes the other."""
    os.environ.update(SETTINGS, VLLM_ENABLE_V1_MULTIPROCESSING="0")  # the engine in this process: a start less
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(request.read_text())
    adapters = {
        name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(asked["adapters"].items(), 1)
    }
    engine = LLM(
        model=asked["base"],
        enable_lora=True,
        # One slot stays empty: on a CPU, vLLM 0.32 gives a prompt without an adapter what is in the last slot.
        max_loras=len(adapters) + 1,
        max_lora_rank=asked["largest_rank"],
        max_logprobs=-1,
        max_model_len=64,
        skip_tokenizer_init=True,  # the vocabulary has rows without a token
        dtype="float32",
        enforce_eager=True,
    )
    # Without those of the prompt: with an adapter, vLLM 0.32 fails to compute them on a CPU.
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False, logprobs=-1
    )
    outputs = engine.generate(
        [{"prompt_token_ids": prompt["tokens"]} for prompt in asked["prompts"]],
        sampling,
        lora_request=[adapters.get(prompt["adapter"]) for prompt in asked["prompts"]],
        use_tqdm=False,
    )
    answer.write_text(json.dumps([_served(output) for output in outputs]))


def _served(output: Any) -> dict[str, Any]:
    """The new tokens, and for each a row of log-probabilities, by the number of the token."""
    [new] = output.outputs
    rows = [[row[token].logprob for token in range(len(row))] for row in new.logprobs]
    return {"tokens": list(new.token_ids), "logprobs": rows}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
