# SPDX-License-Identifier: Apache-2.0
"""The processes of `generation_speed.py`: each holds one model, waits for its turn, and says how long its turn took.

All stay open, so that turns can alternate; who waits uses no processor.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Contender", "Turn", "nemo_model", "transformers_model"]

# Not "spawn": a test's process has imported everything, and hands it on.
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a contender is to generate: `new` tokens after each prompt, in one batch. method: of those that it has."""

    prompts: Sequence[Sequence[int]]
    new: int
    method: str = ""


@dataclass
class Contender:
    """One or more ranks that generate together.

    build: called in each process; returns what runs a turn and returns the new tokens of each prompt.
    """

    build: Callable[[], Callable[[Turn], list[list[int]]]]
    ranks: int
    threads: int
    _ends: list[Any] = field(default_factory=list)
    _processes: list[Any] = field(default_factory=list)

    def start(self) -> None:
        """Starts the processes, which load their models meanwhile."""
        port = _free_port()
        for rank in range(self.ranks):
            mine, other = _FORK.Pipe()
            names: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "MASTER_PORT": port}
            names |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": self.threads}
            process = _FORK.Process(target=_serve, args=(other, self.build, names), daemon=True)
            process.start()
            self._ends.append(mine)
            self._processes.append(process)

    def wait_until_ready(self) -> None:
        """Raises a RuntimeError with the traceback of a process that could not load its model."""
        for end in self._ends:
            _answer(end)

    def run(self, turn: Turn) -> tuple[float, list[list[int]]]:
        """The seconds of the slowest rank, and the new tokens."""
        for end in self._ends:
            end.send(turn)
        answers = [_answer(end) for end in self._ends]
        return max(seconds for seconds, _ in answers), answers[0][1]

    def stop(self) -> None:
        """Ends the processes."""
        for end in self._ends:
            with suppress(OSError):
                end.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()


def transformers_model(path: Path, dtype: str) -> Callable[[Turn], list[list[int]]]:
    """transformers' `generate`, greedy, on a Hugging Face folder or a GGUF file."""
    import torch
    import transformers

    source = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, dtype), **source)
    model.eval()
    model.generation_config.eos_token_id = None  # every row gets all its tokens

    def run(turn: Turn) -> list[list[int]]:
        width = max(map(len, turn.prompts))
        padding = [width - len(prompt) for prompt in turn.prompts]
        tokens = torch.tensor([[0] * gap + list(prompt) for gap, prompt in zip(padding, turn.prompts, strict=True)])
        mask = (torch.arange(width)[None] >= torch.tensor(padding)[:, None]).long()
        with torch.no_grad():
            found = model.generate(
                input_ids=tokens, attention_mask=mask, max_new_tokens=turn.new, do_sample=False, pad_token_id=0
            )
        return found[:, width:].tolist()

    return run


def nemo_model(base: Path, dtype: str, stages: int) -> Callable[[Turn], list[list[int]]]:
    """This package's greedy decoding, and with method "nemo" NeMo's own `generate`, on a NeMo base."""
    from nemo_tied_lora.platform import prepare

    prepare(nemo=True)
    from nemo_tied_lora.nemo.generated_rows import Ends
    from nemo_tied_lora.nemo.generation import load_base
    from nemo_tied_lora.nemo.greedy_decoding import decode_greedily
    from nemo_tied_lora.planning.composing.compose import compose_config

    precision = {"float32": "32", "bfloat16": "bf16"}[dtype]
    layout = [f"trainer.devices={stages}", f"model.pipeline_model_parallel_size={stages}", "trainer.accelerator=cpu"]
    model: Any = load_base(compose_config("generate", [f"base={base}", f"trainer.precision={precision}", *layout]))

    def ours(turn: Turn) -> list[list[int]]:
        ends = Ends(tokens=frozenset(), most=turn.new)
        found = dict(decode_greedily(model._unwrap_model_list(), turn.prompts, ends, batch_size=len(turn.prompts)))
        return [found[number] for number in range(len(turn.prompts))]

    return lambda turn: _by_nemo(model, turn) if turn.method == "nemo" else ours(turn)


def _by_nemo(model: Any, turn: Turn) -> list[list[int]]:
    import torch

    width = max(map(len, turn.prompts)) + turn.new
    tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in turn.prompts])
    sampling: dict[str, Any] = {
        "use_greedy": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
    }
    sampling |= {"add_BOS": False, "all_probs": False, "compute_logprob": False, "end_strings": ["<|endoftext|>"]}
    with torch.no_grad():
        found = model.generate(
            inputs=(tokens, torch.tensor([len(prompt) for prompt in turn.prompts])),
            length_params={"max_length": turn.new, "min_length": turn.new},
            sampling_params=sampling,
        )
    pairs = zip(turn.prompts, found["token_ids"], strict=True)
    return [[int(token) for token in row[len(prompt) :][: turn.new]] for prompt, row in pairs]


def _serve(end: Any, build: Callable[[], Callable[[Turn], list[list[int]]]], names: Mapping[str, Any]) -> None:
    os.environ.update({name: str(value) for name, value in names.items()})
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        run = build()
        import torch

        torch.set_num_threads(int(names["OMP_NUM_THREADS"]))
        end.send((None, "ready"))
        for turn in iter(end.recv, None):
            start = time.perf_counter()
            tokens = run(turn)
            end.send((None, (time.perf_counter() - start, tokens)))
    except BaseException:
        end.send((traceback.format_exc(), None))
    os._exit(0)


def _answer(end: Any) -> Any:
    try:
        failure, answer = end.recv()
    except EOFError:
        failure, answer = "a process ended without a word", None
    if failure is not None:
        raise RuntimeError(failure)
    return answer


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
