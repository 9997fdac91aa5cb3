# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter as plain LoRA for peft, for every model family that Bridge knows. Imports no Bridge.

Bridge's mappings say how Megatron's weights become Hugging Face's. Each weight is replaced by a tensor that holds the number
of each row. What a mapping makes of it says which of Megatron's rows are in which of Hugging Face's linears, and in which
order. The same rows of lora_B then belong to that linear, and lora_A is the same for all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import save_file

from nemo_tied_lora.adapter.agreement import raise_together
from nemo_tied_lora.adapter.experts import name_at
from nemo_tied_lora.adapter.factor_names import each_linear
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.layer_numbers import LayerNumbers
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.sharding import shard
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.conversion.untie_to_lora import plain_alpha, plain_lora
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import replace_folder

__all__ = ["write_peft_folder"]

_CONFIG, _STATE = "adapter_config.json", "adapter_model.safetensors"
_WEIGHT = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)\.(.+)\.weight$")
_MOST_ROWS = 2**24
"""float32 holds every whole number up to this one."""

_Rows = dict[str, torch.Tensor]
"""A linear of the Hugging Face model to its rows' numbers among Megatron's."""


def write_peft_folder(
    adapter: Adapter, tasks: Iterable[Any], folder: Path, base_model: str | None, hf_config: Any = None
) -> Path:
    """Writes the folder beside `folder` and renames it there. All ranks must call it; rank 0 writes.

    Args:
        adapter: on any layout of the model.
        tasks: Bridge's conversion tasks of the model, the same on every rank.
        base_model: name or path of the Hugging Face base.
        hf_config: its configuration. transformers gives some models other names than their files; None: the files' names.

    Raises:
        ConfigError: lists each linear that Bridge cannot map, or maps to something that no plain LoRA can express. Raised
            on every rank, before anything is written.
    """
    rows_of, failure = {}, None
    try:
        rows_of = _rows(adapter, tasks, _renaming(hf_config))
    except Exception as error:
        failure = error
    raise_together("save_hf_adapter", failure)
    state = adapter.full_state()
    try:
        if torch.distributed.get_rank() == 0:
            _write(folder, adapter.config, state, rows_of, base_model)
    except Exception as error:
        failure = error
    raise_together("save_hf_adapter", failure)
    return folder


def _renaming(hf_config: Any) -> Callable[[str], str]:
    """The name of a weight in transformers' model, from that in its file. From transformers 5 on they differ for some models.

    A model whose code comes with its files has their names.
    """
    renamings: list[Any] = []
    if hf_config is not None and not getattr(hf_config, "auto_map", None):
        try:
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping
            from transformers.core_model_loading import WeightRenaming
        except ImportError:  # transformers 4
            return str
        known = get_checkpoint_conversion_mapping(hf_config.model_type) or ()
        renamings = [step for step in known if isinstance(step, WeightRenaming)]

    def renamed(name: str) -> str:
        for step in renamings:
            name = step.rename_source_key(name)[0]
        return name

    return renamed


def _rows(adapter: Adapter, tasks: Iterable[Any], renamed: Callable[[str], str]) -> dict[tuple[int, str], _Rows]:
    """(layer, linear) to the linears of the Hugging Face model that hold its rows."""
    shapes = {(layer, linear): shape for layer, linear, shape in each_linear(adapter.shapes)}
    numbers = LayerNumbers.of(adapter.chunks[0].body)
    found, problems = {}, []
    for task in tasks:
        if task is None:  # Bridge does not know the weight
            continue
        place = _place(task.global_param_name, numbers)
        if place not in shapes:
            continue
        shape = shapes[place]
        local = None
        if task.param_weight is not None:
            local = _numbered(shape).unsqueeze(1).expand(*task.param_weight.shape).contiguous()
        mapped: Mapping[str, torch.Tensor] = task.mapping.megatron_to_hf(local, task.megatron_module)
        unfit = [name for name, tensor in mapped.items() if not _is_rows(name, tensor, shape)]
        problems += [
            f"targets: layer {place[0]} {place[1]}: Bridge makes {name} of it in a form that plain LoRA cannot have; merge the "
            "adapter and use save_hf_pretrained"
            for name in unfit
        ]
        found[place] = {
            renamed(name).removesuffix(".weight"): tensor[:, 0].long().cpu() for name, tensor in mapped.items()
        }
    lost = [place for place in shapes if not found.get(place)]
    problems += [f"targets: layer {layer} {linear}: Bridge has no Hugging Face name for it" for layer, linear in lost]
    if problems:
        raise ConfigError(problems)
    return found


def _place(name: str, numbers: LayerNumbers) -> tuple[int, str] | None:
    """(layer, linear) of a weight's global name, which has the layer's place in a HybridModel's pattern."""
    parts = _WEIGHT.search(name)
    linear = name_at(parts[2]) if parts else None
    return None if parts is None or linear is None else (numbers.at(int(parts[1])), linear)


def _numbered(shape: LinearShape) -> torch.Tensor:
    """The numbers of this tensor-parallel rank's rows, float32."""
    if shape.out_features > _MOST_ROWS:
        raise ConfigError([f"model: a linear has {shape.out_features} rows; at most {_MOST_ROWS} can be numbered"])
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return shard(torch.arange(shape.out_features, dtype=torch.float32), "v", shape, rank, size)


def _is_rows(name: str, tensor: torch.Tensor, shape: LinearShape) -> bool:
    """Whether a Hugging Face weight consists of whole rows of Megatron's."""
    plain = name.endswith(".weight") and tensor.dim() == 2 and tensor.shape[1] == shape.in_features
    return plain and bool((tensor == tensor[:, :1]).all() and (tensor == tensor.round()).all())


def _write(
    folder: Path,
    config: TiedLoraConfig,
    state: Mapping[str, torch.Tensor],
    rows_of: Mapping[tuple[int, str], _Rows],
    base_model: str | None,
) -> None:
    modules = sorted({name for rows in rows_of.values() for name in rows})

    def write(new: Path) -> None:
        save_file(dict(_tensors(config, state, rows_of)), new / _STATE, metadata={"format": "pt"})
        written = _peft_config(config, modules, base_model)
        (new / _CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {_CONFIG, _STATE}):
        raise ConfigError([f"path={folder}: exists and is not an export; name another"])
    replace_folder(folder, write)


def _tensors(
    config: TiedLoraConfig, state: Mapping[str, torch.Tensor], rows_of: Mapping[tuple[int, str], _Rows]
) -> Iterator[tuple[str, torch.Tensor]]:
    for (layer, linear), rows in rows_of.items():
        lora = plain_lora(config, state, layer, linear)
        for name, numbers in rows.items():
            yield f"base_model.model.{name}.lora_A.weight", lora.lora_A.clone()
            yield f"base_model.model.{name}.lora_B.weight", lora.lora_B[numbers].contiguous()


def _peft_config(config: TiedLoraConfig, modules: list[str], base_model: str | None) -> dict[str, Any]:
    """adapter_config.json. The modules have their whole names, so no other linear of the model gets a LoRA."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": plain_alpha(config),
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
        "use_rslora": False,
    }
