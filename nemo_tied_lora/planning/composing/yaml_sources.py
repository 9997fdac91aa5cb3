# SPDX-License-Identifier: Apache-2.0
"""Finds the YAML that a user names with Hydra's flags: --config-path, --config-name and --config-dir."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.config_folder import config_folder

__all__ = ["READ_OWN_YAMLS", "YamlSources"]

READ_OWN_YAMLS = ("finetune", "generate", "pretrain")
"""Commands that read a whole YAML of the user. `launch` passes it to finetune."""

# The names of NeMo's own files, for --config-path without --config-name.
_NEMO_NAMES = {
    "finetune": ("megatron_gpt_finetuning_config",),
    "generate": ("megatron_gpt_generate_config", "megatron_gpt_inference"),
    "pretrain": (),
}


@dataclass(frozen=True, kw_only=True)
class YamlSources:
    """Where the YAMLs of a run come from, beside the shipped ones."""

    config_dir: Path | None = None
    """A folder of more groups (--config-dir)."""
    own: Path | None = None
    """The user's own YAML (--config-path, --config-name)."""

    @classmethod
    def from_flags(
        cls, command: str, config_dir: str | None, config_path: str | None = None, config_name: str | None = None
    ) -> YamlSources:
        """Finds the folder and the file. Relative paths start in the current folder.

        Raises:
            ConfigError: with all problems.
        """
        problems = Problems()
        groups = None
        if config_dir is not None:
            groups = Path(config_dir).expanduser().resolve()
            if not groups.is_dir():
                problems.append(f"--config-dir={config_dir}: no such folder; name one that holds YAMLs")
        own = problems.attempt(_own_yaml, command, config_path, config_name, groups)
        problems.raise_if_any()
        return cls(config_dir=groups, own=own)

    def flags(self) -> list[str]:
        """Returns the flags that name the same files from any folder."""
        found = [] if self.config_dir is None else [f"--config-dir={self.config_dir}"]
        if self.own is not None:
            found += [f"--config-path={self.own.parent}", f"--config-name={self.own.name}"]
        return found

    @property
    def search_path(self) -> list[str]:
        """The override that makes Hydra look for groups in `config_dir` too."""
        if self.config_dir is None:
            return []
        return [f"hydra.searchpath=[{json.dumps(f'file://{self.config_dir}')}]"]

    def is_group(self, key: str) -> bool:
        """Whether a key names a group: a folder of YAMLs."""
        return "/" in key or self.is_shipped_group(key) or self.is_own_group(key)

    def is_shipped_group(self, key: str) -> bool:
        """Whether a key names one of the shipped groups, or one of `config_dir`."""
        folders = [config_folder(), *([self.config_dir] if self.config_dir else [])]
        return any(_is_group(folder, key) for folder in folders)

    def is_own_group(self, key: str) -> bool:
        """Whether a key names a group beside the user's YAML."""
        return self.own is not None and _is_group(self.own.parent, key)

    def is_beside_own(self, key: str, choice: object) -> bool:
        """Whether a choice of a group is beside the user's YAML, and not one of the shipped choices."""
        if self.own is None or not self.is_own_group(key):
            return False
        return (self.own.parent / key / f"{choice}.yaml").is_file() or not self.is_shipped_group(key)


def _is_group(folder: Path, key: str) -> bool:
    return any((folder / key).glob("*.yaml"))


def _own_yaml(command: str, path: str | None, name: str | None, config_dir: Path | None) -> Path | None:
    if path is None and (name is None or name.removesuffix(".yaml") == command):
        return None
    if command not in READ_OWN_YAMLS:
        flag = "--config-name" if path is None else "--config-path"
        readers = ", ".join(READ_OWN_YAMLS)
        raise ConfigError(
            [f"{flag}: {command} reads no YAML of your own ({readers} and launch do); --config-dir adds groups"]
        )
    if path is not None and "://" in path:
        raise ConfigError([f"--config-path={path}: only folders can be read; name the folder of your YAML"])
    folders = list(_folders(path, config_dir))
    if path is not None and folders[0].is_file() and name is None:
        return _readable(folders[0], f"--config-path={path}")
    if path is not None and not folders[0].is_dir():
        raise ConfigError([f"--config-path={path}: no such folder; a relative path starts in {Path.cwd()}"])
    if name is None:
        return _named_as_nemos(command, str(path), folders[0])
    for folder in folders:
        file = folder / f"{Path(name).expanduser()}"
        for candidate in (file, file.with_name(f"{file.name}.yaml"), file.with_name(f"{file.name}.yml")):
            if candidate.is_file():
                return _readable(candidate, f"--config-name={name}")
    raise ConfigError(
        [f"--config-name={name}: no such file in {' or '.join(map(str, folders))}{_others(name, folders)}"]
    )


def _folders(path: str | None, config_dir: Path | None) -> Iterator[Path]:
    if path is not None:
        yield Path(path).expanduser().resolve()
        return
    yield Path.cwd()
    if (Path.cwd() / "conf").is_dir():
        yield Path.cwd() / "conf"
    if config_dir is not None:
        yield config_dir


def _named_as_nemos(command: str, path: str, folder: Path) -> Path:
    for name in (*_NEMO_NAMES[command], command):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise ConfigError([f"--config-path={path}: name the file in it with --config-name{_others('', [folder])}"])


def _readable(file: Path, flag: str) -> Path:
    if file.suffix != ".yaml":
        raise ConfigError([f"{flag}: {file.name} must end in .yaml, because Hydra reads no other file; rename it"])
    return file.resolve()


def _others(name: str, folders: Sequence[Path]) -> str:
    stems = sorted(file.stem for folder in folders for file in folder.glob("*.yaml"))
    close = difflib.get_close_matches(name.removesuffix(".yaml"), stems, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; the YAMLs there are {', '.join(stems[:10])}" if stems else "; there are no YAMLs there"
