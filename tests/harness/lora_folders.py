# SPDX-License-Identifier: Apache-2.0
"""Changes LoRA folders of peft as others' files differ, and adds what is read from them to a Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_tied_lora.conversion.lora_to_tied import read_lora
from nemo_tied_lora.errors import ConfigError
from tests.harness.random_adapters import LLAMA

__all__ = ["CONFIG", "WEIGHTS", "edit", "edit_tensors", "problems_of", "with_update"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edit(folder: Path, file: str = CONFIG, /, **values: Any) -> Path:
    """Changes keys of a JSON file."""
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **values}))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Path:
    """Writes the dictionary that `change` returns, or the one that it has changed in place."""
    tensors = load_file(folder / file)
    result = change(tensors)
    written = result if isinstance(result, dict) else tensors
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, folder / file)
    return folder


def problems_of(call: Callable[[], Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        call()
    assert not any("\n" in problem for problem in caught.value.problems)
    return caught.value.problems


def with_update(model: Any, folder: Path) -> Any:
    """Adds the deltas that are read from the folder to a Llama of the shapes of `LLAMA`. Returns the model."""
    lora = read_lora(folder, LLAMA)
    for target, by_layer in lora.deltas.items():
        for layer, delta in by_layer.items():
            block, rows = model.model.layers[layer], (delta.P @ delta.Q).float()
            if target == "linear_qkv":
                groups = [group.split([24, 8, 8]) for group in rows.chunk(2)]
                for i, name in enumerate("qkv"):
                    block.get_submodule(f"self_attn.{name}_proj").weight.data += torch.cat([g[i] for g in groups])
            elif target == "linear_fc1":
                block.mlp.gate_proj.weight.data += rows[:40]
                block.mlp.up_proj.weight.data += rows[40:]
            else:
                name = {"linear_proj": "self_attn.o_proj", "linear_fc2": "mlp.down_proj"}[target]
                block.get_submodule(name).weight.data += rows
    return model
