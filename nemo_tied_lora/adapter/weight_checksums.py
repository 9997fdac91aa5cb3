# SPDX-License-Identifier: Apache-2.0
"""Computes a fingerprint of a base's weights that is exactly the same on every parallel layout.

The checksum of a weight is

    sum over its elements of  bits(element) * m0(layer) * m1(row) * m2(column) * ...   modulo 2^64

`bits` are the bits of the element rounded to bfloat16, as an integer. The m are odd pseudorandom numbers that depend on
the element's place in the whole weight. Integer sums do not depend on their order, so each rank sums its own shards and
one all-reduce adds the ranks; replicas are counted once. Because the factors are odd, every single changed element
changes the sum. Because of the rounding, a float32 base and the same base loaded as bfloat16 agree; a base that was
once rounded to float16 may not. Rows that padding adds to an embedding are zeros and add nothing.

Every element is read: on a GPU at the speed of its memory, on a CPU core at about 0.1 billion elements per second.

A quantised weight counts with the checksum that `keep_checksums` has taken before: the fingerprint is that of the base's
file, whatever its linears are held in.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from nemo_tied_lora.adapter.layer_numbers import LayerNumbers
from nemo_tied_lora.adapter.splitmix64 import GOLDEN_GAMMA, as_int64, mix_
from nemo_tied_lora.platform.devices import collective_device

__all__ = ["WeightChecksums", "fingerprint_model", "keep_checksums"]


_KEPT = "checksums_before_quantising"  # the attribute of a GPTModel
_SLAB = 1 << 20  # elements at a time; each takes eight bytes while it is multiplied
_LAYER = re.compile(r"(?<=\blayers\.)(\d+)\.")
_MASK = (1 << 64) - 1


def fingerprint_model(chunks: Sequence[Any], vocab_rows: int | None = None) -> dict[str, Any]:
    """Returns the fingerprint of the base weights of a whole model, the same on all ranks. All ranks must call it.

    Args:
        chunks: a stage's GPTModels or HybridModels. The adapter's tensors do not count. Of replicas, Megatron's main
            replica counts.
        vocab_rows: rows of the embedding and output layer that the tokenizer uses. None: all.
    """
    checksums = WeightChecksums()
    for chunk in chunks:
        for key, tensor, offset, padded in _own_shards(chunk):
            if padded and vocab_rows is not None:
                tensor = tensor[: max(0, vocab_rows - offset[0])]
            checksums.add(key, tensor, offset)
        checksums.include(getattr(chunk, _KEPT, {}))
    checksums.sum_over_ranks()
    return checksums.as_dict(vocab_rows)


def keep_checksums(chunk: Any, weights: Collection[torch.Tensor]) -> None:
    """Keeps the checksums of this rank's shards of some weights, which will be quantised, for `fingerprint_model`.

    Args:
        chunk: a GPTModel.
        weights: parameters of it.
    """
    places, checksums = {weight.data_ptr() for weight in weights}, WeightChecksums()
    for key, tensor, offset, _ in _own_shards(chunk, lambda shard: shard.data_ptr() in places):
        checksums.add(key, tensor, offset)
    setattr(chunk, _KEPT, checksums.sums)


class WeightChecksums:
    """Sums the checksums of weights, piece by piece, in any order."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}

    def add(self, key: str, tensor: torch.Tensor, offset: Sequence[int]) -> None:
        """Adds one piece.

        Args:
            key: the weight's name in a distributed checkpoint. A layer's number in it becomes the first coordinate.
            tensor: the piece.
            offset: the place of its first element in the whole weight, one number per dim of the weight. The weight has
                more dims than `tensor` if its first dims count layers or experts.
        """
        key = re.sub(r"^(module\.|model\.)*", "", key)
        numbered = _LAYER.search(key)
        if numbered:
            key, offset = _LAYER.sub("", key, count=1), (int(numbered[1]), *offset)
        shape = (1,) * (len(offset) - tensor.ndim) + tuple(tensor.shape)
        total = _checksum(tensor.detach().reshape(shape), offset) if tensor.numel() else 0
        self.include({key: total})

    @property
    def sums(self) -> dict[str, int]:
        """Weight to checksum, so far."""
        return dict(self._sums)

    def include(self, sums: Mapping[str, int]) -> None:
        """Adds checksums of other pieces."""
        for key, value in sums.items():
            self._sums[key] = (self._sums.get(key, 0) + value) & _MASK

    def sum_over_ranks(self) -> None:
        """Sums over all ranks of the job."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return
        known: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(known, sorted(self._sums))
        keys = sorted({key for rank in known for key in rank})
        values = torch.tensor([as_int64(self._sums.get(key, 0)) for key in keys], dtype=torch.int64)
        values = values.to(collective_device())
        torch.distributed.all_reduce(values)
        self._sums = {key: value & _MASK for key, value in zip(keys, values.tolist(), strict=True)}

    def as_dict(self, vocab_rows: int | None = None) -> dict[str, Any]:
        """The fingerprint: one `value` for all weights, and one checksum per kind of weight, to name what differs."""
        weights = {key: f"{value:016x}" for key, value in sorted(self._sums.items())}
        value = hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:32]
        return {"value": value, "vocab_rows": vocab_rows, "weights": weights}


def _is_whole(tensor: torch.Tensor) -> bool:
    return not hasattr(tensor, "codes")  # those of a QuantizedWeight, whose module needs this one


def _own_shards(
    chunk: Any, counts: Callable[[torch.Tensor], bool] = _is_whole
) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...], bool]]:
    """Yields (key, tensor, offset in the whole weight, whether its rows may be padded) of the shards this rank counts.

    Megatron's description for distributed checkpoints gives the place of each shard; gate and up are separate there.
    A paired HybridModel has the keys of the GPTModel with its weights (see `layer_numbers`).

    Args:
        counts: whether a parameter counts.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    numbers = LayerNumbers.of(chunk)
    state = chunk.sharded_state_dict(prefix="")
    state = {key: value for key, value in state.items() if ".tied_lora." not in f".{key}"}
    state = {
        key: value for key, value in state.items() if (data := getattr(value, "data", None)) is None or counts(data)
    }
    apply_factories(state)
    for value in _leaves(state):
        if not isinstance(value, ShardedTensor) or not is_main_replica(value.replica_id):
            continue
        if value.data is not None and value.data.is_floating_point() and not value.data.is_meta:
            yield numbers.key(value.key), value.data, tuple(value.global_offset), bool(value.allow_shape_mismatch)


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, Mapping):
        for value in state.values():
            yield from _leaves(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _leaves(value)
    else:
        yield state


@torch.no_grad()
def _checksum(tensor: torch.Tensor, offset: Sequence[int]) -> int:
    """The sum of the module's formula over one piece, in 0 .. 2^64 - 1."""
    factors = [
        _multipliers(dim, start, size, tensor.device)
        for dim, (start, size) in enumerate(zip(offset, tensor.shape, strict=True))
    ]
    lead = torch.ones(1, dtype=torch.int64, device=tensor.device)
    for factor in factors[:-1]:
        lead = (lead.unsqueeze(1) * factor).reshape(-1)
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, _SLAB // rows.shape[1])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, rows.shape[0], step):
        bits = rows[start : start + step].to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int64)
        total += (bits.mul_(factors[-1]).sum(1) * lead[start : start + step]).sum()
    return int(total.item()) & _MASK


@functools.lru_cache(maxsize=64)
def _multipliers(dim: int, start: int, size: int, device: torch.device) -> torch.Tensor:
    """(size,) int64: one odd pseudorandom number per place along a dim."""
    seed = as_int64(0xD1B54A32D192ED03 * (dim + 1) & _MASK)
    places = torch.arange(start + 1, start + size + 1, dtype=torch.int64)
    return (mix_(places * GOLDEN_GAMMA + seed) | 1).to(device)
