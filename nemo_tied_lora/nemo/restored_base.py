# SPDX-License-Identifier: Apache-2.0
"""Restores a base on its layout and quantises it as `model.base_quantization` says, before an adapter is added."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_tied_lora.adapter.quantized.decoder_linears import find_decoder_linears
from nemo_tied_lora.adapter.quantized.kernels import dequantize, quantize
from nemo_tied_lora.adapter.quantized.quantize_base import QuantizedBase, leave_to_ranks, quantize_base
from nemo_tied_lora.adapter.quantized.quantized_weight import QuantizedWeight
from nemo_tied_lora.adapter.target_modules import gpt_model
from nemo_tied_lora.nemo.model import MegatronGPTTiedLoraModel
from nemo_tied_lora.nemo.process_groups import ensure_process_groups
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization
from nemo_tied_lora.platform import prepare

__all__ = ["dequantise", "kernel_options", "restore_base"]

_CODES = ("codes", "transposed")  # of a QuantizedWeight; all else are Megatron's attributes of a parameter


def restore_base(
    path: str, model_cfg: DictConfig, trainer: Trainer, *, trained_on: Collection[str | None] = ()
) -> MegatronGPTTiedLoraModel:
    """Restores the base's `.nemo`. All ranks call it.

    A base that is to be quantised is built and read on the CPU, also where there is a GPU. Then each linear goes to the GPU
    alone, its codes stay there, and its old weight is freed; what is not quantised follows at the end.

    Args:
        model_cfg: the whole configuration of the model; `base_quantization` decides.
        trained_on: the precisions that adapters record. Where the base is quantised, `model.weight_differences` says how far
            its weights are from each of them.

    Raises:
        ConfigError: on every rank, with what cannot be quantised.
    """
    setting: Any = model_cfg.get("base_quantization")
    setting = OmegaConf.to_container(setting) if OmegaConf.is_config(setting) else setting
    quantization = BaseQuantization.from_setting(setting)
    device = None if quantization is None else _gpu(trainer)
    if device is not None:
        with open_dict(model_cfg):
            model_cfg.use_cpu_initialization = True
    model = MegatronGPTTiedLoraModel.restore_from(path, model_cfg, trainer=trainer)
    ensure_process_groups(trainer)
    if quantization is not None:
        chunks = model._unwrap_model_list()
        others = {recorded: BaseQuantization.from_precision(recorded) for recorded in trained_on}
        model.weight_differences = {
            recorded: _weight_difference(chunks, quantization, other)
            for recorded, other in others.items()
            if other != quantization
        }
        model.quantized_base = _quantise(model, quantization, device)
    return model


def kernel_options(quantization: BaseQuantization) -> dict[str, Any]:
    """The arguments of `quantize_base` and of the kernels' `quantize`."""
    return {
        "kind": quantization.kind,
        "block_size": quantization.block_size,
        "double": quantization.double,
        "statistics": quantization.statistics,
    }


def dequantise(chunks: Sequence[Any]) -> None:
    """Gives the linears of a quantised base plain weights with the values that their codes stand for."""
    for chunk in chunks:
        for module in chunk.modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, QuantizedWeight):
                continue
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
            vars(module.weight).update({name: value for name, value in vars(weight).items() if name not in _CODES})


def _gpu(trainer: Trainer) -> torch.device | None:
    """This rank's GPU. None: there is none. NeMo selects it only for a model that is built on it."""
    if not prepare(nemo=True).gpu:
        return None
    torch.cuda.set_device(trainer.local_rank)
    return torch.device("cuda", trainer.local_rank)


def _quantise(model: Any, quantization: BaseQuantization, device: torch.device | None) -> QuantizedBase:
    chunks = model._unwrap_model_list()
    report = quantize_base(chunks, **kernel_options(quantization), device=device)
    leave_to_ranks(model)  # NeMo's O1 wraps the whole model in torch's DDP
    if device is not None:
        model.cuda()
        for chunk in chunks:  # from here on everything is built on the GPU, as NeMo does it without this flag
            gpt_model(chunk).config.use_cpu_initialization = False
        with open_dict(model.cfg):
            model.cfg.use_cpu_initialization = False
    return report


@torch.no_grad()
def _weight_difference(chunks: Sequence[Any], here: BaseQuantization, other: BaseQuantization | None) -> float | None:
    """The root mean square of the difference that two ways to hold the base make, as a share of the weights' own.

    Of the first layer of this rank's stage, before it is quantised. None: there is no layer, or its linears cannot be held
    so on this layout.
    """
    body = gpt_model(chunks[0])
    linears = [
        linear for linear in find_decoder_linears(chunks[0], body)[0] if linear.module in set(_first_layer(body))
    ]
    squares = difference = 0.0
    for linear in linears:
        weight = linear.module.weight.detach()
        blocks = [each.block_size for each in (here, other) if each is not None and each.kind == "nf4"]
        if any(weight.shape[1] % block for block in blocks):
            return None
        held = [
            weight if each is None else dequantize(quantize(weight, **kernel_options(each))).to(weight.dtype)
            for each in (here, other)
        ]
        squares += float(weight.double().square().sum())
        difference += float((held[0].double() - held[1].double()).square().sum())
    return (difference / squares) ** 0.5 if squares else None


def _first_layer(body: Any) -> list[Any]:
    return list(next(iter(body.decoder.layers)).modules()) if len(body.decoder.layers) else []
