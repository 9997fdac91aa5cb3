# SPDX-License-Identifier: Apache-2.0
"""The parameters of an adapter: tied A and B once per chunk, u and v (and untied A, B) once per layer.

They live in one module per model chunk, at `decoder.tied_lora`, under the names of `factor_names`, which are the same on
every parallel layout. The base's own modules do not register them, so base checkpoints keep their keys. A chunk holds
the tied tensors of every group, even if none of its layers has such a linear: every stage takes part in their sums.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemo_tied_lora.adapter.experts import own_names, tied_name, tied_names
from nemo_tied_lora.adapter.factor_names import FactorName
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.sharding import shard
from nemo_tied_lora.config import TiedLoraConfig

__all__ = [
    "ChunkFactors",
    "Factors",
    "initial_tensor",
    "own_frozen",
    "share_frozen",
]


class Factors(nn.Module):
    """Some of the four factors of one linear or group: the tied ones, or one layer's own.

    Args:
        tensors: factor ("A", "B", "u", "v") to this rank's part (local shapes as in `shapes`).
        trained: the factors that get gradients; the others are frozen parameters.
        prunes: whether a rank budget prunes entries of u; then `u_mask` (r,) says which entries stay. A buffer, because
            optimizers overwrite a parameter with their own copy; not in the state dict (see `rank_budget`).
    """

    u_mask: torch.Tensor | None
    pruned_return: bool = False
    """Whether pruned entries get a gradient, so that a later choice may take them back."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], trained: Sequence[str], *, prunes: bool = False):
        super().__init__()
        for factor, tensor in tensors.items():
            self.register_parameter(factor, nn.Parameter(tensor, requires_grad=factor in trained))
        u = tensors.get("u") if prunes else None
        self.register_buffer("u_mask", None if u is None else torch.ones_like(u, dtype=torch.bool), persistent=False)

    def masked_u(self) -> torch.Tensor | None:
        """u (r,) with 0 for the pruned entries; None without u.

        The gradient of a pruned entry is 0, or, if it may return, that of the entry if it were 0.
        """
        u: torch.Tensor | None = getattr(self, "u", None)
        if u is None or self.u_mask is None:
            return u
        return torch.where(self.u_mask, u, u - u.detach() if self.pruned_return else torch.zeros_like(u))

    def forward(self) -> None:
        """Computes nothing. Exists for the hooks that Megatron's DDP registers on the forward of modules."""


class ChunkFactors(nn.Module):
    """All factors that one model chunk holds.

    Args:
        config: the adapter's configuration.
        shapes: group (see `experts`) to its whole shape and layers, the same on every rank.
        own_layers: group to the global numbers of its layers in this chunk.
        tp_rank, tp_size: this rank's place in the tensor-parallel group.
        device, dtype: of the parameters.
        chunk_rank: this chunk's number among all chunks of all stages. Distributed checkpoints save the tied tensors
            of chunk 0.
    """

    def __init__(
        self,
        config: TiedLoraConfig,
        shapes: Mapping[str, LinearShape],
        own_layers: Mapping[str, Sequence[int]],
        *,
        tp_rank: int,
        tp_size: int,
        device: torch.device,
        dtype: torch.dtype,
        chunk_rank: int = 0,
    ):
        super().__init__()
        self._shapes, self._chunk_rank, self._experts = dict(shapes), chunk_rank, config.experts
        self._keeps_dtype = config.dtype is not None
        self.adapter_config = config
        self.merged = False
        """Whether the base's weights hold the update. `Adapter` sets it, also on a stage without a linear."""

        def build(layer: int | None, linear: str, shape: LinearShape) -> Factors:
            tensors = {}
            for factor in config.stored:
                if (factor in config.tied) == (layer is None):
                    name = FactorName(layer, linear, factor)
                    full = initial_tensor(name, shape.factor_shape(factor, config.rank), config, device)
                    tensors[factor] = shard(full, factor, shape, tp_rank, tp_size).to(device=device, dtype=dtype)
            return Factors(tensors, config.trained, prunes=config.budget is not None)

        for group, shape in shapes.items():
            for linear in tied_names(group, shape.num_experts, config.experts):
                _place(self, linear, build(None, linear, shape))
        self.layers = nn.ModuleDict()
        for layer in sorted({layer for layers in own_layers.values() for layer in layers}):
            self.layers[str(layer)] = nn.Module()
            for group, shape in shapes.items():
                if layer in own_layers.get(group, ()):
                    for linear in own_names(group, shape.num_experts):
                        _place(self.layers[str(layer)], linear, build(layer, linear, shape))

    def forward(self) -> None:
        """Makes the parameters current. All data-parallel ranks must call it.

        With `overlap_param_gather`, Megatron's DDP gathers the values that other ranks' optimizers have stepped when
        the module that owns a parameter runs forward. Linears read the factors without running these modules, and a
        chunk may hold tied tensors that none of its linears uses. So this runs before the decoder, and before the
        factors are compared or saved.
        """
        if any(hasattr(parameter, "main_grad") for parameter in self.parameters()):
            for module in self.modules():
                if isinstance(module, Factors):
                    module()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ChunkFactors:
        """Moves and casts the parameters like any module, but does not cast those of an adapter with a dtype of its own.

        Megatron's and NeMo's Float16Module cast the whole model that they wrap.
        """

        def keeping_dtype(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keeping_dtype if self._keeps_dtype else fn, recurse)

    def tied(self, name: str) -> Factors:
        """The tied factors that a linear uses."""
        return self.get_submodule(tied_name(name, self._experts))  # type: ignore[return-value]

    def of_layer(self, layer: int, name: str) -> Factors:
        """The factors that one linear of one layer has for itself."""
        return self.layers.get_submodule(f"{layer}.{name}")  # type: ignore[return-value]

    def named_factors(self) -> Iterator[tuple[FactorName, nn.Parameter]]:
        """Yields (name, parameter): the tied ones, in the same order on every rank, then the layers' own."""
        return ((FactorName.parse(path), parameter) for path, parameter in self.named_parameters())

    def tied_parameters(self) -> list[nn.Parameter]:
        """The trained tied tensors, in the same order on every rank."""
        return [p for name, p in self.named_factors() if name.layer is None and p.requires_grad]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The state for megatron-core's dist_checkpointing; a tied tensor is stored once for all chunks.

        `replica_id` is (chunk if the tensor is tied, else 0; tensor-parallel rank if it is replicated, else 0;
        data-parallel rank).
        """
        from megatron.core import parallel_state
        from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
        from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        dp_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        state: dict[str, Any] = {}
        for name, parameter in self.named_factors():
            shape, key, chunk = (
                self._shapes[name.group],
                f"{prefix}{name}",
                self._chunk_rank if name.layer is None else 0,
            )
            dim = shape.sharded_dim(name.factor)
            if dim is None:
                state[key] = make_sharded_tensor_for_checkpoint(parameter, key, replica_id=(chunk, tp_rank, dp_rank))
                continue
            part = make_tp_sharded_tensor_for_checkpoint(parameter, key, dim, replica_id=(chunk, 0, dp_rank))
            state[key] = apply_swiglu_sharded_factory(part, ()) if shape.blocks_of(name.factor) == 2 else part
        return state


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Registers a module at a dotted path."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def initial_tensor(
    name: FactorName, shape: tuple[int, ...], config: TiedLoraConfig, device: torch.device | None = None
) -> torch.Tensor:
    """The whole initial tensor, float32 on the CPU (empty on the meta device).

    Random values depend on the seed and the name alone. Pipeline stages seed differently, and ranks draw in different
    orders, but every layout starts from the same bits.

    Returns:
        By `config.init_of`. normal: N(0, init_std). xavier: normal with variance 2 / (fan_in + fan_out). kaiming:
        uniform within 1 / sqrt(fan_in), as LoRA's A usually is. zero: zeros. A number: filled with it.
    """
    if device is not None and device.type == "meta":
        return torch.empty(shape, device=device)
    start = config.init_of(name.factor)
    tensor = torch.empty(shape, dtype=torch.float32)
    if not isinstance(start, str):
        return tensor.fill_(start)
    digest = hashlib.sha256(f"{config.seed}/{name.linear}/{name.factor}/{name.layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if start == "normal":
        return tensor.normal_(0.0, config.init_std, generator=generator)
    if start == "xavier":
        return nn.init.xavier_normal_(tensor, generator=generator)
    if start == "kaiming":
        return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    return tensor.zero_()


def share_frozen(factors: nn.Module, others: Iterable[nn.Module]) -> None:
    """Replaces each frozen parameter by the identical one of another adapter: same name, dtype, device, shape and bits.

    Args:
        factors: one model chunk's factors. Parameters are replaced; their values do not change.
        others: the other adapters' factors for the same chunk.
    """
    known = [{path: parameter for path, _, _, parameter in _frozen_parameters(other)} for other in others]
    for path, holder, name, parameter in _frozen_parameters(factors):
        candidates = {id(frozen[path]): frozen[path] for frozen in known if path in frozen}
        for candidate in candidates.values():
            if _same_bits(parameter, candidate):
                candidate.is_shared_by_adapters = True  # type: ignore[attr-defined]
                setattr(holder, name, candidate)
                break


def own_frozen(factors: nn.Module) -> None:
    """Replaces shared frozen parameters by copies, so that loading values does not change other adapters."""
    for _, holder, name, parameter in list(_frozen_parameters(factors)):
        if getattr(parameter, "is_shared_by_adapters", False):
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            copy.__dict__.update(parameter.__dict__)
            copy.is_shared_by_adapters = False  # type: ignore[attr-defined]
            setattr(holder, name, copy)


def _frozen_parameters(factors: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yields (full name, module that holds it, name in that module, parameter) of every frozen parameter."""
    for prefix, holder in factors.named_modules():
        for name, parameter in list(holder.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                yield f"{prefix}.{name}", holder, name, parameter


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    comparable = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    return comparable and torch.equal(_bits(first), _bits(second))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as bytes, in which 0.0 and -0.0 differ."""
    return tensor.detach().contiguous().view(torch.uint8)
