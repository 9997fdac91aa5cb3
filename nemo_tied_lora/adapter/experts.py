# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: the names of experts' linears, what experts share, and which layouts are refused.

Linears that may share A and B form a group. The MLP of dense layers, the routed experts and the shared experts are
three groups, for linear_fc1 and for linear_fc2, even if their shapes agree: they do different work.

=========================  =============================================  ================================
group                      linears in each layer                          names of the linears
=========================  =============================================  ================================
linear_qkv, linear_fc1     attention; the MLP of a dense layer            same as the group
experts.linear_fc1         mlp.experts.local_experts.5.linear_fc1, E      experts.5.linear_fc1
shared_experts.linear_fc1  mlp.shared_experts.linear_fc1                  same as the group
=========================  =============================================  ================================

Experts are numbered globally from 0. u and v, and an A or B that is not tied, belong to one layer and one expert:
`layers.3.experts.5.linear_fc1.u`. A tied A or B of experts is

==============  ===================================  ============================  ==========================
`experts`       shared by                            name                          elements of A, B, u, v
==============  ===================================  ============================  ==========================
per_expert      one expert's linears in all layers   experts.5.linear_fc1.A        E r (in + out) + L E (r + out)
tied            all experts' linears in all layers   experts.linear_fc1.A          r (in + out) + L E (r + out)
==============  ===================================  ============================  ==========================

with E experts, L layers that have experts, rank r. The router is not a target.

Imports neither torch nor Megatron.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = [
    "group_of",
    "groups_of",
    "is_routed",
    "linear_of",
    "name_at",
    "own_names",
    "refused_layouts",
    "tied_name",
    "tied_names",
]

_ROUTED, _SHARED = "experts.", "shared_experts."
_MLP = ("linear_fc1", "linear_fc2")
_ONE_EXPERT = re.compile(r"^experts\.\d+\.")


def linear_of(name: str) -> str:
    """The target in the name of a group or a linear: "linear_fc1" in "experts.5.linear_fc1"."""
    return name.rpartition(".")[2]


def group_of(name: str) -> str:
    """The group of a linear, by its name: "experts.linear_fc1" for "experts.5.linear_fc1"."""
    return _ONE_EXPERT.sub(_ROUTED, name)


def groups_of(target: str) -> tuple[str, ...]:
    """The groups that a target selects, in the order of the file. A model may lack some of them."""
    return (target, _ROUTED + target, _SHARED + target) if target in _MLP else (target,)


def is_routed(name: str) -> bool:
    """Returns whether a router and a dispatcher send tokens to the linear."""
    return name.startswith(_ROUTED)


def own_names(group: str, num_experts: int) -> tuple[str, ...]:
    """The names of the group's linears in one layer."""
    if not is_routed(group):
        return (group,)
    return tuple(f"{_ROUTED}{expert}.{linear_of(group)}" for expert in range(num_experts))


def tied_name(name: str, experts: str) -> str:
    """The name under which the linear's tied A and B are stored. experts: the field of `TiedLoraConfig`."""
    return group_of(name) if experts == "tied" else name


def tied_names(group: str, num_experts: int, experts: str) -> tuple[str, ...]:
    """All names under which the group's tied tensors are stored."""
    return tuple(dict.fromkeys(tied_name(name, experts) for name in own_names(group, num_experts)))


def name_at(path: str) -> str | None:
    """The name of the linear at a module's path within a layer; None for experts that are not `local_experts`.

    "self_attention.linear_qkv" gives "linear_qkv"; "mlp.experts.local_experts.5.linear_fc1" gives
    "experts.5.linear_fc1".
    """
    *parents, linear = path.split(".")
    if "experts" in parents:
        routed = re.search(r"(?:^|\.)experts\.local_experts\.(\d+)\.[^.]+$", path)
        return f"{_ROUTED}{int(routed[1])}.{linear}" if routed else None
    return _SHARED + linear if "shared_experts" in parents else linear


def refused_layouts(config: Any, groups: Iterable[str], *, tp_size: int, ep_size: int, etp_size: int) -> Iterator[str]:
    """Yields one line per reason why the experts' linears cannot be adapted.

    Args:
        config: the Megatron model's.
        groups: the groups that the adapter would use.
        tp_size, ep_size, etp_size: tensor, expert and expert tensor parallel sizes.
    """
    groups = list(groups)
    drop = "or leave linear_fc1 and linear_fc2 out of targets"
    if any(group.startswith(_SHARED) for group in groups) and getattr(config, "moe_shared_expert_overlap", False):
        yield f"moe_shared_expert_overlap=True: shared experts cannot be adapted in it; set it to False, {drop}"
    if not any(is_routed(group) for group in groups):
        return
    if ep_size > 1:
        yield (
            f"expert_model_parallel_size={ep_size}: experts on different ranks cannot be adapted yet; "
            f"set it to 1, {drop}"
        )
    if etp_size != tp_size:
        yield (
            f"expert_tensor_parallel_size={etp_size}: experts must be split like the rest of the model; set it to "
            f"{tp_size}, the tensor_model_parallel_size, {drop}"
        )
    if tp_size > 1 and not config.sequence_parallel:
        yield (
            f"sequence_parallel=False with tensor_model_parallel_size={tp_size}: every rank would send the same "
            f"tokens to the experts, whose gradients would be {tp_size} times too large; set it to True, {drop}"
        )
    if config.moe_token_dispatcher_type not in ("allgather", "alltoall"):
        yield (
            f"moe_token_dispatcher_type={config.moe_token_dispatcher_type!r}: not tested with an adapter; "
            f"set it to 'alltoall' or 'allgather', {drop}"
        )
