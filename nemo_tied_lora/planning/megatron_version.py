# SPDX-License-Identifier: Apache-2.0
"""Lists the differences between the tested releases of megatron-core that matter to this package: 0.13.1, 0.16.1, 0.19.2.

No other module compares versions. The releases agree on the flags on parameters (see `adapter.grad_allreduce`),
`finalize_model_grads`, `sharded_state_dict` and the signatures of linears. The patches in `platform` accept all three; 0.19
adds streams in every sum of DDP. For this package 0.19 has the abilities of 0.16.
"""

from __future__ import annotations

from nemo_tied_lora.planning.versions import installed_version

__all__ = ["counts_repeated_gradients", "megatron_version", "splits_query_groups"]

_FIRST_WITH_REPEATED_GRADIENTS = (0, 16)
_FIRST_THAT_SPLITS_QUERY_GROUPS = (0, 16)


def megatron_version() -> tuple[int, ...]:
    """Returns the installed release, (0, 13) for 0.13.1, without importing Megatron. Not installed: (0, 0), the most cautious."""
    version = installed_version("megatron-core") or "0.0"
    return tuple(int(part) for part in version.split(".")[:2])


def counts_repeated_gradients(release: tuple[int, ...] | None = None) -> bool:
    """Whether DDP with `overlap_grad_reduce` waits for all parts of a gradient that arrives in several.

    Before 0.16 it takes the first part for the whole gradient, and asserts "Cannot set grad twice" at the second. From
    0.16 on it counts the parts in the first step.

    Args:
        release: None: the installed one.
    """
    return (release or megatron_version()) >= _FIRST_WITH_REPEATED_GRADIENTS


def splits_query_groups(release: tuple[int, ...] | None = None) -> bool:
    """Whether there may be fewer query groups than tensor-parallel ranks, if their number divides the ranks.

    0.16 still splits the rows of linear_qkv evenly, and gathers the output to find a rank's heads in it. 0.13 refuses.
    An adapter's B and v are split like these rows. NeMo 2.4 needs 0.13, so `parallel_layout.check` always refuses.

    Args:
        release: None: the installed one.
    """
    return (release or megatron_version()) >= _FIRST_THAT_SPLITS_QUERY_GROUPS
