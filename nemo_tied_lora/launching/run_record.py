# SPDX-License-Identifier: Apache-2.0
"""Records a run: its resolved configuration, and the versions of the software."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from nemo_tied_lora.files import write_atomically, write_json
from nemo_tied_lora.launching.cluster_config import looks_secret
from nemo_tied_lora.planning.versions import git, installed_version

__all__ = ["git_commit", "resolved_yaml", "versions", "write_record"]


_PACKAGES = (
    "nemo_tied_lora",
    "torch",
    "nemo_toolkit",
    "megatron-core",
    "megatron-bridge",
    "transformers",
    "lightning",
    "transformer_engine",
    "apex",
    "numpy",
    "hydra-core",
    "omegaconf",
)


def write_record(folder: Path, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Writes config.yaml and versions.json into the folder."""
    write_atomically(folder / "config.yaml", resolved_yaml(cfg).encode())
    write_json(folder / "versions.json", {**versions(), "arguments": list(overrides)})


def resolved_yaml(cfg: DictConfig) -> str:
    """Returns the resolved configuration. Interpolations that read the environment stay, because it may hold secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(_resolved(cfg)))


def versions() -> dict[str, Any]:
    """Returns the versions of Python and of packages (None: not installed), and the commit of the code."""
    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in _PACKAGES},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Returns the commit of the package's checkout, with a "+" if files differ from it. None: not a checkout."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    commit = git(source, "rev-parse", "HEAD")
    return commit and commit + ("+" if git(source, "status", "--porcelain", "--untracked-files=no") else "")


def _resolved(node: Any) -> Any:
    if isinstance(node, DictConfig):
        return {key: _value(node, key) for key in node}
    if isinstance(node, ListConfig):
        return [_value(node, index) for index in range(len(node))]
    return node


def _value(node: DictConfig | ListConfig, key: Any) -> Any:
    if OmegaConf.is_missing(node, key):
        return "???"
    if OmegaConf.is_interpolation(node, key):
        written = OmegaConf.to_container(node, resolve=False)[key]  # type: ignore[index]
        if "oc.env" in str(written):
            return written
    return _masked(_resolved(node[key]))


def _masked(value: Any) -> Any:
    """Replaces secrets, which interpolations may have inserted, with the names of their variables."""
    if isinstance(value, str):
        for name, secret in os.environ.items():
            if len(secret) > 3 and looks_secret(name):
                value = value.replace(secret, f"${{oc.env:{name}}}")
    return value
