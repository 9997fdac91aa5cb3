# SPDX-License-Identifier: Apache-2.0
"""Exchanges messages between ranks before a process group exists, through a store on rank 0 or torchrun's store."""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.rank_variables import STORE_SOCKET

__all__ = ["Rendezvous", "connect", "name_ranks", "node_name"]

_OWNER, _OWNER_S = "tied_lora/owner", 10.0
_POLL_S = 0.2
_NAMED = 8
_RANK_0_FACTOR = 4


def node_name() -> str:
    """Returns the name of this machine, from SLURM or from the machine itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class Rendezvous:
    """All ranks of a run, reached through a TCPStore. All ranks call every method.

    torchrun holds the store if it has one. Otherwise rank 0 holds it, at MASTER_ADDR:MASTER_PORT.
    """

    store: Store
    rank: int
    world_size: int
    timeout_s: float

    @classmethod
    def join(cls, timeout_s: float, environment: Mapping[str, str] = os.environ) -> Rendezvous:
        """Joins the other ranks.

        Raises:
            ConfigError: the launcher's variables are missing or wrong, or rank 0 did not answer in time.
        """
        rank, world_size = (_whole(environment, name) for name in ("RANK", "WORLD_SIZE"))
        return cls(connect(timeout_s, environment), rank, world_size, timeout_s)

    def put(self, topic: str, message: Any) -> None:
        """Stores this rank's message, a JSON value."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(message))

    def gather(self, topic: str) -> dict[int, Any]:
        """Returns every rank's message. Leaves out ranks that put none within `timeout_s`."""
        keys = [f"{topic}/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + self.timeout_s
        while not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        present = [rank for rank, key in enumerate(keys) if self.store.check([key])]
        return {rank: json.loads(self.store.get(keys[rank])) for rank in present}

    def broadcast(self, topic: str, message: Any = None) -> Any:
        """Returns rank 0's message on every rank.

        Raises:
            ConfigError: no message within four times `timeout_s`. Rank 0 itself may wait for the slowest rank.
        """
        if self.rank == 0:
            self.store.set(topic, json.dumps(message))
            return message
        limit = _RANK_0_FACTOR * self.timeout_s
        deadline = time.monotonic() + limit
        while not self.store.check([topic]):
            if time.monotonic() > deadline:
                raise ConfigError([f"rank 0 did not answer within {limit:.0f} s ({topic})"])
            time.sleep(_POLL_S)
        return json.loads(self.store.get(topic))

    def from_rank_0(self, topic: str, compute: Callable[[], Any]) -> Any:
        """Calls `compute` on rank 0, and returns its result, or raises its `ConfigError`, on every rank."""
        problems = Problems()
        result = problems.attempt(compute) if self.rank == 0 else None
        result, found = self.broadcast(topic, [result, problems])
        Problems(found).raise_if_any()
        return result

    def agree(self, problems: Sequence[str], topic: str = "problems") -> list[str]:
        """Returns all ranks' problems, the same on every rank. A problem of only some ranks names their nodes.

        A rank that does not come is a problem too.
        """
        self.put(topic, {"node": node_name(), "problems": list(problems)})
        found = _merged(self.gather(topic), self.world_size, self.timeout_s) if self.rank == 0 else None
        return list(self.broadcast(f"{topic}/all", found))


def connect(timeout_s: float, environment: Mapping[str, str] = os.environ, *, client: bool = False) -> Store:
    """Connects to the ranks' store. Rank 0 creates it, unless torchrun has one or `client` is True.

    Raises:
        ConfigError: MASTER_ADDR or MASTER_PORT is missing or wrong, or nothing answers.
    """
    address, port = environment.get("MASTER_ADDR"), _whole(environment, "MASTER_PORT")
    if not address:
        raise ConfigError(["MASTER_ADDR: not set; the launcher must name the address of rank 0"])
    torchruns = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holds = not client and not torchruns and environment.get("RANK") == "0"
    timeout = datetime.timedelta(seconds=timeout_s)
    given: dict[str, Any] = (
        {"master_listen_fd": int(environment[STORE_SOCKET])} if holds and STORE_SOCKET in environment else {}
    )
    try:
        store = TCPStore(address, port, is_master=holds, timeout=timeout, wait_for_workers=False, **given)
    except RuntimeError as error:  # torch's DistError is a RuntimeError
        reason = str(error).splitlines()[0]
        problem = "cannot be listened on" if holds else f"rank 0 was not reached within {timeout_s:.0f} s"
        raise ConfigError([f"MASTER_ADDR={address}, MASTER_PORT={port}: {problem}: {reason}"]) from None
    if not torchruns:
        _check_owner(store, holds, environment)
    return PrefixStore(f"tied_lora/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _check_owner(store: Store, holds: bool, environment: Mapping[str, str]) -> None:
    """Rank 0 writes the number of its SLURM step; another rank compares it with its own.

    Raises:
        ConfigError: another run, whose port is the same, has its store there.
    """
    own = ".".join(environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if own == ".":
        return
    if holds:
        store.set(_OWNER, own)
        return
    deadline = time.monotonic() + _OWNER_S
    while not store.check([_OWNER]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    found = store.get(_OWNER).decode() if store.check([_OWNER]) else "another program"
    if found != own:
        raise ConfigError(
            [
                f"MASTER_PORT={environment['MASTER_PORT']}: SLURM step {found} uses it, not {own}; set MASTER_PORT to a free port"
            ]
        )


def name_ranks(ranks: Sequence[int], nodes: Mapping[int, str]) -> str:
    """Returns text such as "node n2 (ranks 4 to 7)", with each node once."""
    by_node: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_node.setdefault(nodes.get(rank, "unknown"), []).append(rank)
    named = [f"node {node} ({_ranks(its_ranks)})" for node, its_ranks in list(by_node.items())[:_NAMED]]
    return ", ".join(named) + (f" and {len(by_node) - _NAMED} more nodes" if len(by_node) > _NAMED else "")


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    whole = list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"ranks {ranks[0]} to {ranks[-1]}" if whole else f"ranks {', '.join(map(str, ranks))}"


def _merged(answers: Mapping[int, Any], world_size: int, timeout_s: float) -> list[str]:
    nodes = {rank: answer["node"] for rank, answer in answers.items()}
    by_problem: dict[str, list[int]] = {}
    for rank, answer in sorted(answers.items()):
        for problem in answer["problems"]:
            by_problem.setdefault(problem, []).append(rank)
    merged = [
        problem if len(ranks) == len(answers) else f"{problem} (on {name_ranks(ranks, nodes)})"
        for problem, ranks in by_problem.items()
    ]
    missing = sorted(set(range(world_size)) - answers.keys())
    if missing:
        merged.append(f"{_ranks(missing)} of {world_size}: not started, or did not arrive within {timeout_s:.0f} s")
    return merged


def _whole(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdigit():
        raise ConfigError([f"{name}={text!r}: must be a whole number, set by the launcher"])
    return int(text)
