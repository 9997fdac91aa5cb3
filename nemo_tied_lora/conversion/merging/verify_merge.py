# SPDX-License-Identifier: Apache-2.0
"""Compares the logits of a merged model with those of base + adapters on a few prompts, on any layout."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from omegaconf import DictConfig, open_dict

from nemo_tied_lora.checkpoint.save_load_on_any_layout import load_adapter
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import write_json
from nemo_tied_lora.nemo.base_precision_note import LogitsDifference
from nemo_tied_lora.nemo.generation import load_base, next_token_logits
from nemo_tied_lora.nemo.restored_base import dequantise
from nemo_tied_lora.planning.nemo_model_config import recorded_precision
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization

__all__ = ["compare_with_merged"]

# Share of the largest logit, by the dtype that merged weights are rounded to. The models compute in float32.
_TOLERANCES = {"torch.float32": 1e-4, "torch.float64": 1e-4, "torch.float16": 1e-2, "torch.bfloat16": 5e-2}
_RANDOM_PROMPTS, _RANDOM_LENGTH = 4, 32


def compare_with_merged(
    cfg: DictConfig, adapters: Sequence[tuple[str, float]], candidate: str, record: str, dtype: str
) -> None:
    """Compares the logits, writes `record` (JSON) and prints one line. All ranks call it.

    Args:
        cfg: base, prompts, trainer and model of the merge command.
        adapters: path and weight of each.
        candidate: the merged `.nemo`.
        dtype: the dtype of its weights in the file.

    Raises:
        ConfigError: the largest difference is more than the rounding of merged weights can explain.
    """
    model: Any = load_base(cfg)
    prompts = _prompts(cfg, model)
    plain = next_token_logits(model, prompts)
    _add_adapters(model, cfg, adapters)
    adapted = next_token_logits(model, prompts)
    del model
    gc.collect()
    merged_cfg = copy.deepcopy(cfg)
    merged_cfg.base = candidate
    model = load_base(merged_cfg)
    merged = next_token_logits(model, prompts)
    del model
    gc.collect()
    trained = _quantised_logits(cfg, adapters, prompts)
    problems: list[str] = []
    if torch.distributed.get_rank() == 0:
        facts = _compare(plain, adapted, merged, dtype)
        added = {
            precision: (LogitsDifference.between(merged, side), LogitsDifference.between(plain, bare))
            for precision, (bare, side) in trained.items()
        }
        facts["against_training"] = {
            precision: {**whole.as_dict(), "base_alone": alone.as_dict()}
            for precision, (whole, alone) in added.items()
        }
        write_json(Path(record), {**facts, "prompts": prompts, "adapters": [list(pair) for pair in adapters]})
        print(
            f"check: {facts['positions']} positions of {len(prompts)} prompts: logits differ from base + adapter by at most "
            f"{facts['largest_difference']:.3g} of {facts['largest_logit']:.3g} (tolerance {facts['tolerance']:.0e}); the "
            f"adapter changes them by up to {facts['adapters_effect']:.3g}; same likeliest token in {facts['same_token']:.1%}",
            flush=True,
        )
        for precision, (whole, alone) in added.items():
            print(
                f"note: trained on a base in {precision}: the merged model's logits differ from that base + adapter {whole}; "
                f"without the adapter, the base's differ from that base's {alone}",
                flush=True,
            )
        if not facts["relative"] <= facts["tolerance"]:
            problems.append(
                f"merged model: its logits differ from base + adapter by {facts['relative']:.2g}, relative"
            )
    shared = [problems]
    torch.distributed.broadcast_object_list(shared, src=0)
    if shared[0]:
        raise ConfigError(shared[0])


def _add_adapters(model: Any, cfg: DictConfig, adapters: Sequence[tuple[str, float]]) -> None:
    """Adds the adapters to the base. One adapter of weight 1 is injected; others are merged in memory, in float32."""
    chunks = model._unwrap_model_list()
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        load_adapter(chunks, adapters[0][0], allow_other_base=bool(cfg.allow_other_base))
        return
    for path, weight in adapters:
        # The merge has compared the bases already; here the first adapter has changed the weights.
        adapter = load_adapter(chunks, path, allow_other_base=True)
        state = adapter.full_state()
        adapter.load_full_state({name: t * weight if name.endswith(".B") else t for name, t in state.items()})
        adapter.merge()
        adapter.remove()


def _quantised_logits(
    cfg: DictConfig, adapters: Sequence[tuple[str, float]], prompts: Sequence[Sequence[int]]
) -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Precision to the logits of a base in it, without and with the adapters, for each quantised one that an adapter was
    trained on."""
    found = {}
    for precision in dict.fromkeys(recorded_precision(path) for path, _ in adapters):
        quantization = BaseQuantization.from_precision(precision)
        if quantization is None:
            continue
        quantised = copy.deepcopy(cfg)
        with open_dict(quantised):
            quantised.model.base_quantization = vars(quantization)
        model: Any = load_base(quantised)
        chunks = model._unwrap_model_list()
        bare = next_token_logits(model, prompts)
        if len(adapters) > 1 or adapters[0][1] != 1.0:
            dequantise(chunks)  # for `_add_adapters`, which merges them in memory
        _add_adapters(model, cfg, adapters)
        found[str(precision)] = bare, next_token_logits(model, prompts)
        del model, chunks
        gc.collect()
    return found


def _prompts(cfg: DictConfig, model: Any) -> list[list[int]]:
    if cfg.prompts is not None:
        return [model.tokenizer.text_to_ids(text) for text in cfg.prompts]
    generator = torch.Generator().manual_seed(1234)
    shape = (_RANDOM_PROMPTS, min(_RANDOM_LENGTH, model.cfg.encoder_seq_length))
    return torch.randint(0, model.tokenizer.vocab_size, shape, generator=generator).tolist()


def _compare(
    plain: Sequence[torch.Tensor], adapted: Sequence[torch.Tensor], merged: Sequence[torch.Tensor], dtype: str
) -> dict[str, Any]:
    """The comparison as plain values. NaN in any logit makes `relative` NaN, which fails every tolerance."""
    base, side, new = (
        torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in (plain, adapted, merged)
    )
    difference, largest = float((new - side).abs().max()), float(side.abs().max())
    return {
        "positions": side.shape[0],
        "largest_difference": difference,
        "largest_logit": largest,
        "relative": difference / largest if largest else difference,
        "tolerance": _TOLERANCES[dtype],
        "adapters_effect": float((side - base).abs().max()),
        "same_token": float((new.argmax(1) == side.argmax(1)).double().mean()),
        "dtype": dtype,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
    }
