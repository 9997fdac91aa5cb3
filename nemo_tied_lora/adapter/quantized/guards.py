# SPDX-License-Identifier: Apache-2.0
"""Names what `quantize_base` cannot do on a device or a layout, and refuses to load weights over codes, a line each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nemo_tied_lora.adapter.quantized.options import fitting_blocks
from nemo_tied_lora.adapter.quantized.quantized_weight import QuantizedWeight

__all__ = ["device_problems", "refuse_loading", "width_problems"]

_KEEP = "leave it out, and the codes stay where the weights are"


def device_problems(device: object) -> Iterator[str]:
    """Yields a line if no codes can be put on the device. None, the weights' own device, has no problems."""
    if device is None:
        return
    try:
        place = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        yield f"device={str(device)!r}: torch has no such device; write 'cpu', 'cuda' or 'cuda:1', or {_KEEP}"
        return
    if place.type == "meta":
        yield f"device='meta': it holds no numbers, so no codes either; {_KEEP}"
        return
    try:
        torch.empty(1, device=place)
    except Exception as error:  # each backend has its own
        reason = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
        yield f"device={str(device)!r}: torch cannot use it on this machine ({reason}); {_KEEP}"


def width_problems(widths: Collection[tuple[str, int, bool]], block_size: int, tp_size: int) -> Iterator[str]:
    """Yields one line per kind of linear whose in-features on a rank are not whole blocks. It names what fits all kinds.

    Args:
        widths: (kind of linear, in-features on a rank, whether these are the whole ones divided by the tensor-parallel size).
        block_size: of nf4.
        tp_size: the tensor-parallel size of the model. The sizes that are named divide it, so the model allows them.
    """
    blocks = fitting_blocks(width for _, width, _ in widths)
    sizes = [
        size
        for size in range(1, tp_size)
        if tp_size % size == 0
        and all((width * tp_size // size if split else width) % block_size == 0 for _, width, split in widths)
    ]
    remedies = [f"block_size={_either(blocks)}"] if blocks else []
    remedies += [f"tensor_model_parallel_size={_either(sizes)}"] if sizes else []
    remedy = ", or ".join([*remedies, "kind='int8'"])
    for group, width, _ in sorted(widths):
        if width % block_size:
            yield (
                f"{group}: its {width} in-features on a rank (tensor_model_parallel_size={tp_size}) are not a multiple of "
                f"block_size={block_size}, so a block would cross rows or ranks; use {remedy}"
            )


def refuse_loading(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """A hook before `load_state_dict` of a quantised model. Weights of other modules may be loaded.

    Raises:
        RuntimeError: the state has a weight whose place is taken by codes. Nothing is loaded.
    """
    codes = [name for name, weight in model.named_parameters() if isinstance(weight, QuantizedWeight)]
    meant = [name for name in codes if f"{prefix}{name}" in state]
    if meant:
        raise RuntimeError(
            f"load_state_dict: {len(meant)} of these weights are codes in this model, which cannot be written over (the first "
            f"is {meant[0]}); load the base's weights into a model that is not quantised, then call quantize_base; an adapter "
            "has load_full_state"
        )


def _either(numbers: list[int]) -> str:
    *front, last = map(str, numbers)
    return f"{', '.join(front)} or {last}" if front else last
