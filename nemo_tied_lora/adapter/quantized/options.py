# SPDX-License-Identifier: Apache-2.0
"""The options of a quantised base, and what is wrong with them: one text for the library and for `model.base_quantization`.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from nemo_tied_lora.errors import Problems, is_whole_number

__all__ = ["BLOCK_SIZES", "DEFAULTS", "KINDS", "STATISTICS", "fitting_blocks", "option_problems"]

KINDS = ("nf4", "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Of nf4: those of bitsandbytes."""
STATISTICS = ("bfloat16", "float32")
"""The dtypes in which nf4 can keep the absmax of its blocks."""
DEFAULTS: dict[str, object] = {"block_size": 64, "statistics": "bfloat16", "double": False}
"""Of the options that only nf4 has."""


def option_problems(kind: object, *, prefix: str = "", **options: object) -> Problems:
    """One line per wrong option.

    Args:
        prefix: of the names in the lines, such as "model.base_quantization.".
        options: block_size, statistics and double. Those of int8 must be the defaults, because int8 has none of them.
    """
    problems = Problems()
    problems.one_of(f"{prefix}kind", kind, KINDS)
    if kind == "int8":
        problems += [
            f"{prefix}{name}={options[name]}: only nf4 has it; leave it out, or choose kind nf4"
            for name, default in DEFAULTS.items()
            if options[name] != default or type(options[name]) is not type(default)
        ]
        return problems
    block_size, statistics, double = (options[name] for name in DEFAULTS)
    if not is_whole_number(block_size) or block_size not in BLOCK_SIZES:  # 64.0 is in it
        problems.append(
            f"{prefix}block_size={block_size!r}: unknown; choose one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    problems.one_of(f"{prefix}statistics", statistics, STATISTICS)
    if not isinstance(double, bool):
        problems.append(f"{prefix}double={double!r}: must be true or false")
    elif double and statistics == "float32":
        problems.append(f"{prefix}statistics=float32: double=true quantises the statistics; leave one of them out")
    return problems


def fitting_blocks(widths: Iterable[int]) -> list[int]:
    """The block sizes of which every number of in-features is a multiple."""
    widths = list(widths)
    return [size for size in BLOCK_SIZES if all(width % size == 0 for width in widths)]
