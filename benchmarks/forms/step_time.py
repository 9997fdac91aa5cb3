# SPDX-License-Identifier: Apache-2.0
"""Measures a training step here beside one of transformers with a plain LoRA, in turns, on the same batches."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from nemo_tied_lora.commands.study.task_files import prepare_task
from nemo_tied_lora.files import write_json
from nemo_tied_lora.planning.versions import installed_version

from .batches import Encoder, Pair, training_batches, training_pairs
from .factors import Factors
from .form import Form
from .llama import FrozenLlama
from .plan import RATES, read_plan
from .running import study_of_items
from .training import Recipe, train

__all__ = ["PlainLoRA", "measure"]

_STEPS = 7
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def measure(folder: Path, data: str | None, output: Path) -> int:
    """Measures CPU seconds of steps, here and in transformers in turns. Returns the exit code.

    Args:
        output: the JSON to write.
    """
    torch.set_num_threads(1)
    plan, study, encoder = read_plan(RATES), study_of_items(data), Encoder(folder)
    task = plan.tasks[0]
    train_file = prepare_task(study, study.task(task.name)).train
    options: dict[str, Any] = {"steps": 40, "batch": plan.training.batch, "seed": 1, "longest": task.max_seq_length}
    batches = training_batches(encoder, train_file, **options)[:_STEPS]
    pairs = training_pairs(encoder, train_file, **options)
    model = FrozenLlama(folder)
    factors = Factors(Form(rank=8, group=1), model.sizes.linears, model.sizes.layers, seed=1)
    recipe = Recipe(learning_rate=1e-3, multipliers={}, steps=40, warmup_steps=10)
    plain = PlainLoRA(folder, rank=8)
    steps: list[dict[str, float]] = []
    for number, batch in enumerate(batches):
        began = time.process_time()
        train(model, factors, [batch], recipe)
        middle = time.process_time()
        plain.step(pairs[number * plan.training.batch : (number + 1) * plan.training.batch])
        here, theirs = middle - began, time.process_time() - middle
        steps.append({"tokens": len(batch.tokens), "here": round(here, 3), "transformers": round(theirs, 3)})
        print(f"{len(batch.tokens)} tokens: here {here:.2f} s, transformers {theirs:.2f} s", flush=True)
    values = {
        "task": task.name,
        "form": "LoRA r=8",
        "clock": "process_time",
        "threads": 1,
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {name: installed_version(name) for name in ("torch", "transformers")},
        "steps": steps[1:],  # the first one warms up
    }
    write_json(output, values)
    print(f"wrote {output}")
    return 0


class PlainLoRA:
    """transformers' model with a LoRA in float32 on its seven linears, as a user would write it: padded, all logits."""

    def __init__(self, folder: Path, rank: int) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)
        self._model.requires_grad_(False)
        parameters: list[torch.nn.Parameter] = []
        for layer in self._model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name in _TARGETS:
                    if hasattr(part, name):
                        wrapped = _Wrapped(getattr(part, name), rank)
                        setattr(part, name, wrapped)
                        parameters += [wrapped.A, wrapped.B]
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98))

    def step(self, pairs: list[Pair]) -> float:
        """One training step. Returns the loss."""
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.zeros(len(pairs), longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(pairs):
            length = len(prompt) + len(answer)
            ids[row, :length] = torch.tensor([*prompt, *answer])
            labels[row, len(prompt) : length] = torch.tensor(answer)
            mask[row, :length] = 1
        logits = self._model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return float(loss.detach())


class _Wrapped(torch.nn.Module):
    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.A = torch.nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = functional.linear(functional.linear(x.float(), self.A), self.B)
        return self.base(x) + update.to(x.dtype)
