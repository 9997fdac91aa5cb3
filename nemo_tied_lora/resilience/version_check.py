# SPDX-License-Identifier: Apache-2.0
"""Checks that all ranks run the same software with the same configuration."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.versions import installed_version
from nemo_tied_lora.resilience.rendezvous import Rendezvous, name_ranks, node_name

__all__ = ["compare", "differences", "software"]

_PACKAGES = (
    "torch",
    "nemo_toolkit",
    "megatron_core",
    "nemo_tied_lora",
    "lightning",
    "transformer_engine",
    "apex",
    "transformers",
    "numpy",
    "safetensors",
    "hydra-core",
)


def compare(rendezvous: Rendezvous, configuration: Mapping[str, Any]) -> None:
    """Compares all ranks' software. Every rank calls it.

    Raises:
        ConfigError: on every rank, with one line per difference.
    """
    rendezvous.put("software", {"node": node_name(), "software": software(configuration)})
    rendezvous.from_rank_0("software/all", lambda: Problems(differences(rendezvous.gather("software"))).raise_if_any())


def software(configuration: Mapping[str, Any]) -> dict[str, str]:
    """Returns what must be the same on every rank: versions, and hashes of this package's code and the configuration."""
    facts = {"python": platform.python_version()}
    facts |= {name: installed_version(name) or "not installed" for name in _PACKAGES}
    facts["nemo_tied_lora's code"] = _code_hash(Path(__file__).resolve().parents[1])
    facts["configuration"] = _short(json.dumps(configuration, sort_keys=True, default=str).encode())
    return facts


def differences(answers: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Returns one line per difference. It names the nodes that differ from most ranks.

    Args:
        answers: each rank's {"node": its name, "software": `software()`}.
    """
    problems = []
    nodes = {rank: str(answer["node"]) for rank, answer in answers.items()}
    for name in sorted({name for answer in answers.values() for name in answer["software"]}):
        values = {rank: answer["software"].get(name, "missing") for rank, answer in answers.items()}
        usual, _ = Counter(values.values()).most_common(1)[0]
        for value in sorted(set(values.values()) - {usual}):
            ranks = [rank for rank, found in values.items() if found == value]
            problems.append(
                f"{name}: {value} on {name_ranks(ranks, nodes)}, {usual} on the others; make them the same"
            )
    return problems


def _code_hash(folder: Path) -> str:
    """Hashes the names and contents of the package's sources."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
