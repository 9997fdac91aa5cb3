# SPDX-License-Identifier: Apache-2.0
"""Composes the Hydra configuration of a command line, and reports all mistakes together, one line each."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.config_folder import config_folder

__all__ = ["compose_config", "parse_overrides", "plain"]


# These commands check the adapter's keys themselves, and tell what to write instead of an unknown one.
_READ_ADAPTER_KEYS = ("plan", "finetune")
_ADAPTER_KEYS = ("model.peft.tied_lora.", "model.peft.lora_tuning.")
# Hydra raises ValueError for a number in place of a group, and NeMo, once imported, makes `trainer` a group.
_NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError)


def compose_config(name: str, arguments: Sequence[str], config_dir: str | None = None) -> DictConfig:
    """Composes `configs/NAME.yaml` with the overrides.

    Raises:
        ConfigError: with every override that cannot be parsed or does not fit.
    """
    overrides, problems = parse_overrides(name, arguments)
    search = []
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError([*problems, f"--config-dir={config_dir}: no such folder; name one that holds YAMLs"])
        search = [f"hydra.searchpath=[{json.dumps(f'file://{folder}')}]"]
    with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        try:
            cfg = compose(name, [*search, *overrides])
        except _NOT_COMPOSED as error:
            alone = [problem for o in overrides for problem in _problem_alone(name, o, search)]
            raise ConfigError([*problems, *(alone or [_first_line(error)])]) from None
    problems.raise_if_any()
    return cfg


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Returns the configuration as plain values.

    Raises:
        ConfigError: an interpolation fails, or a required value (???) is missing.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([_first_line(error)]) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def parse_overrides(name: str, arguments: Sequence[str]) -> tuple[list[str], Problems]:
    """Returns (overrides for Hydra, problems). Lets unknown keys of adapters through: the command's own check explains them."""
    overrides, problems = [], Problems()
    for argument in arguments:
        try:
            parsed = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            problems.append(f"{argument!r}: not an override; write key=value ({_first_line(error)})")
            continue
        if parsed.is_sweep_override():
            problems.append(f"{argument!r}: a sweep; give one value, and run the command once for each")
        elif name in _READ_ADAPTER_KEYS and parsed.key_or_group.startswith(_ADAPTER_KEYS) and not parsed.is_delete():
            overrides.append(f"++{argument.lstrip('+')}")
        else:
            overrides.append(argument)
    return overrides, problems


def _problem_alone(name: str, override: str, search: Sequence[str]) -> Iterator[str]:
    """Yields the problem of one override, if it has one without the others."""
    try:
        compose(name, [*search, override])
    except _NOT_COMPOSED as error:
        key = override.split("=")[0].lstrip("+~")
        if "not in struct" in str(error.__cause__):
            close = difflib.get_close_matches(key, _known_keys(compose(name, list(search))), n=1)
            hint = f"did you mean {close[0]}?" if close else f"+{override} adds a key of your own"
            yield f"{override}: the configuration has no key {key}; {hint}"
        elif isinstance(error, MissingConfigException) and error.options:
            yield f"{override}: unknown; choose one of {', '.join(error.options)}"
        elif isinstance(error, ValueError) and "Config group override" in str(error):
            yield f"{override}: {key} is a section; set a key in it, {key}.KEY=value"
        else:
            yield f"{override}: {_first_line(error)}"


def _known_keys(cfg: Mapping[Any, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in cfg.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += _known_keys(value, f"{prefix}{key}.")
    return keys


def _first_line(error: Exception) -> str:
    return next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
