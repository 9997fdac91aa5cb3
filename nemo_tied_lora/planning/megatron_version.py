# SPDX-License-Identifier: Apache-2.0
"""Where the releases of megatron-core that are tested, 0.13.1 and 0.16.1, differ for this package: here and nowhere else.

What is the same in both needs no mention: the flags on parameters (see `gradients`), `finalize_model_grads`,
`sharded_state_dict`, the linears' signatures, and the patches of `platform`, which take or leave upstream's arguments.
"""

from __future__ import annotations

from nemo_tied_lora.versions import installed_version

__all__ = ["counts_repeated_gradients", "megatron_version", "splits_query_groups"]

_FIRST_WITH_REPEATED_GRADIENTS = (0, 16)
_FIRST_THAT_SPLITS_QUERY_GROUPS = (0, 16)


def megatron_version() -> tuple[int, ...]:
    """(0, 13) of 0.13.1; (0, 0), the most cautious answer, where it is not installed. Megatron is not imported."""
    version = installed_version("megatron-core") or "0.0"
    return tuple(int(part) for part in version.split(".")[:2])


def counts_repeated_gradients(release: tuple[int, ...] | None = None) -> bool:
    """Whether DDP with `overlap_grad_reduce` waits for all parts of a gradient that comes in several.

    Before 0.16 it takes the first part for the whole, and asserts "Cannot set grad twice" at the second. From 0.16 on it
    counts in the first step how many there are. release: None, the installed one.
    """
    return (release or megatron_version()) >= _FIRST_WITH_REPEATED_GRADIENTS


def splits_query_groups(release: tuple[int, ...] | None = None) -> bool:
    """Whether there may be fewer query groups than tensor-parallel ranks, where they divide the ranks.

    0.16 splits the rows of linear_qkv evenly all the same, and gathers its output to find a rank's heads in it; 0.13 refuses.
    An adapter's B and v are split as these rows. NeMo 2.4 comes with 0.13, and `layout.check` refuses with it.
    release: None, the installed one.
    """
    return (release or megatron_version()) >= _FIRST_THAT_SPLITS_QUERY_GROUPS
