# SPDX-License-Identifier: Apache-2.0
"""The `cluster` section of `configs/launch.yaml`: where and how a run is started. Its defaults are in configs/cluster."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from nemo_tied_lora.errors import ConfigError

__all__ = ["Cluster", "Container", "looks_secret", "seconds"]

_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
_SECRET = re.compile(
    r"((api|access|auth|private|secret|hf|wandb)_?(key|token)|password|passwd|secret|credentials?|^token)s?$", re.I
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DAY = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Container:
    """What pyxis is told."""

    image: str | None = None
    """A squashfs file or an enroot URI. None: no container."""
    mounts: tuple[str, ...] = ()
    """SOURCE:TARGET, or SOURCE:TARGET:FLAGS."""
    workdir: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"cluster.container.mounts: {mount!r}: write SOURCE:TARGET, or SOURCE:TARGET:FLAGS, both absolute"
            for mount in self.mounts
            if not re.fullmatch(r"/[^:,]*:/[^:,]*(:[^:,]+)?", str(mount))
        ]
        if self.image is None and (self.mounts or self.workdir):
            problems.append("cluster.container.image=null: mounts and workdir mean nothing without one")
        if problems:
            raise ConfigError(problems)

    def host_path(self, path: str) -> str | None:
        """Where a path of the container lies outside; None where no mount shows it."""
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
    """The section, checked.

    Raises:
        ConfigError: all its problems together.
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
        problems = [*self._size_problems(), *self._time_problems(), *self._environment_problems()]
        if self.kind not in ("slurm", "local"):
            problems.append(f"cluster.kind={self.kind!r}: choose slurm or local")
        if self.gpu_request not in (None, "gpus-per-node", "gres"):
            problems.append(f"cluster.gpu_request={self.gpu_request!r}: choose gpus-per-node, gres or null")
        if self.kind == "local" and (self.nodes or 1) > 1:
            problems.append(f"cluster.nodes={self.nodes}: cluster=local is one machine; several need cluster=slurm")
        if problems:
            raise ConfigError(problems)

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> Cluster:
        """From the composed section; unknown keys are problems, and so is a list where a word belongs."""
        known = {field.name for field in fields(cls)}
        problems = [
            f"cluster.{key}: not a key of cluster; choose from {', '.join(sorted(known))}"
            for key in section.keys() - known
        ]
        values = {key: value for key, value in section.items() if key in known}
        for key in ("srun", "setup"):
            values[key] = _attempt(problems, lambda k: _words(f"cluster.{k}", values.get(k)), key)
        for key in ("sbatch", "environment"):
            values[key] = _attempt(problems, lambda k: _table(f"cluster.{k}", values.get(k)), key)
        values["container"] = _attempt(problems, _container, section.get("container"))
        if problems:
            raise ConfigError(problems)
        return cls(**values)

    @property
    def exported(self) -> dict[str, str]:
        """The environment's variables that are set here."""
        return {name: str(value) for name, value in (self.environment or {}).items() if value is not None}

    def _size_problems(self) -> Iterator[str]:
        bounds = {
            "nodes": 1,
            "gpus_per_node": 1,
            "cpus_per_task": 1,
            "save_seconds": 1,
            "max_requeues": 0,
            "at_once": 1,
        }
        for name, least in bounds.items():
            value = getattr(self, name)
            given = value is not None or name in ("save_seconds", "max_requeues", "at_once")
            if given and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                yield f"cluster.{name}={value!r}: must be a whole number of at least {least}"

    def _time_problems(self) -> Iterator[str]:
        if self.time is None:
            return
        try:
            limit = seconds(self.time)
        except ValueError:
            yield f"cluster.time={self.time!r}: write minutes, or [days-]hours:minutes:seconds, in quotes"
            return
        if isinstance(self.save_seconds, int) and limit <= self.save_seconds:
            yield f"cluster.time={self.time}: not longer than cluster.save_seconds={self.save_seconds}, the time to save"

    def _environment_problems(self) -> Iterator[str]:
        for name, value in (self.environment or {}).items():
            if not _VARIABLE.fullmatch(str(name)):
                yield f"cluster.environment.{name}: not a variable's name"
            elif value is not None and looks_secret(str(name)):
                yield f"cluster.environment.{name}: a secret; remove it here and export it in the shell that launches"


def seconds(limit: str | int) -> int:
    """SLURM's time limit (minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]) in seconds.

    Raises:
        ValueError: it is none of these.
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
    """Whether a key's last part, or a variable's name, says that its value is a secret."""
    return bool(_SECRET.search(key.rpartition(".")[2]))


def _words(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value or [], (list, tuple)):
        raise ConfigError([f"{key}={value!r}: must be a list"])
    return tuple(str(word) for word in value or ())


def _table(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value or {}, Mapping):
        raise ConfigError([f"{key}={value!r}: must be a section with keys of its own"])
    return dict(value or {})


def _container(section: Any) -> Container:
    values = _table("cluster.container", section)
    unknown = values.keys() - {field.name for field in fields(Container)}
    if unknown:
        raise ConfigError(
            [f"cluster.container.{key}: not a key of it; it has image, mounts, workdir" for key in unknown]
        )
    return Container(**{**values, "mounts": _words("cluster.container.mounts", values.get("mounts"))})


def _attempt(problems: list[str], build: Callable[[Any], Any], value: Any) -> Any:
    try:
        return build(value)
    except ConfigError as error:
        problems.extend(error.problems)
        return None
