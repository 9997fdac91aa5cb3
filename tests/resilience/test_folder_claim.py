# SPDX-License-Identifier: Apache-2.0
"""One process, whose second open file stands for another process: a run's folder belongs to one run at a time. No ranks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import write_json
from nemo_tied_lora.resilience import folder_claim
from nemo_tied_lora.resilience.folder_claim import check_unclaimed, claim_folder


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Path, int]]:
    """What a test claims is free after it, as when its process ends."""
    claims: dict[Path, int] = {}
    monkeypatch.setattr(folder_claim, "_HELD", claims)
    yield claims
    for opened in claims.values():
        os.close(opened)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[int]:
    """Another process's open folder."""
    opened = os.open(tmp_path, os.O_RDONLY)
    yield opened
    os.close(opened)


def test_a_folder_with_a_run_is_refused_with_who_works_there_until_that_process_ends(
    tmp_path: Path, other: int
) -> None:
    fcntl.flock(other, fcntl.LOCK_EX)
    write_json(tmp_path / "status.json", {"pid": 77, "node": "n1", "state": "training", "step": 40})
    for claim in (claim_folder, check_unclaimed):
        with pytest.raises(ConfigError) as refused:
            claim(tmp_path)
        assert refused.value.problems == (
            f"exp_manager: another run works in {tmp_path} (process 77 on node n1, training, step 40); wait for it, stop it, "
            "or give this run a folder of its own with name= or exp_manager.explicit_log_dir=",
        )
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"another run works in \S+; wait for it"):
        check_unclaimed(tmp_path)
    fcntl.flock(other, fcntl.LOCK_UN)
    claim_folder(tmp_path)


def test_a_claim_holds_for_the_process_and_is_its_own_to_repeat(
    tmp_path: Path, other: int, held: dict[Path, int]
) -> None:
    claim_folder(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run").is_dir()
    claim_folder(tmp_path)
    claim_folder(tmp_path)
    check_unclaimed(tmp_path)
    assert len(held) == 2
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_look_claims_nothing_and_makes_no_folder(tmp_path: Path, other: int, held: dict[Path, int]) -> None:
    check_unclaimed(tmp_path / "missing")
    check_unclaimed(tmp_path)
    assert (list(tmp_path.iterdir()), held) == ([], {})
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_where_folders_cannot_be_locked_every_run_starts(
    tmp_path: Path, other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl.flock(other, fcntl.LOCK_EX)

    def no_locks(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    claim_folder(tmp_path)
    check_unclaimed(tmp_path)
