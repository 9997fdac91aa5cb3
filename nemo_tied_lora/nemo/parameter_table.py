# SPDX-License-Identifier: Apache-2.0
"""Makes the table of trained parameters that a run prints."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.param_count import parameter_counts
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.platform.devices import collective_device
from nemo_tied_lora.tables import text_table

__all__ = ["base_parameter_count", "lora_counts", "parameter_table"]


def parameter_table(adapter: Adapter, base: int) -> str:
    """Trained parameters per target and in total, with their share of the base and of LoRA at the same rank."""
    ours, lora = adapter.num_parameters(), lora_counts(adapter)
    rows = [("target", "layers", "trained", "LoRA's", "of LoRA")]
    for target, count in ours.items():
        layers = str(len(adapter.shapes[target].layers))
        rows.append((target, layers, f"{count:,}", f"{lora[target]:,}", f"{count / lora[target]:.2%}"))
    total, whole = sum(ours.values()), sum(lora.values())
    rows.append(("total", "", f"{total:,}", f"{whole:,}", f"{total / whole:.2%}"))
    config = adapter.config
    title = (
        f"Tied-LoRA rank {config.rank}: trained {' '.join(config.trained)}, tied {' '.join(config.tied) or 'nothing'}"
    )
    share = f"{total / base:.4%} of the base's {base:,} parameters"
    return "\n".join([title, text_table(rows, total=True), share])


def base_parameter_count(model: Any) -> int:
    """The number of the base's parameters over all ranks. Counts shared and replicated ones once."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    modules = model.model if isinstance(model.model, list) else [model.model]
    counted = [
        parameter.numel()
        for module in modules
        for name, parameter in module.named_parameters()
        if "tied_lora" not in name
        and not getattr(parameter, "shared", False)
        and (getattr(parameter, "tensor_model_parallel", False) or first)
    ]
    total = torch.tensor(float(sum(counted)), dtype=torch.float64, device=collective_device())
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total.item())


def lora_counts(adapter: Adapter) -> dict[str, int]:
    """Group to the parameters that LoRA of the adapter's rank would train."""
    lora = TiedLoraConfig.preset("lora", rank=adapter.config.rank, targets=adapter.config.targets)
    return parameter_counts(adapter.shapes, lora)
