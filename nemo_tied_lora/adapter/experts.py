# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts models: what experts' linears are called, what they share, and which layouts are refused.

Linears that may share A and B form a group. A dense layer's MLP, the routed experts and the shared experts are three
groups each for linear_fc1 and linear_fc2, also where their shapes agree: they do different work.

=========================  =============================================  ================================
group                      linears, in each layer                         linears' names
=========================  =============================================  ================================
linear_qkv, linear_fc1     attention; the MLP of a dense layer            the group's
experts.linear_fc1         mlp.experts.local_experts.5.linear_fc1, E      experts.5.linear_fc1
shared_experts.linear_fc1  mlp.shared_experts.linear_fc1                  the group's
=========================  =============================================  ================================

Experts are numbered globally from 0. u and v, and an A or B that is not tied, belong to one layer and one expert:
`layers.3.experts.5.linear_fc1.u`. A tied A or B of experts is

==============  ===================================  ============================  ==========================
`experts`       shared by                            name                          elements of A, B, u, v
==============  ===================================  ============================  ==========================
per_expert      one expert's linears in all layers   experts.5.linear_fc1.A        E r (in + out) + L E (r + out)
tied            all experts' linears in all layers   experts.linear_fc1.A          r (in + out) + L E (r + out)
==============  ===================================  ============================  ==========================

with E experts, L layers that have them, rank r. The router is no target.

This module needs neither torch nor Megatron.
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
    """ "linear_fc1" of a group's or a linear's name."""
    return name.rpartition(".")[2]


def group_of(name: str) -> str:
    """The group of a linear's name, or of a tied tensor's holder: "experts.linear_fc1" of "experts.5.linear_fc1"."""
    return _ONE_EXPERT.sub(_ROUTED, name)


def groups_of(target: str) -> tuple[str, ...]:
    """The groups that a configuration's target selects, where a model has them, in the order of the file."""
    return (target, _ROUTED + target, _SHARED + target) if target in _MLP else (target,)


def is_routed(name: str) -> bool:
    """Whether tokens reach the linear through a router and a dispatcher."""
    return name.startswith(_ROUTED)


def own_names(group: str, num_experts: int) -> tuple[str, ...]:
    """The names of the group's linears in a layer that has them."""
    if not is_routed(group):
        return (group,)
    return tuple(f"{_ROUTED}{expert}.{linear_of(group)}" for expert in range(num_experts))


def tied_name(name: str, experts: str) -> str:
    """Whose tied A and B the linear uses; experts: the configuration's field."""
    return group_of(name) if experts == "tied" else name


def tied_names(group: str, num_experts: int, experts: str) -> tuple[str, ...]:
    """Every holder of tied tensors in the group."""
    return tuple(dict.fromkeys(tied_name(name, experts) for name in own_names(group, num_experts)))


def name_at(path: str) -> str | None:
    """The linear's name, from a module's path within a layer; None for one in experts of another make.

    "self_attention.linear_qkv" gives "linear_qkv", "mlp.experts.local_experts.5.linear_fc1" "experts.5.linear_fc1".
    """
    *parents, linear = path.split(".")
    if "experts" in parents:
        routed = re.search(r"(?:^|\.)experts\.local_experts\.(\d+)\.[^.]+$", path)
        return f"{_ROUTED}{int(routed[1])}.{linear}" if routed else None
    return _SHARED + linear if "shared_experts" in parents else linear


def refused_layouts(config: Any, groups: Iterable[str], *, tp_size: int, ep_size: int, etp_size: int) -> Iterator[str]:
    """What keeps experts' linears from being adapted, a line each.

    Args:
        config: of the Megatron model.
        groups: those that the adapter would use.
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
            f"expert_model_parallel_size={ep_size}: experts that lie on different ranks cannot be adapted yet; "
            f"set it to 1, {drop}"
        )
    if etp_size != tp_size:
        yield (
            f"expert_tensor_parallel_size={etp_size}: experts must be split as the rest of the model is; set it to "
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
