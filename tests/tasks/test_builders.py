# SPDX-License-Identifier: Apache-2.0
"""What builders make of apt's packages and lists: of a small archive on this disk, with the real apt, and of texts. Pure Python."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.tasks.builders import apt as apt_module
from nemo_tied_lora.tasks.builders.debian_descriptions import (
    Description,
    questions,
    read_descriptions,
    summaries,
    translations,
)
from nemo_tied_lora.tasks.builders.wesnoth import pairs, read_mo
from nemo_tied_lora.tasks.prepare import prepare
from nemo_tied_lora.tasks.task import Task
from tests.harness.paths import ROOT

HAS_APT = all(shutil.which(program) for program in ("apt-get", "apt-cache", "dpkg-deb"))
ORDERS = ("<", ">")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def task(name: str, *overrides: str) -> Task:
    return Task.from_config(plain(compose_config("finetune", [f"task={name}", *overrides]))["task"])


def catalogue(path: Path, texts: dict[str, str], order: str = "<") -> Path:
    """Writes a gettext catalogue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words = [word.encode() for word in (*texts, *texts.values())]
    start, places, content = 28 + 8 * len(words), [], b""
    for word in words:
        places += [len(word), start + len(content)]
        content += word + b"\0"
    head = (0x950412DE, 0, len(texts), 28, 28 + 8 * len(texts), 0, 0)
    path.write_bytes(struct.pack(f"{order}7I{len(places)}I", *head, *places) + content)
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_a_catalogue_of_either_byte_order_gives_texts_without_contexts_and_first_plural_forms(order: str) -> None:
    texts = {"": "Language: de", "menu\x04Open it": "Öffnen", "One day\0%d days": "Ein Tag\0%d Tage"}
    assert list(read_mo(catalogue(Path("a.mo"), texts, order))) == [("Open it", "Öffnen"), ("One day", "Ein Tag")]


def test_only_plain_sentences_are_paired_and_each_once() -> None:
    long = "We have reached the old river at last, and we will cross it number"
    texts = {
        f"scene^{long} {n}.": f"Wir haben den alten Fluss erreicht und werden ihn überqueren {n}." for n in range(300)
    }
    texts |= {"Too short.": "Zu kurz.", f"{long} <b>x</b>": "Wir haben den alten Fluss erreicht, x y z a b c"}
    texts |= {
        f"{long} $gold now": "Wir haben den alten Fluss erreicht, x y z a b c",
        f"{long} yes": "<i>Wir haben den Fluss</i> erreicht, ja ja",
    }
    texts |= {f"{long} far": "kurz", f"{long} no": ""}
    found = list(pairs([catalogue(Path(name), texts) for name in ("a.mo", "b.mo")], "de"))
    assert len(found) == 300
    assert found[0]["en"] == f"{long} 0."
    assert {one["split"] for one in found} == {"train", "validation", "test"}


LIST = """Package: alpha
Description-md5: aa
Description-{0}: {1}short program for all {2}
 A first line {2}
 continues.
  * item {2}
 .
 Second {2}.

Package: beta
Description-md5: bb
Description-{0}: other {2}
 Text {2}.

Package: none
Description-md5: cc
"""


def test_a_list_of_descriptions_is_read_by_paragraphs() -> None:
    found = read_descriptions(LIST.format("en", "a ", "x"), "en")
    assert list(found) == ["aa", "bb"]
    assert (found["aa"].package, found["aa"].synopsis) == ("alpha", "a short program for all x")
    assert found["aa"].paragraphs == ["A first line x continues. \n* item x", "Second x."]


def described(count: int) -> dict[str, Description]:
    """Packages whose descriptions share words with their neighbours."""
    kinds = ("puzzle", "editor", "server", "compiler", "browser")
    texts = {}
    for n in range(count):
        kind = kinds[n % 5]
        line = f"The program number {n} is a {kind} that runs quickly and has a window of its own for users."
        texts[f"m{n}"] = Description(
            f"{'abcdefgh'[n % 8]}{n}",
            f"small fast {kind} for everyone {n}",
            f"{line}\n\nIt also works {n} times on slow machines, with little memory and no network at all.",
        )
    return texts


def test_summaries_have_one_of_each_family_and_no_package_is_asked_about_too(monkeypatch: pytest.MonkeyPatch) -> None:
    english = described(60)
    english["twin"] = Description("twin", "small fast twin for everyone", english["m0"].text)
    english["doc"] = Description("a-doc", "small fast puzzle for everyone", english["m1"].text.replace("1", "one"))
    monkeypatch.setattr(
        "nemo_tied_lora.tasks.builders.debian_descriptions._SUMMARIES", {"test": 10, "validation": 5, "train": 15}
    )
    found = list(summaries(english))
    assert [one["split"] for one in found] == ["test"] * 10 + ["validation"] * 5 + ["train"] * 15
    assert list(summaries(dict(english))) == found
    assert "a-doc" not in {one["package"] for one in found}
    asked = list(questions(english))
    assert len(asked) > 20
    assert not {one["answer"] for one in asked} & {one["package"] for one in found}
    for one in asked:
        assert one["context"][one["start"] :].startswith(f"{one['answer']}: ")
        assert one["context"].count("The program number") == 4


def test_questions_do_not_depend_on_the_order_of_sets() -> None:
    script = "import json; from tests.tasks.test_builders import *; print(json.dumps(list(questions(described(80)))))"
    found = {run_python(script, PYTHONHASHSEED=seed) for seed in ("1", "2")}
    assert len(found) == 1
    assert found.pop() == json.dumps(list(questions(described(80)))) + "\n"


def run_python(script: str, **variables: str) -> str:
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_translations_pair_paragraphs_only_where_both_have_as_many() -> None:
    one = Description(
        "alpha", "a program for all of us", "It runs fast on any machine.\n\nIt is small and simple too."
    )
    same = Description(
        "alpha", "ein Programm für uns alle", "Es läuft schnell auf jedem Rechner.\n\nEs ist auch klein und einfach."
    )
    other = Description("alpha", "ein Programm für uns alle", "Es läuft schnell auf jedem Rechner.")
    assert [pair["en"] for pair in translations({"a": one}, {"a": same}, "de")] == [one.synopsis, *one.paragraphs]
    assert [pair["de"] for pair in translations({"a": one}, {"a": other}, "de")] == [other.synopsis]


def archive(folder: Path) -> None:
    """An archive with one package and the lists of its descriptions, and an apt that knows this archive alone."""
    release = folder / "archive" / "dists" / "small"
    package = folder / "package"
    text = "The old river is near, and number {} of us will cross it."
    texts = {text.format(n): f"Der alte Fluss ist nah, und Nummer {n} von uns geht hinüber." for n in range(200)}
    catalogue(package / "usr/share/games/wesnoth/1.16/locale/de/LC_MESSAGES/wesnoth.mo", texts)
    (package / "DEBIAN").mkdir()
    control = "Package: wesnoth-1.16-data\nVersion: 1:1.16.9-1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: a game\n"
    (package / "DEBIAN" / "control").write_text(control)
    deb = folder / "archive" / "pool.deb"
    deb.parent.mkdir()
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", package, deb], check=True, capture_output=True)
    facts = f"Filename: pool.deb\nSize: {deb.stat().st_size}\nSHA256: {hashlib.sha256(deb.read_bytes()).hexdigest()}\n"
    files = {
        "main/i18n/Translation-en": LIST.format("en", "a ", "of us"),
        "main/i18n/Translation-de": LIST.format("de", "eine ", "von uns"),
    }
    for kind in ("all", "amd64", "arm64"):
        files[f"main/binary-{kind}/Packages"] = control + facts
    sums = ""
    for name, content in files.items():
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).write_text(content)
        sums += f" {hashlib.sha256(content.encode()).hexdigest()} {len(content.encode())} {name}\n"
    (release / "Release").write_text(
        f"Codename: small\nSuite: small\nComponents: main\nArchitectures: all amd64 arm64\nSHA256:\n{sums}"
    )
    (folder / "sources.list").write_text(f"deb [trusted=yes] file:{folder}/archive small main\n")
    (folder / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{folder}/sources.list";\nDir::Etc::SourceParts "/dev/null";\n'
    )
    os.environ["APT_CONFIG"] = str(folder / "apt.conf")


@pytest.fixture
def small_archive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the real apt. Where there is none, they see that this is said."""
    monkeypatch.setenv("APT_CONFIG", "")
    if HAS_APT:
        archive(folder)


def refused(task: Task) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(task)
    return "\n".join(caught.value.problems)


@pytest.mark.usefixtures("small_archive")
def test_packages_are_built_once_and_their_versions_recorded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = task("translate_wesnoth_en_de", "task.source.options.parts=[data]")
    if not HAS_APT:
        assert "not found; this is there on Debian and Ubuntu; or build elsewhere" in refused(chosen)
        return
    found = prepare(chosen)
    assert sum(found.counts.values()) == 200
    assert found.record["origin"] == {"packages": {"wesnoth-1.16-data": "1:1.16.9-1"}}
    assert next(found.items("train"))["input"].startswith("English: The old river is near, and number ")
    assert "building its data with wesnoth, once" in capsys.readouterr().err
    (made,) = (folder / "cache" / "tied-lora").glob("*.gz")
    assert sorted(path.suffix for path in made.parent.iterdir()) == [".gz", ".lock", ".origin"], (
        "downloads are removed"
    )
    shutil.rmtree(folder / "archive")
    assert prepare(chosen, "elsewhere").checksum == found.checksum
    (folder / "ready").mkdir()
    shutil.copy(made, folder / "ready" / "translate_wesnoth_en_de.jsonl.gz")
    ready = task("translate_wesnoth_en_de", "task.source.folder=ready", "task.folder=third")
    assert prepare(ready).checksum == found.checksum


@pytest.mark.usefixtures("small_archive")
def test_lists_are_read_and_their_checksums_recorded() -> None:
    chosen = task("translate_debian_en_de")
    if not HAS_APT:
        assert "not found; this is there on Debian and Ubuntu" in refused(chosen)
        return
    assert "has no split " in refused(chosen), "two packages are too few for three splits"
    (made,) = Path("cache/tied-lora").glob("*.gz")
    (record,) = map(json.loads, gzip.decompress(made.read_bytes()).splitlines())
    assert (record["en"], record["de"]) == ("a short program for all of us", "eine short program for all von uns")
    origin = json.loads(made.with_suffix(".origin").read_text())
    assert origin["en"]["archive"] == "small main"
    assert origin["de"]["sha256"] == hashlib.sha256(LIST.format("de", "eine ", "von uns").encode()).hexdigest()


@pytest.mark.usefixtures("small_archive")
def test_what_apt_cannot_do_is_one_line_with_a_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way_out = (
        "; or build elsewhere, and name the folder with translate_wesnoth_en_de.jsonl.gz: task.source.folder=FOLDER"
    )
    if HAS_APT:
        found = refused(task("translate_wesnoth_en_de", "task.source.options.parts=[data, low]"))
        package = "the sources of this machine's apt have no package wesnoth-1.16-low"
        assert found == f"task.source.builder=wesnoth: {package}{way_out}"
        usage = shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(apt_module.shutil, "disk_usage", lambda path: usage)
            assert "no room on disk for " in refused(
                task("translate_wesnoth_en_de", "task.source.options.parts=[data]")
            )
        shutil.rmtree(folder / "archive")
        assert "apt-get update: Failed to fetch file:" in refused(task("translate_wesnoth_en_de"))
    monkeypatch.setenv("PATH", str(folder))
    missing = "apt-get, apt-cache, dpkg-deb: not found; this is there on Debian and Ubuntu"
    assert refused(task("translate_wesnoth_en_de")) == f"task.source.builder=wesnoth: {missing}{way_out}"
    assert {path.suffix for path in (folder / "cache" / "tied-lora").iterdir()} == {".lock"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["task.source.builder=chess"],
            "task.source.builder='chess': unknown; choose one of debian_descriptions, gsm_symbolic, ",
        ),
        (["task.source.options.parts=data"], "task.source.options.parts='data': must be a list of parts of the game"),
        (["task.source.options.language=null"], "task.source.options.language=None: must be a text"),
        (
            ["++task.source.options.kind_of=x"],
            "task.source.options.kind_of: not a key of task.source.options; choose from",
        ),
        (["task.source.folder=none"], "task.source.folder=none: holds neither translate_wesnoth_en_de.jsonl.gz nor "),
    ],
)
def test_a_wrong_builder_is_named(overrides: list[str], message: str) -> None:
    assert message in refused(task("translate_wesnoth_en_de", *overrides))


def test_a_cache_that_cannot_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    assert "cannot be written: Not a directory; set XDG_CACHE_HOME" in refused(task("translate_wesnoth_en_de"))
