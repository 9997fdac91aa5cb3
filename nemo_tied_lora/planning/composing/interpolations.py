# SPDX-License-Identifier: Apache-2.0
"""Says in one line each why interpolations such as `${model.optim.lr}` cannot be resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException, UnsupportedInterpolationType

from nemo_tied_lora.planning.composing.dotted_keys import first_line, flat, has_key

__all__ = ["interpolation_problems"]


def interpolation_problems(cfg: DictConfig) -> Iterator[str]:
    """Yields a line for each cause: the first key whose value it spoils, the value as written, and what to write."""
    told: set[str] = set()
    for key, written in flat(OmegaConf.to_container(cfg, resolve=False)).items():  # type: ignore[arg-type]
        if "${" not in str(written):
            continue
        try:
            value = OmegaConf.select(cfg, key)
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            reason = _reason(cfg, error)
            if reason not in told:
                told.add(reason)
                yield f"{key}={written}: {reason}"


def _reason(cfg: DictConfig, error: OmegaConfBaseException) -> str:
    text = first_line(error)
    if isinstance(error, UnsupportedInterpolationType):
        kind = text.rpartition(" ")[2]
        fix = "write ${oc.env:NAME}" if kind == "env" else "write the value"
        return f"there is no resolver {kind}; {fix}"
    if "Environment variable" in text:
        name = re.findall(r"'([^']*)'", text)
        return f"the environment variable {name[0] if name else ''} is not set; export it, or write the value"
    missing = re.search(r"Interpolation key '([^']*)'", text)
    if isinstance(error, InterpolationKeyError) and missing:
        inner = missing[1].partition(".")[2]
        fix = f"write ${{{inner}}}" if inner and has_key(cfg, inner) else "write a key that it has, or the value"
        return f"the configuration has no key {missing[1]}; {fix}"
    return text
