# SPDX-License-Identifier: Apache-2.0
"""Checks the section `cluster` of `configs/launch.yaml`: where and how a run starts. Defaults are in configs/cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from nemo_tied_lora.errors import ConfigError, Problems

__all__ = ["Cluster", "Container", "looks_secret", "seconds"]

_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
_SECRET = re.compile(
    r"((api|access|auth|private|secret|hf|wandb)_?(key|token)|password|passwd|secret|credentials?|^token)s?$", re.I
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DAY = 24 * 3600
_LEAST = {"nodes": 1, "gpus_per_node": 1, "cpus_per_task": 1, "save_seconds": 1, "max_requeues": 0, "at_once": 1}


@dataclass(frozen=True, kw_only=True)
class Container:
    """The container in which pyxis runs the ranks."""

    image: str | None = None
    """A squashfs file or an enroot URI. None: no container."""
    mounts: tuple[str, ...] = ()
    """SOURCE:TARGET, or SOURCE:TARGET:FLAGS."""
    workdir: str | None = None

    def __post_init__(self) -> None:
        problems = Problems(
            f"cluster.container.mounts: {mount!r}: write SOURCE:TARGET, or SOURCE:TARGET:FLAGS, both absolute"
            for mount in self.mounts
            if not re.fullmatch(r"/[^:,]*:/[^:,]*(:[^:,]+)?", str(mount))
        )
        if self.image is None and (self.mounts or self.workdir):
            problems.append("cluster.container.image=null: mounts and workdir need an image; name one, or remove them")
        problems.raise_if_any()

    def host_path(self, path: str) -> str | None:
        """Returns the path outside the container. None if no mount contains it."""
        if self.image is None:
            return path
        whole = path if path.startswith("/") else f"{(self.workdir or '').rstrip('/')}/{path}"
        for source, target in sorted((m.split(":")[:2] for m in self.mounts), key=lambda pair: -len(pair[1])):
            inner = target.rstrip("/")
            if whole == inner or whole.startswith(f"{inner}/"):
                return source.rstrip("/") + whole[len(inner) :]
        return None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The section `cluster`.

    Raises:
        ConfigError: with all problems.
    """

    kind: str
    """slurm, or local."""
    nodes: int | None = None
    gpus_per_node: int | None = None
    """Ranks on each node."""
    gpu_request: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    time: str | int | None = None
    cpus_per_task: int | None = None
    memory: str | int | None = None
    exclusive: bool = False
    sbatch: Mapping[str, Any] | None = None
    srun: tuple[str, ...] = ()
    save_seconds: int = 300
    max_requeues: int = 0
    at_once: int = 1
    log: str | None = None
    setup: tuple[str, ...] = ()
    python: str | None = None
    container: Container = Container()
    environment: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        problems = Problems()
        for name, least in _LEAST.items():
            if getattr(self, name) is not None or name in ("save_seconds", "max_requeues", "at_once"):
                problems.whole_number(f"cluster.{name}", getattr(self, name), least)
        problems += [*self._time_problems(), *self._environment_problems()]
        problems.one_of("cluster.kind", self.kind, ("slurm", "local"))
        problems.one_of("cluster.gpu_request", self.gpu_request, ("gpus-per-node", "gres", None))
        if self.kind == "local" and (self.nodes or 1) > 1:
            problems.append(f"cluster.nodes={self.nodes}: cluster=local is one machine; several need cluster=slurm")
        problems.raise_if_any()

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> Cluster:
        """Reads the composed section. Refuses unknown keys, and values of the wrong kind."""
        problems = Problems()
        values = problems.known_keys("cluster", section, sorted(field.name for field in fields(cls)))
        for key in ("srun", "setup"):
            values[key] = problems.attempt(_words, f"cluster.{key}", values.get(key))
        for key in ("sbatch", "environment"):
            values[key] = problems.section(f"cluster.{key}", values.get(key))
        values["container"] = problems.attempt(_container, values.get("container"))
        problems.raise_if_any()
        return cls(**values)

    @property
    def exported(self) -> dict[str, str]:
        """The environment variables that have a value."""
        return {name: str(value) for name, value in (self.environment or {}).items() if value is not None}

    def _time_problems(self) -> Iterator[str]:
        if self.time is None:
            return
        try:
            limit = seconds(self.time)
        except ValueError:
            yield f"cluster.time={self.time!r}: write minutes, or [days-]hours:minutes:seconds, in quotes"
            return
        if isinstance(self.save_seconds, int) and limit <= self.save_seconds:
            yield f"cluster.time={self.time}: must be longer than cluster.save_seconds={self.save_seconds}, the time to save"

    def _environment_problems(self) -> Iterator[str]:
        for name, value in (self.environment or {}).items():
            if not _VARIABLE.fullmatch(str(name)):
                yield f"cluster.environment.{name}: not a valid name of a variable"
            elif value is not None and looks_secret(str(name)):
                yield f"cluster.environment.{name}: a secret; remove it and export it in the shell that launches"


def seconds(limit: str | int) -> int:
    """Returns SLURM's time limit in seconds. Formats: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours[:minutes[:seconds]].

    Raises:
        ValueError: the text has another format.
    """
    match = _TIME.fullmatch(str(limit))
    if match is None:
        raise ValueError(f"not a time limit: {limit!r}")
    first, second, third = (int(match[key]) if match[key] else None for key in "abc")
    assert first is not None
    if match["d"] is not None:
        return int(match["d"]) * _DAY + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + (second or 0) * 60 + third
    return first * 60 + (second or 0)


def looks_secret(key: str) -> bool:
    """Whether the last part of a key, or a variable's name, suggests that its value is a secret."""
    return bool(_SECRET.search(key.rpartition(".")[2]))


def _words(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value or [], (list, tuple)):
        raise ConfigError([f"{key}={value!r}: must be a list"])
    return tuple(str(word) for word in value or ())


def _container(section: Any) -> Container:
    problems, name = Problems(), "cluster.container"
    values = problems.known_keys(name, problems.section(name, section), [field.name for field in fields(Container)])
    mounts = problems.attempt(_words, f"{name}.mounts", values.get("mounts"))
    return problems.build(Container, **{**values, "mounts": mounts or ()})
