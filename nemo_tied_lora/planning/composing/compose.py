# SPDX-License-Identifier: Apache-2.0
"""Composes the configuration of a command line, and reports all mistakes together, one line each.

Later values win: the shipped YAML, the user's own YAML, the groups that were typed, the keys that were typed. Then keys
of NeMo that have another name here, or no meaning, are translated or removed.
"""

from __future__ import annotations

import copy
import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.composing.dotted_keys import first_line, flat, has_key, remove_key, value_of
from nemo_tied_lora.planning.composing.generation_keys import (
    is_generation_key,
    mistaken_generation_key,
    translate_generation,
)
from nemo_tied_lora.planning.composing.interpolations import interpolation_problems
from nemo_tied_lora.planning.composing.nemo_keys import is_nemo_key, mistaken_key, nearest, unknown_to_nemo
from nemo_tied_lora.planning.composing.nemo_yaml import OwnYaml, read_own_yaml
from nemo_tied_lora.planning.composing.override_lines import Line, read_lines
from nemo_tied_lora.planning.composing.quantisation_key import misplaced_quantisation
from nemo_tied_lora.planning.composing.training_keys import translate_lora, translate_training
from nemo_tied_lora.planning.composing.yaml_sources import READ_OWN_YAMLS, YamlSources
from nemo_tied_lora.planning.config_folder import config_folder

__all__ = ["compose_config", "compose_with_notes", "plain"]

_TRAINING = ("finetune", "pretrain")
# The adapter's own check tells what to write instead of an unknown key.
_ADAPTER = ("model.peft.tied_lora.", "model.peft.lora_tuning.")
_WITH_ADAPTER = ("plan", "finetune")
# Commands whose configuration reaches NeMo, or another command: a key that + adds may have a reader.
_OPEN = (*READ_OWN_YAMLS, "launch", "evaluate")
# Commands that run finetune, and their key for its overrides.
_PASSES_ON = {"quickstart": "overrides", "compare": "training.overrides"}
# NeMo makes a constant rate of a missing section; the code reads all others.
_MAY_BE_DELETED = ("model.optim.sched",)
# Sections of a study with one entry for each name.
_ENTRIES = ("methods", "tasks", "claim.pairs")
_MAY_BE_NULL = (
    "model.optim.sched",
    "model.optim.lr_multipliers",
    "model.peft.tied_lora",
    "exp_manager.wandb_logger_kwargs",
    "guards",
)
# Hydra raises ValueError for a number in place of a group, and NeMo, once imported, makes `trainer` a group.
# A YAML whose defaults name itself: RecursionError.
_NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError, RecursionError)
_TYPED_GROUPS = "_typed_groups"
_PASSED_ON = "passed on as they are, unknown to this command"

# NeMo registers the same two when it is imported, with replace=True.
OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
OmegaConf.register_new_resolver("sum", lambda x, y: x + y, replace=True)


def compose_config(name: str, arguments: Sequence[str], sources: YamlSources | None = None) -> DictConfig:
    """Composes `configs/NAME.yaml` with the overrides.

    Raises:
        ConfigError: with every override that cannot be parsed or does not fit.
    """
    return compose_with_notes(name, arguments, sources)[0]


def compose_with_notes(
    name: str, arguments: Sequence[str], sources: YamlSources | None = None
) -> tuple[DictConfig, list[str]]:
    """As `compose_config`; also returns one line for each key that was translated or has no effect.

    Raises:
        ConfigError: as there.
    """
    sources = sources or YamlSources()
    lines, problems = read_lines(arguments)
    notes = list(_hydra_lines(lines, problems))
    lines = [line for line in lines if not _is_hydras(line)]
    groups = [line for line in lines if sources.is_group(line.key) or line.has_package]
    typed = [line for line in lines if line not in groups]
    composed = problems.attempt(_composed, name, groups, sources)
    if composed is None:  # without a group its keys are missing, which is no mistake of its own
        typed = [line for line in typed if _section(line) not in map(_section, groups)]
    cfg, own = composed or (_shipped(name, [], YamlSources()), None)
    with open_dict(cfg):
        for line in typed:
            problems += _apply(cfg, line, name)
        notes += _unread(typed, name, {} if own is None else own.keys)
        if own is not None:
            problems += [f"{own.file}: {problem}" for problem in _file_problems(own, name, cfg)]
        notes += [] if own is None else own.notes
        keys = {line.key: line.value for line in typed if not line.deletes}
        problems += _translated(cfg, name, keys, {} if own is None else own.keys, notes)
    problems.raise_if_any()
    return cfg, notes


def _section(line: Line) -> str:
    return re.split("[./@]", line.key)[0]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Returns the configuration as plain values.

    Raises:
        ConfigError: an interpolation fails, or a required value (???) is missing.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = "" if not error.full_key or error.full_key in str(error).partition("\n")[0] else f"{error.full_key}: "
        raise ConfigError(list(interpolation_problems(cfg)) or [f"{key}{first_line(error)}"]) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


# Keys of Hydra itself that ask for something -> what to use.
_HYDRA = {
    "hydra.searchpath": "use --config-dir=FOLDER",
    "hydra/launcher": "tied-lora launch submits jobs",
    "hydra.launcher": "tied-lora launch submits jobs",
    "hydra/sweeper": "tied-lora launch runs sweeps: rank=2,8",
    "hydra.sweeper": "tied-lora launch runs sweeps: rank=2,8",
    "hydra.mode": "tied-lora launch runs sweeps: rank=2,8",
}


def _is_hydras(line: Line) -> bool:
    return line.key.replace("/", ".").partition(".")[0] == "hydra"


def _hydra_lines(lines: Sequence[Line], problems: Problems) -> Iterator[str]:
    """Yields a note for each key of Hydra itself without effect: the ranks run without Hydra's job."""
    for line in lines:
        answer = next((answer for key, answer in _HYDRA.items() if line.key.startswith(key)), None)
        if answer is not None:
            problems.append(f"{line.text}: not possible; {answer}")
        elif _is_hydras(line):
            yield f"{line.text}: has no effect here: a run writes to exp_manager.explicit_log_dir"


def _composed(name: str, groups: Sequence[Line], sources: YamlSources) -> tuple[DictConfig, OwnYaml | None]:
    """Composes the YAMLs and the groups, without the other overrides."""
    if sources.own is None:
        return _shipped(name, [line.text for line in groups], sources), None
    shipped = _shipped(name, [], sources)
    beside = [line for line in groups if sources.is_beside_own(line.key, line.value)]
    own = read_own_yaml(name, sources, [line.text for line in beside], shipped)
    typed = _typed_groups(name, [line for line in groups if line not in beside], sources)
    with open_dict(shipped):
        values = OmegaConf.merge(shipped, OmegaConf.create(own.values), typed)
    assert isinstance(values, DictConfig)
    return values, own


def _shipped(name: str, groups: Sequence[str], sources: YamlSources) -> DictConfig:
    if sources.config_dir is None:
        return copy.deepcopy(_compose_once(str(config_folder()), name, tuple(groups)))
    return _compose(str(config_folder()), name, groups, sources.search_path)


@functools.lru_cache(maxsize=64)
def _compose_once(folder: str, name: str, groups: tuple[str, ...]) -> DictConfig:
    return _compose(folder, name, groups, [])


def _compose(folder: str, name: str, groups: Sequence[str], search: Sequence[str]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=folder):
        try:
            return compose(name, [*search, *groups])
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = "" if mark is None else f"{mark.name}: line {mark.line + 1}: "
            raise ConfigError([f"{place}not YAML: {error.problem}"]) from None
        except _NOT_COMPOSED as error:
            alone = [problem for group in groups for problem in _problem_alone(name, group, search)]
            raise ConfigError(alone or [first_line(error)]) from None


def _problem_alone(name: str, group: str, search: Sequence[str]) -> Iterator[str]:
    """Yields the problem of one group, if it has one without the others."""
    try:
        compose(name, [*search, group])
    except _NOT_COMPOSED as error:
        key = group.partition("=")[0].lstrip("+~")
        if isinstance(error, MissingConfigException) and error.options:
            yield f"{group}: unknown; choose one of {', '.join(error.options)}"
        elif isinstance(error, RecursionError):
            yield f"{group}: its YAML, or one that it names in its defaults, includes itself; rename it"
        elif isinstance(error, ValueError) and "Config group override" in str(error):
            yield f"{group}: {key} is a section; set a key in it, {key}.KEY=value"
        elif "No match in the defaults list" in str(error) or "Could not override" in str(error):
            yield f"{group}: {key} is not a group of tied-lora {name}; leave it out (tied-lora {name} --help lists the groups)"
        else:
            yield f"{group}: {first_line(error)}"


def _typed_groups(name: str, groups: Sequence[Line], sources: YamlSources) -> DictConfig:
    """Composes the typed groups alone: their values go over the user's YAML."""
    _shipped(name, [line.text for line in groups], sources)  # refuses unknown ones
    chosen = [line for line in groups if not line.deletes and line.value is not None]
    if not chosen:
        return OmegaConf.create()
    store = ConfigStore.instance()
    store.store(name=_TYPED_GROUPS, node={"defaults": [{line.key: line.value} for line in chosen]})
    try:
        return _compose(str(config_folder()), _TYPED_GROUPS, [], sources.search_path)
    finally:
        store.repo.pop(f"{_TYPED_GROUPS}.yaml", None)


def _apply(cfg: DictConfig, line: Line, name: str) -> Iterator[str]:
    """Sets or deletes one key, or yields why that is not possible."""
    present = has_key(cfg, line.key)
    if line.deletes:
        yield from _delete(cfg, line, name, present=present)
        return
    section = line.key.rpartition(".")[0]
    if section and has_key(cfg, section) and not isinstance(value_of(cfg, section), (DictConfig, type(None))):
        yield f"{line.text}: {section} is a value, not a section of keys"
        return
    if not present:
        problem = _key_problem(line.key, name, cfg, line.text, adds=line.adds)
        if problem is not None:
            yield problem
            return
    if _replaces_section(cfg, line):
        yield f"{line.text}: {line.key} is a section; set a key in it, {line.key}.KEY=value"
        return
    try:
        OmegaConf.update(cfg, line.key, line.value, merge=True, force_add=True)
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        in_list = isinstance(line.value, dict) and OmegaConf.is_list(value_of(cfg, line.key))
        yield f"{line.text}: {f'must be a list: {line.key}=[...]' if in_list else first_line(error)}"


def _replaces_section(cfg: DictConfig, line: Line) -> bool:
    if isinstance(line.value, dict) or not isinstance(value_of(cfg, line.key), DictConfig):
        return False
    return line.value is not None or not (line.key in _MAY_BE_NULL or line.key.startswith("cluster."))


def _delete(cfg: DictConfig, line: Line, name: str, *, present: bool) -> Iterator[str]:
    if not present and not is_nemo_key(line.key):
        yield f"{line.text}: the configuration has no key {line.key}"
    elif not _may_be_deleted(line.key) and has_key(_shipped(name, [], YamlSources()), line.key):
        yield f"{line.text}: this key is read and cannot be deleted; set it instead, for example {line.key}=null"
    elif present:
        remove_key(cfg, line.key)


def _may_be_deleted(key: str) -> bool:
    return key in _MAY_BE_DELETED or key.rpartition(".")[0] in _ENTRIES


def _key_problem(key: str, name: str, cfg: DictConfig, text: str, *, adds: bool) -> str | None:
    """Returns why a key that the configuration does not have cannot be set, or None if it can."""
    misplaced = misplaced_quantisation(key, name, text)
    if misplaced is not None:
        return misplaced
    if name in _WITH_ADAPTER and key.startswith(_ADAPTER):
        return None
    if name == "generate":
        right = mistaken_generation_key(key)
        if right is not None:
            return f"{text}: not a key of generate; write {right}"
        if is_generation_key(key) or is_nemo_key(key):
            return None
    if name in _PASSES_ON and (key.startswith(_ADAPTER) or is_nemo_key(key)):
        return f"{text}: a key of finetune; write \"{_PASSES_ON[name]}=['{text}']\""
    if name == "pretrain" and key.startswith(_ADAPTER):
        return f"{text}: pretrain trains every parameter, without an adapter; leave it out"
    section = key.rpartition(".")[0]
    if name == "compare" and section.rpartition(".")[0] in _ENTRIES and has_key(cfg, section):
        return None  # the study's own check lists the keys of a method or a task
    known = list(flat(_container(cfg)))
    if name in _TRAINING:
        right, refused = mistaken_key(key), unknown_to_nemo(key)
        if right is not None:
            return f"{text}: not a key of NeMo; write {right}"
        if refused is not None:
            return f"{text}: {refused}"
        if is_nemo_key(key):
            return None
    if adds and (name in _OPEN or is_nemo_key(key) or key.startswith(tuple(f"{entry}." for entry in _ENTRIES))):
        close = nearest(key, known, cutoff=0.85) if name in READ_OWN_YAMLS else None
        return None if close is None else f"{text}: nothing reads this key; did you mean {close}?"
    if name not in _TRAINING and is_nemo_key(key):
        return f"{text}: a key of finetune, which {name} does not read; leave it out"
    known += [folder.name for folder in config_folder().iterdir() if folder.is_dir()]
    same_name = [other for other in known if other.endswith(f".{key}")]
    close = same_name[0] if len(same_name) == 1 else nearest(key, known)
    own = f"+{text} adds a key of your own" if name in _OPEN else f"tied-lora {name} --cfg job lists the keys"
    hint = f"did you mean {close}?" if close else own
    return f"{text}: the configuration has no key {key}; {hint}"


def _unread(typed: Sequence[Line], name: str, in_file: Mapping[str, Any]) -> list[str]:
    """Returns a note with the keys that + adds and that neither this command nor NeMo is known to read."""
    if name not in READ_OWN_YAMLS:
        return []
    known = _container(_shipped(name, [], YamlSources()))
    added = [line.key for line in typed if line.adds and not line.key.startswith(_ADAPTER) and line.key not in in_file]
    strange = [key for key in added if not _is_read(key, name) and not has_key(OmegaConf.create(known), key)]
    return [f"{_PASSED_ON}: {', '.join(strange)}"] if strange else []


def _container(cfg: DictConfig) -> dict[Any, Any]:
    values = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(values, dict)
    return values


def _file_problems(own: OwnYaml, name: str, cfg: DictConfig) -> Iterator[str]:
    """Judges the keys of the user's YAML as override lines are judged; notes the keys that nobody knows."""
    shipped = _container(_shipped(name, [], YamlSources()))
    known, strange = list(flat(shipped)), []
    misspelt = _misspelt_sections(own, known)
    yield from (f"{wrong}: not a section of NeMo; did you mean {right}?" for wrong, right in misspelt.items())
    for key, value in own.keys.items():
        if key in known or key.startswith((*_ADAPTER, *(f"{wrong}." for wrong in misspelt))):
            continue
        problem = _file_key_problem(key, value, name)
        close = None if problem or _is_read(key, name) else nearest(key, known, cutoff=0.85)
        if problem is not None and (value is not None or not unknown_to_nemo(key)):
            yield problem
        elif problem is not None:
            remove_key(cfg, key)
        elif close is not None:
            yield f"{key}: not a key of NeMo; did you mean {close}?"
        elif not _is_read(key, name):
            strange.append(key)
    if strange and len(strange) == len(own.keys) and not set(own.values) & set(shipped):
        yield f"none of its keys is one of this command's ({', '.join(strange[:5])}); name another file"
    elif strange:
        own.notes.append(f"{_PASSED_ON}: {', '.join(strange)}")


def _is_read(key: str, name: str) -> bool:
    return is_nemo_key(key) or (name == "generate" and is_generation_key(key))


def _file_key_problem(key: str, value: Any, name: str) -> str | None:
    """Returns why a key of the user's YAML cannot be there, or None."""
    if isinstance(value, str) and YamlSources().is_shipped_group(key):
        return f"{key}={value}: a group; type it, or write `defaults: [{name}, {{override {key}: {value}}}, _self_]`"
    if name == "generate" and is_generation_key(key):
        return None
    if value is not None and (misplaced := misplaced_quantisation(key, name, f"{key}={value}")):
        return misplaced
    right = mistaken_generation_key(key) if name == "generate" else mistaken_key(key)
    refused = unknown_to_nemo(key)
    if right is not None:
        return f"{key}: not a key of NeMo; write {right}"
    return None if refused is None else f"{key}={value}: {refused}"


def _misspelt_sections(own: OwnYaml, known: Sequence[str]) -> dict[str, str]:
    """Maps each section of the user's YAML that nobody knows to the known one that is most like it."""
    sections = {"inference"} | {
        ".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 1)
    }
    found: dict[str, str] = {}
    for key in own.keys:
        for depth in range(1, key.count(".") + 1):
            section = ".".join(key.split(".")[:depth])
            level = sorted(known for known in sections if known.count(".") == section.count("."))
            close = difflib.get_close_matches(section, level, n=1, cutoff=0.8)
            if section in sections:
                continue
            if close and not is_nemo_key(section):
                found[section] = close[0]
            break
    return found


def _translated(
    cfg: DictConfig, name: str, typed: dict[str, Any], in_file: dict[str, Any], notes: list[str]
) -> Iterator[str]:
    if name in _TRAINING:
        yield from translate_training(cfg, typed, in_file, notes)
    elif name == "generate":
        yield from translate_generation(cfg, typed, in_file, notes)
    if name in _WITH_ADAPTER:
        yield from translate_lora(cfg, notes)
