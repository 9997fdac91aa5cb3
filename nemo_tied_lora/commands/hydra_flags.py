# SPDX-License-Identifier: Apache-2.0
"""The options of every command: Hydra's flags, each of which works or is answered with what to use."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.dotted_keys import value_of
from nemo_tied_lora.planning.composing.yaml_sources import READ_OWN_YAMLS, YamlSources
from nemo_tied_lora.planning.config_folder import config_folder
from nemo_tied_lora.planning.rank_variables import LAUNCHER, is_first

__all__ = ["parser", "print_config", "print_notes", "yaml_sources"]

# Flags of Hydra that do not work here: flag -> (it takes a value, what to use).
_ANSWERS: dict[tuple[str, ...], tuple[bool, str]] = {
    ("--multirun", "-m"): (
        False,
        "for a sweep, use tied-lora launch with several values: rank=2,8 (cluster=local runs them on this machine)",
    ),
    ("--info", "-i"): (
        True,
        "use --cfg job to see the configuration, with --resolve its values, --help for the groups",
    ),
    ("--shell-completion", "-sc"): (False, "there is none; --help lists the groups, --cfg job the keys"),
    ("--experimental-rerun",): (True, "type the command of the run again: a run in the same folder resumes by itself"),
}
_HYDRA_HELP = """tied-lora composes its configuration with Hydra. Hydra's flags here:
  --cfg job [--resolve] [--package SECTION]   works: prints the configuration, or one section
  --config-dir FOLDER                         works: a folder of more groups
  --config-path FOLDER --config-name FILE     works in finetune, generate, pretrain and launch: a YAML of your own
  --run                                       works: it is what happens anyway
  --multirun                                  use tied-lora launch with several values: rank=2,8
  --info                                      use --cfg job, and --help for the groups
  --shell-completion, --experimental-rerun    do not exist here
hydra.KEY=VALUE has no effect: a run writes to exp_manager.explicit_log_dir, not to Hydra's output folder."""


class _Parser(argparse.ArgumentParser):
    """Answers a wrong flag in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        options, rest = self.parse_known_intermixed_args(words, namespace)
        for word in rest:
            self.error(self._unknown(word))
        return options

    def _unknown(self, word: str) -> str:
        key, sign, _ = word.lstrip("-").partition("=")
        if sign and ("." in key or not word.startswith("--")):
            return f"{word}: overrides have no dashes; write {word.lstrip('-')}"
        if re.fullmatch("--(config|yaml)([-_]file)?", f"--{key}"):
            return f"{word}: unknown flag; --config-path=FOLDER --config-name=FILE name a YAML of your own"
        flags = [flag for action in self._actions for flag in action.option_strings]
        close = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
        return f"{word}: unknown flag; " + (f"did you mean {close[0]}?" if close else "--help lists the flags")


class _Answer(argparse.Action):
    """Ends the command with one line that says what to use."""

    def __init__(self, *args: Any, answer: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answer = answer

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string == "--hydra-help":
            print(self._answer)
            parser.exit(0)
        parser.error(f"{option_string}: not possible; {self._answer}")


def parser(command: str, summary: str, examples: str, groups: Iterable[str]) -> argparse.ArgumentParser:
    """The options of every Hydra command; --help shows examples and the shipped choices of each config group."""
    folder = config_folder()
    choices = [
        f"  {group}=  {', '.join(sorted(path.stem for path in (folder / group).glob('*.yaml')))}" for group in groups
    ]
    listed = ["groups:", *choices, ""] if choices else []
    result = _Parser(
        prog=f"tied-lora {command}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="\n".join([f"examples:\n{examples}", *listed, "--cfg job shows every key and its value."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    result.add_argument("--config-dir", "-cd", metavar="DIR", help="also search this folder for YAMLs")
    shown = command in (*READ_OWN_YAMLS, "launch")
    hidden = argparse.SUPPRESS
    own = "a folder with a YAML of your own, for example one for NeMo's scripts"
    result.add_argument("--config-path", "-cp", metavar="DIR", help=own if shown else hidden)
    result.add_argument("--config-name", "-cn", metavar="FILE", help="the name of that YAML" if shown else hidden)
    result.add_argument("--cfg", "-c", choices=["job"], help="print the composed config and stop")
    result.add_argument("--resolve", action="store_true", help="with --cfg: resolve interpolations")
    result.add_argument("--package", "-p", metavar="SECTION", help="with --cfg: print this section only")
    result.add_argument("--run", "-r", action="store_true", help=hidden)
    for flags, (takes_value, answer) in _ANSWERS.items():
        result.add_argument(*flags, action=_Answer, answer=answer, nargs="?" if takes_value else 0, help=hidden)
    result.add_argument("--hydra-help", action=_Answer, answer=_HYDRA_HELP, nargs=0, help=hidden)
    return result


def yaml_sources(command: str, options: argparse.Namespace) -> YamlSources:
    """Finds the YAMLs that the flags name.

    Raises:
        ConfigError: with all problems.
    """
    return YamlSources.from_flags(command, options.config_dir, options.config_path, options.config_name)


def print_config(cfg: DictConfig, options: argparse.Namespace) -> None:
    """Prints what --cfg asks for: the configuration, or the section of --package.

    Raises:
        ConfigError: there is no such section.
    """
    section = options.package
    shown = cfg if section in (None, "_global_") else value_of(cfg, section)
    if shown is None:
        raise ConfigError([f"--package={section}: the configuration has no such section"])
    if OmegaConf.is_config(shown):
        print(OmegaConf.to_yaml(shown, resolve=options.resolve), end="")
    else:
        print(shown)


def print_notes(command: str, notes: Iterable[str]) -> None:
    """Prints on stderr what was translated or has no effect, one line each. Of several ranks, only the first prints."""
    if is_first() and LAUNCHER not in os.environ:  # else the process that started this rank has printed them
        for note in notes:
            print(f"tied-lora {command}: {note}", file=sys.stderr, flush=True)
