# SPDX-License-Identifier: Apache-2.0
"""Says that an adapter was trained on a base in another precision than the one it meets, and what this changes.

On a base that is not quantised, the logits of a few prompt tokens are computed twice with the adapter: as it is, and with
each linear's weight quantised and dequantised as in training, one at a time. A quantised base no longer has the weights
that the training saw. There `restored_base` has measured the difference of the weights before they were quantised.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_tied_lora.adapter.quantized.decoder_linears import DecoderLinear, find_decoder_linears
from nemo_tied_lora.adapter.quantized.kernels import dequantize, quantize, row_absmax
from nemo_tied_lora.adapter.quantized.quantize_base import base_precision
from nemo_tied_lora.adapter.target_modules import gpt_model
from nemo_tied_lora.nemo.generation import next_token_logits
from nemo_tied_lora.nemo.restored_base import kernel_options
from nemo_tied_lora.planning.nemo_model_config import recorded_precision
from nemo_tied_lora.planning.settings.base_quantization import KEY, BaseQuantization

__all__ = ["LogitsDifference", "as_if_quantised", "say_precision"]

_MOST_TOKENS = 32


@dataclass(frozen=True)
class LogitsDifference:
    """How far the logits of two models are apart."""

    positions: int
    largest_difference: float
    largest_logit: float
    """The largest absolute logit of the second model."""
    same_token: float
    """The share of positions with the same likeliest token."""

    @classmethod
    def between(cls, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> LogitsDifference:
        """Compares logits as `next_token_logits` returns them."""
        one, two = (torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in (first, second))
        return cls(
            positions=one.shape[0],
            largest_difference=float((one - two).abs().max()),
            largest_logit=float(two.abs().max()),
            same_token=float((one.argmax(1) == two.argmax(1)).double().mean()),
        )

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest_difference / self.largest_logit if self.largest_logit else self.largest_difference

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "relative": self.relative}

    def __str__(self) -> str:
        return (
            f"by up to {self.largest_difference:.3g} of {self.largest_logit:.3g} ({self.relative:.2%}), same likeliest "
            f"token in {self.same_token:.0%}"
        )


def say_precision(model: Any, path: str, prompt: Sequence[int]) -> None:
    """Prints one line on rank 0 if the adapter in `path`, which the model has, was trained on a base in another precision.

    All ranks call it. The dtypes of bases that are not quantised count as the same precision.

    Args:
        prompt: token ids; the first 32 of them are used, and those that have a row in the embedding.
    """
    recorded, here = recorded_precision(path), base_precision(model._unwrap_model_list())
    trained, now = BaseQuantization.from_precision(recorded), BaseQuantization.from_precision(here)
    if trained == now:
        return
    measured = _logits_change(model, trained, prompt) if now is None else _weights_change(model, recorded)
    if torch.distributed.get_rank() == 0:
        was = f"in {recorded}" if trained is not None else "that was not quantised"
        value = "null" if trained is None else trained.setting
        print(
            f"note: {path}: was trained on a base {was}, and meets one in {here}: {measured}; {KEY}={value} gives the base of "
            "its training",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def as_if_quantised(chunks: Sequence[Any], quantization: BaseQuantization) -> Iterator[None]:
    """Within it, each linear of the decoder multiplies by its weight quantised and dequantised, with the bits of a quantised
    base. One weight at a time exists twice. All ranks of a tensor-parallel group call it and run the model together.

    Args:
        chunks: this stage's modules, with or without an adapter, on a base that is not quantised.
    """
    options, handles = kernel_options(quantization), []
    originals: dict[Any, torch.Tensor] = {}

    def before(linear: DecoderLinear) -> Any:
        def hook(module: Any, *_: Any) -> None:
            originals[module] = weight = module.weight.data
            absmax = _whole_rows(linear, weight) if quantization.kind == "int8" else None
            module.weight.data = dequantize(quantize(weight, **options, absmax=absmax)).to(weight.dtype)

        return hook

    def after(module: Any, *_: Any) -> None:
        module.weight.data = originals.pop(module)

    try:
        for chunk in chunks:
            for linear in find_decoder_linears(chunk, gpt_model(chunk))[0]:
                handles.append(linear.module.register_forward_pre_hook(before(linear)))
                handles.append(linear.module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, weight in originals.items():  # of a forward pass that failed
            module.weight.data = weight


def _whole_rows(linear: DecoderLinear, weight: torch.Tensor) -> torch.Tensor:
    """The absmax of the rows of the whole weight, as `quantize_base` takes it."""
    absmax = row_absmax(weight)
    if linear.kind == "row" and parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_reduce(absmax, op=torch.distributed.ReduceOp.MAX, group=group)
    return absmax


def _logits_change(model: Any, trained: BaseQuantization | None, prompt: Sequence[int]) -> str:
    """What quantising the base as in training changes."""
    assert trained is not None
    chunks = model._unwrap_model_list()
    if not _fits(chunks, trained):
        return "not measured, because its linears cannot be held so on this layout"
    tokens = [[token for token in prompt if 0 <= token < model.padded_vocab_size][:_MOST_TOKENS] or [0]]
    plain = next_token_logits(model, tokens)
    with as_if_quantised(chunks, trained):
        difference = LogitsDifference.between(plain, next_token_logits(model, tokens))
    return f"logits of {difference.positions} prompt tokens differ {difference}"


def _fits(chunks: Sequence[Any], quantization: BaseQuantization) -> bool:
    """Whether all inputs are whole blocks, on every rank."""
    blocks = quantization.block_size if quantization.kind == "nf4" else 1
    widths = [
        linear.module.weight.shape[1]
        for chunk in chunks
        for linear in find_decoder_linears(chunk, gpt_model(chunk))[0]
    ]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, all(width % blocks == 0 for width in widths))
    return all(found)


def _weights_change(model: Any, recorded: str | None) -> str:
    """What was measured before the base was quantised."""
    measured: Mapping[str | None, float | None] = model.weight_differences
    share = measured.get(recorded)
    if share is None:
        return "how much this changes was not measured"
    return f"the weights of a layer differ by {share:.2%} (root mean square)"
