# SPDX-License-Identifier: Apache-2.0
"""Reads a YAML that a user keeps for NeMo's scripts, with its defaults list, as values to put over the shipped ones."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.dotted_keys import first_line, flat
from nemo_tied_lora.planning.composing.yaml_sources import YamlSources
from nemo_tied_lora.planning.config_folder import config_folder

__all__ = ["OwnYaml", "read_own_yaml"]

_MISSING = "???"
# NeMo's schemes whose YAML is taken for tied_lora: its default, and the nearest relative.
_TAKEN_SCHEMES = ("adapter", "lora")
_LORA, _TIED = "lora_tuning", "tied_lora"


@dataclass
class OwnYaml:
    """The user's values, with interpolations unresolved, and what to tell about them."""

    file: Path
    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def keys(self) -> dict[str, Any]:
        """Maps dotted keys to values."""
        return flat(self.values)


def read_own_yaml(command: str, sources: YamlSources, groups: Sequence[str], shipped: DictConfig) -> OwnYaml:
    """Composes the user's YAML in its own folder.

    Args:
        groups: overrides of groups beside the file, as typed.
        shipped: the command's configuration without this file. It says which keys are sections.

    Raises:
        ConfigError: the file cannot be read, or a value stands where a section must be.
    """
    assert sources.own is not None
    folders = [sources.config_dir, config_folder()]  # so its defaults list may name shipped YAMLs and groups
    search = json.dumps(
        [*_search_path(sources.own), *(f"file://{folder}" for folder in folders if folder is not None)]
    )
    own = OwnYaml(sources.own, _without_missing(_composed(sources.own, [f"hydra.searchpath={search}", *groups])))
    _check_sections(own, shipped)
    own.notes.append(f"{own.file}: {len(own.keys)} values, over this command's defaults")
    trainer = own.values.get("trainer")
    if isinstance(trainer, dict) and trainer.get("accelerator") in ("gpu", "cuda"):
        trainer["accelerator"] = "auto"  # a GPU if there is one
    if command != "generate":
        _adapt_peft(own, command)
    return own


def _search_path(file: Path) -> list[str]:
    """Returns the file's own hydra.searchpath. The override that adds the shipped folder would replace it."""
    try:
        section = (yaml.safe_load(file.read_bytes()) or {}).get("hydra") or {}
        found = section.get("searchpath") or []
    except (yaml.YAMLError, ValueError, AttributeError, OSError):
        return []  # composing the file reports it
    return [str(folder) for folder in found] if isinstance(found, list) else []


def _composed(file: Path, overrides: list[str]) -> dict[str, Any]:
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(file.parent)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hydra warns of a defaults list without _self_; the file's own values win
            values = OmegaConf.to_container(compose(file.stem, overrides), resolve=False)
    except MissingConfigException as error:
        raise ConfigError([f"{file}: {first_line(error)}{_hint(str(error.missing_cfg_file))}"]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = file if mark is None else f"{mark.name}: line {mark.line + 1}"
        raise ConfigError([f"{place}: not YAML: {error.problem}"]) from None
    except RecursionError:
        raise ConfigError([f"{file}: its defaults list leads back to the same file; remove that entry"]) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, OSError) as error:
        raise ConfigError([f"{file}: {_reason(error)}"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{file}: holds no keys with values"])
    return {str(key): value for key, value in values.items()}


def _reason(error: Exception) -> str:
    """Hydra's reason in one line: its first line, and the next if that one ends in a colon."""
    if "got ListConfig" in str(error):
        return "holds a list, not keys with values"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8: byte 0x{error.object[error.start]:02x}; save it as UTF-8"
    if isinstance(error.__cause__, GrammarParseError):
        key, why = error.__cause__.full_key, first_line(error.__cause__)
        return f"{key + ': ' if key else ''}an interpolation that cannot be read, such as ${{ without }}: {why}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _hint(missing: str) -> str:
    if missing.startswith("hydra/"):
        return "; remove this line from its defaults: tied-lora launch submits jobs and runs sweeps"
    return "; put that file beside it, or remove it from its defaults: NeMo's keys have defaults here"


def _without_missing(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Drops what the file leaves to the command line (???)."""
    kept = {str(key): value for key, value in values.items() if value != _MISSING}
    return {key: _without_missing(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _check_sections(own: OwnYaml, shipped: DictConfig) -> None:
    problems = [f"{key}: a key with dots; write a section for each part" for key in _dotted(own.values)]
    problems += list(_wrong_sections(own.values, OmegaConf.to_container(shipped, resolve=False), ""))
    if problems:
        raise ConfigError(f"{own.file}: {problem}" for problem in problems)


def _dotted(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields keys with dots in them: OmegaConf takes such a key for one name, so it would set nothing."""
    for key, value in values.items():
        if "." in key:
            yield key
        if isinstance(value, Mapping):
            yield from _dotted(value)


def _wrong_sections(values: dict[str, Any], shipped: Any, prefix: str) -> Iterator[str]:
    """Yields values in place of sections. A section of the file that is empty (null) says nothing, and is dropped."""
    for key in list(values):
        value, known = values[key], shipped.get(key)
        if not isinstance(known, Mapping) or not known:
            continue
        if isinstance(value, Mapping):
            yield from _wrong_sections(values[key], known, f"{prefix}{key}.")
        elif value is None and f"{prefix}{key}" != "model.optim.sched":
            del values[key]
        elif value is not None and not str(value).startswith("${"):
            yield f"{prefix}{key}={value!r}: must be a section of keys"


def _adapt_peft(own: OwnYaml, command: str) -> None:
    """Changes what stands in every copy of NeMo's file and has another name or value here."""
    model = own.values.get("model") or {}
    peft = model.get("peft")
    if not isinstance(peft, dict):
        return
    if command == "pretrain":
        del model["peft"]
        own.notes.append("model.peft: not read; pretrain trains every parameter")
        return
    scheme = peft.get("peft_scheme")
    if scheme in _TAKEN_SCHEMES:
        peft["peft_scheme"] = _TIED
        own.notes.append(
            f"model.peft.peft_scheme={scheme}: this command trains tied_lora; type preset=lora for plain LoRA"
        )
    if peft.get(_TIED) and _LORA in peft:
        del peft[_LORA]
        own.notes.append("model.peft.lora_tuning: not read; the file has a section model.peft.tied_lora")
