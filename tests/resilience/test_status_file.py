# SPDX-License-Identifier: Apache-2.0
"""status.json, and when it forbids to start a run again. Pure Python, without ranks."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.commands import status as command
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.settings.run_settings import survival_problems
from nemo_tied_lora.resilience.restarts import fingerprint, finished_before, restarted
from nemo_tied_lora.resilience.status_file import RunStatus, read_status


def written(folder: Path, **fields: Any) -> None:
    fields = {"settings": "s", "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"), **fields}
    (folder / "status.json").write_text(json.dumps(fields))


def test_steps_are_written_seldom_and_a_change_of_state_at_once(tmp_path: Path) -> None:
    status = RunStatus(tmp_path, active=True, settings="s")
    status.update(state="training", step=1)
    status.update(step=2)
    assert (read_status(tmp_path) or {})["step"] == 1
    status.update(state="saving")
    found = read_status(tmp_path) or {}
    assert (found["state"], found["step"]) == ("saving", 2)
    assert list(tmp_path.iterdir()) == [tmp_path / "status.json"]


def test_other_ranks_write_only_why_the_run_failed(tmp_path: Path) -> None:
    RunStatus(tmp_path, active=True).update(state="training", step=7)
    other = RunStatus(tmp_path, active=False)
    other.update(now=True, state="training", step=99)
    assert (read_status(tmp_path) or {})["step"] == 7
    other.fail("rank 0 is gone")
    found = read_status(tmp_path) or {}
    assert (found["state"], found["step"], found["reason"]) == ("failed", 7, "rank 0 is gone")


def test_a_run_has_finished_only_with_the_same_settings_and_an_existing_file(tmp_path: Path) -> None:
    output = tmp_path / "adapter.nemo"
    written(tmp_path, state="finished", output=str(output))
    assert finished_before(tmp_path, "s") is None
    output.touch()
    assert finished_before(tmp_path, "s") is None
    (tmp_path / "metrics.json").touch()
    assert finished_before(tmp_path, "s") == str(output)
    assert finished_before(tmp_path, "other") is None
    written(tmp_path, state="training", output=str(output))
    assert finished_before(tmp_path, "s") is None


def test_the_fingerprint_depends_on_settings_and_data_and_not_on_the_number_of_ranks(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    fixed = [f"model.data.train_ds.file_names=[{data}]"]

    def of(*overrides: str) -> str:
        return fingerprint(plain(compose_config("finetune", [*fixed, *overrides])))

    plain_one = of()
    assert of("trainer.devices=4", "preflight=false", "watchdog.timeout_s=5") == plain_one
    assert of("model.optim.lr=3e-3") != plain_one
    assert of("trainer.max_steps=7") != plain_one
    data.write_text("{}\n{}\n")
    assert of() != plain_one


def test_restarts_are_counted_and_those_without_a_new_checkpoint_are_limited(tmp_path: Path) -> None:
    assert restarted(tmp_path, "s", 1) == {"restarts": 0, "fruitless_restarts": 0, "saved_before": 0}
    written(tmp_path, state="training", restarts=3, saved_step=20, saved_before=10, fruitless_restarts=1)
    assert restarted(tmp_path, "s", 1) == {"restarts": 4, "fruitless_restarts": 0, "saved_before": 20}
    written(tmp_path, state="failed", restarts=4, saved_before=20, fruitless_restarts=0)
    assert restarted(tmp_path, "s", 1)["fruitless_restarts"] == 1
    written(tmp_path, state="failed", restarts=5, saved_before=20, fruitless_restarts=1, reason="no memory")
    with pytest.raises(ConfigError, match=r"2 restarts in a row saved nothing; find out why \(no memory\)"):
        restarted(tmp_path, "s", 1)
    assert restarted(tmp_path, "other", 1)["restarts"] == 0


def test_a_restart_after_a_stop_signal_does_not_count_as_fruitless(tmp_path: Path) -> None:
    written(tmp_path, state="preempted", restarts=9, saved_before=0, fruitless_restarts=1)
    assert restarted(tmp_path, "s", 1)["fruitless_restarts"] == 0


def test_the_command_shows_a_run_and_reports_a_missing_sign_of_life(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"state": "training", "step": 5, "max_steps": 20, "loss": 1.25, "tokens_per_second": 4321.0}
    fields |= {"seconds_left": 75.0, "last_checkpoint": "x-last.ckpt", "saved_step": 4, "node": "n1", "pid": 7}
    written(tmp_path, **fields)
    assert command.main([f"run={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    for part in ("5 of 20", "1.25", "4,321", "1 min 15 s", "x-last.ckpt (step 4)", "node n1, process 7"):
        assert part in shown
    assert "no sign of life" not in shown
    old = (datetime.now(timezone.utc) - timedelta(minutes=10)).isoformat(timespec="seconds")
    written(tmp_path, **fields, updated=old)
    command.main([f"run={tmp_path}"])
    shown = capsys.readouterr().out
    assert f"no sign of life since {old} (10 min" in shown
    assert "time left" not in shown
    command.main([f"run={tmp_path}", "format=json"])
    assert json.loads(capsys.readouterr().out)["alive"] is False
    written(tmp_path, state="finished", updated=old)
    command.main([f"run={tmp_path}"])
    assert "no sign of life" not in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([f"run={tmp_path}", "format=xml"]) == 2
    printed = capsys.readouterr().err
    assert "no status.json in it" in printed
    assert "choose one of text, json" in printed


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("preflight=perhaps", "preflight='perhaps': unknown; choose one of true, false, only"),
        ("watchdog.timeout_s=-1", "watchdog.timeout_s=-1: must be a number of at least 0"),
        ("preemption.exit_code=256", "preemption.exit_code=256: must be a number from 0 to 255"),
        ("preemption.max_restarts=null", "preemption.max_restarts=None: must be a number of at least 0"),
    ],
)
def test_wrong_values_of_preflight_watchdog_and_preemption_are_refused(override: str, problem: str) -> None:
    assert survival_problems(plain(compose_config("finetune", []))) == []
    assert survival_problems(plain(compose_config("finetune", [override]))) == [problem]
