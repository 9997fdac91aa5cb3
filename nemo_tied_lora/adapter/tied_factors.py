# SPDX-License-Identifier: Apache-2.0
"""The tensors of an adapter: tied A and B once per target, u and v (and untied A, B) once per layer.

They live in one module per model chunk, at `decoder.tied_lora`, under names that no parallel layout changes:

    decoder.tied_lora.linear_qkv.A              tied
    decoder.tied_lora.layers.7.linear_qkv.u     per layer, global layer number from 0
    decoder.tied_lora.experts.5.linear_fc1.A    of experts, see `experts`

The base's own modules register none of them, so base checkpoints keep their keys. A chunk holds the tied tensors
of every target, also of one that none of its own layers has: every stage must take part in their sums.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemo_tied_lora.adapter.experts import group_of, own_names, tied_name, tied_names
from nemo_tied_lora.adapter.shapes import TargetSpec, factor_shape, sharded_dim
from nemo_tied_lora.adapter.sharding import shard
from nemo_tied_lora.config import FACTORS, TiedLoraConfig

__all__ = [
    "ChunkFactors",
    "Factors",
    "frozen_parameters",
    "initial_tensor",
    "is_stored",
    "own_frozen",
    "share_frozen",
    "tied_factors",
]


def is_stored(factor: str, config: TiedLoraConfig) -> bool:
    """Whether the factor exists as a tensor at all: a frozen u or v is 1 and does not."""
    return factor in ("A", "B") or factor in config.trained


def tied_factors(config: TiedLoraConfig) -> tuple[str, ...]:
    """The factors that exist once per target."""
    return tuple(factor for factor in FACTORS if factor in config.tied)


class Factors(nn.Module):
    """Some of the four factors of one target: the tied ones, or one layer's own.

    Args:
        tensors: factor name ("A", "B", "u", "v") to this rank's part (see `sharding` for the shapes).
        trained: the factors that get gradients; the others are frozen parameters.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], trained: Sequence[str]):
        super().__init__()
        for factor, tensor in tensors.items():
            self.register_parameter(factor, nn.Parameter(tensor, requires_grad=factor in trained))

    def forward(self) -> None:
        """Computes nothing. What must have happened before parameters are read hangs on their module's forward."""


class ChunkFactors(nn.Module):
    """Every factor that one model chunk holds.

    Args:
        config: the adapter's configuration.
        specs: group (see `experts`; a target's name but for experts) to its whole shape and layers, the same on
            every rank.
        own_layers: group to the global layer numbers that lie in this chunk.
        tp_rank, tp_size: this rank's place in the tensor-parallel group.
        device, dtype: of the parameters.
        chunk_rank: this chunk's place among all chunks of all stages, 0 for the first: tied tensors are saved once.
    """

    def __init__(
        self,
        config: TiedLoraConfig,
        specs: Mapping[str, TargetSpec],
        own_layers: Mapping[str, Sequence[int]],
        *,
        tp_rank: int,
        tp_size: int,
        device: torch.device,
        dtype: torch.dtype,
        chunk_rank: int = 0,
    ):
        super().__init__()
        self._specs, self._chunk_rank, self._experts = dict(specs), chunk_rank, config.experts

        def build(name: str, factors: Sequence[str], layer: int | None) -> Factors:
            spec = specs[group_of(name)]
            tensors = {}
            for factor in factors:
                if not is_stored(factor, config):
                    continue
                full = initial_tensor(factor, name, layer, factor_shape(factor, spec, config.rank), config, device)
                tensors[factor] = shard(full, factor, spec, tp_rank, tp_size).to(device=device, dtype=dtype)
            return Factors(tensors, config.trained)

        tied = tied_factors(config)
        own = tuple(factor for factor in FACTORS if factor not in tied)
        for group, spec in specs.items():
            for name in tied_names(group, spec.num_experts, config.experts):
                _place(self, name, build(name, tied, None))
        self.layers = nn.ModuleDict()
        for layer in sorted({layer for layers in own_layers.values() for layer in layers}):
            self.layers[str(layer)] = nn.Module()
            for group, spec in specs.items():
                if layer in own_layers.get(group, ()):
                    for name in own_names(group, spec.num_experts):
                        _place(self.layers[str(layer)], name, build(name, own, layer))

    def forward(self) -> None:
        """Makes the parameters current: with `overlap_param_gather`, Megatron's DDP gathers what the optimizer of other
        ranks has stepped when the module that owns a parameter runs forward. All data-parallel ranks must call it.

        Called before the decoder runs, for linears read the factors without running these modules, and a chunk may
        hold tied tensors that none of its linears uses; and before the factors are compared or saved.
        """
        if any(hasattr(parameter, "main_grad") for parameter in self.parameters()):
            for module in self.modules():
                if isinstance(module, Factors):
                    module()

    def tied(self, name: str) -> Factors:
        """The tied factors that the linear of this name uses."""
        return self.get_submodule(tied_name(name, self._experts))  # type: ignore[return-value]

    def of_layer(self, layer: int, name: str) -> Factors:
        """One layer's own factors of the linear of this name."""
        return self.layers.get_submodule(f"{layer}.{name}")  # type: ignore[return-value]

    def named_tied(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(name, factor, parameter) of every tied tensor, in the same order on every rank."""
        for path, parameter in self.named_parameters():
            if not path.startswith("layers."):
                name, _, factor = path.rpartition(".")
                yield name, factor, parameter

    def named_own(self) -> Iterator[tuple[int, str, str, nn.Parameter]]:
        """(layer, name, factor, parameter) of every per-layer tensor of this chunk."""
        for path, parameter in self.layers.named_parameters():
            name, _, factor = path.rpartition(".")
            layer, _, name = name.partition(".")
            yield int(layer), name, factor, parameter

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """For megatron-core's dist_checkpointing: sharded tensors by their rule, tied ones once for all chunks.

        `replica_id` is (chunk for a tied tensor, tensor-parallel rank for a replicated one, data-parallel rank).
        """
        from megatron.core import parallel_state
        from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
        from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        dp_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        state: dict[str, Any] = {}
        tied = [(name, f"{name}.{factor}", factor, p, self._chunk_rank) for name, factor, p in self.named_tied()]
        own = [(name, f"layers.{layer}.{name}.{factor}", factor, p, 0) for layer, name, factor, p in self.named_own()]
        for name, path, factor, parameter, chunk in tied + own:
            spec, key = self._specs[group_of(name)], f"{prefix}{path}"
            dim = sharded_dim(factor, spec.kind)
            if dim is None:
                state[key] = make_sharded_tensor_for_checkpoint(parameter, key, replica_id=(chunk, tp_rank, dp_rank))
                continue
            shard_ = make_tp_sharded_tensor_for_checkpoint(parameter, key, dim, replica_id=(chunk, 0, dp_rank))
            gated = spec.blocks == 2 and factor in ("B", "v")
            state[key] = apply_swiglu_sharded_factory(shard_, ()) if gated else shard_
        return state


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Registers the module at a dotted path."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def initial_tensor(
    factor: str,
    target: str,
    layer: int | None,
    shape: tuple[int, ...],
    config: TiedLoraConfig,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The whole initial tensor, float32 on the CPU (empty on the meta device).

    Random values depend on the seed, the target, the factor and the layer (None where tied) and on nothing else:
    pipeline stages seed differently and ranks draw in different orders, yet every layout starts from the same bits.

    Returns:
        normal: N(0, init_std). xavier: normal with variance 2 / (fan_in + fan_out). kaiming: uniform within
        1 / sqrt(fan_in), LoRA's usual A. zero: zeros. A number: filled with it.
    """
    if device is not None and device.type == "meta":
        return torch.empty(shape, device=device)
    start = config.init_of(factor)
    tensor = torch.empty(shape, dtype=torch.float32)
    if not isinstance(start, str):
        return tensor.fill_(start)
    digest = hashlib.sha256(f"{config.seed}/{target}/{factor}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if start == "normal":
        return tensor.normal_(0.0, config.init_std, generator=generator)
    if start == "xavier":
        return nn.init.xavier_normal_(tensor, generator=generator)
    if start == "kaiming":
        return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    return tensor.zero_()


def share_frozen(factors: nn.Module, others: Iterable[nn.Module]) -> None:
    """Replaces each frozen parameter by that of another adapter of the same name, dtype, device, shape and bits.

    Args:
        factors: one model chunk's factors; its parameters are exchanged, never changed.
        others: the other adapters' factors for the same chunk.
    """
    known = [{path: parameter for path, _, _, parameter in frozen_parameters(other)} for other in others]
    for path, holder, name, parameter in frozen_parameters(factors):
        candidates = {id(frozen[path]): frozen[path] for frozen in known if path in frozen}
        for candidate in candidates.values():
            if _same_bits(parameter, candidate):
                candidate.is_shared_by_adapters = True  # type: ignore[attr-defined]
                setattr(holder, name, candidate)
                break


def own_frozen(factors: nn.Module) -> None:
    """Gives the adapter copies of what it shares, so that values may be loaded into it without changing others."""
    for _, holder, name, parameter in list(frozen_parameters(factors)):
        if getattr(parameter, "is_shared_by_adapters", False):
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            copy.__dict__.update(parameter.__dict__)
            copy.is_shared_by_adapters = False  # type: ignore[attr-defined]
            setattr(holder, name, copy)


def frozen_parameters(factors: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(whole name, the module that holds it, its name there, parameter) of every frozen one."""
    for prefix, holder in factors.named_modules():
        for name, parameter in list(holder.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                yield f"{prefix}.{name}", holder, name, parameter


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    alike = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    return alike and torch.equal(_bits(first), _bits(second))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes: 0.0 and -0.0 differ."""
    return tensor.detach().contiguous().view(torch.uint8)
