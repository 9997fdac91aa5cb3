# SPDX-License-Identifier: Apache-2.0
"""README, docs/ and CONTRIBUTING name folders, files, links, commands and Python that exist. Pure text."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nemo_tied_lora.commands.main import COMMANDS, main
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.composing.yaml_sources import YamlSources
from tests.harness.paths import ROOT
from tests.project import room_diagram

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
PACKAGE = ROOT / "nemo_tied_lora"
# Top-level files of the package that need no place on a map.
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
MODULES = sorted(path.name for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_readme_is_short_and_shows_python_before_the_quickstart() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert lines.index("```python") < lines.index("## Quickstart")
    assert lines.index("## Quickstart") < lines.index("## Install") < lines.index("## Fine-tune")


def test_readmes_map_lists_the_packages_folders() -> None:
    drawn = (
        README.read_text()
        .split("<!-- rooms: ")[1]
        .partition("\n    nemo_tied_lora/\n")[2]
        .partition("\n    configs/")[0]
    )
    names = [word for line in drawn.splitlines() for word in re.findall(r"^ {6}(\S+)|(?<=  )(\w+\.py)", line)]
    found = sorted(name for pair in names for name in pair if name)
    assert found == sorted([*(f"{room}/" for room in ROOMS), *MODULES])


def test_the_tour_has_a_row_for_each_room_and_names_existing_files() -> None:
    page = (DOCS / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \|.*\| `(\S+)` \|$", page, flags=re.M)
    assert sorted(room for room, _ in rows) == ROOMS
    assert [f"{room}/{file}" for room, file in rows if not (PACKAGE / room / file).is_file()] == []
    assert [name for name in MODULES if f"`{name}`" not in page] == []


def test_the_diagram_of_rooms_matches_the_imports() -> None:
    page = room_diagram.PAGE.read_text()
    assert room_diagram.in_page(page) == page, "run python -m tests.project.room_diagram --write"
    arrows = room_diagram.without_detours({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert arrows == [("a", "b"), ("b", "c")], "a -> c follows from the others"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_has_a_target(page: Path) -> None:
    assert broken_links(page.read_text(), page) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](docs/none.md) [b](README.md#no-such-heading) ![c](docs/none.png) [d](docs/support.md#limits) [e](#install)"
    assert broken_links(text, README) == ["docs/none.md", "README.md#no-such-heading", "docs/none.png"]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_path_on_a_page_exists(page: Path) -> None:
    assert missing_paths(page.read_text()) == []


def test_a_path_that_does_not_exist_is_found() -> None:
    assert missing_paths("`tests/no_such.py`, `adapter/none.py`, `configs/plan.yaml`, `adapter/inject.py`") == [
        "tests/no_such.py",
        "adapter/none.py",
    ]


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"^\| \[\S+\]\((\S+)\)", (DOCS / "README.md").read_text(), flags=re.M))
    assert listed == {page.name for page in DOCS.glob("*.md")} - {"README.md"} | {
        "../CONTRIBUTING.md",
        "../CHANGELOG.md",
    }


def test_the_page_of_commands_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| \[`([\w-]+)`\]\(#", (DOCS / "commands.md").read_text(), flags=re.M)
    assert sorted(rows) == sorted(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_on_a_page_composes(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text("name: mine\n")  # a user's own YAML
    (tmp_path / "my_configs" / "task").mkdir(parents=True)
    (tmp_path / "my_configs" / "task" / "mine.yaml").write_text("# @package _global_\n")  # a user's own group
    for line in command_lines(page.read_text()):
        assert composes(line), f"{line}\n{capsys.readouterr().err}"
    capsys.readouterr()


@pytest.mark.parametrize(
    "line",
    [
        "tied-lora finetune model.optim.learning_rate=1",
        "tied-lora finetune model.peft.tied_lora.adapter_dim=8",
        "tied-lora explain x=1",
        "tied-lora plan layout=tp5",
    ],
)
def test_a_command_that_does_not_compose_is_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(command_lines(f"    {line}\n")) == list(command_lines(f"`{line}`")) == [line]
    assert not composes(line)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_the_python_on_a_page_imports_is_exported(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(PACKAGE.name):
                assert {alias.name for alias in node.names} <= exported(str(node.module)), node.module


def test_pre_commit_runs_what_make_lint_and_typecheck_run_and_downloads_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {(hook["language"], hook["pass_filenames"]) for hook in hooks} == {("system", False)}
    makefile = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(RUFF|IMPORTS|TYPES) := (.*)$", makefile, flags=re.M))
    recipes = re.findall(r"^(?:lint|typecheck):.*\n((?:\t.*\n)+)", makefile, flags=re.M)
    lines = [
        re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], line.strip()) for r in recipes for line in r.splitlines()
    ]
    commands = [command for line in lines for command in line.replace("$(BIN)", ".venv/bin").split(" && ")]
    assert [hook["entry"] for hook in hooks] == commands


def broken_links(text: str, page: Path) -> list[str]:
    """Returns the links and pictures of a page whose file or heading does not exist."""
    broken = []
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def anchors(text: str) -> set[str]:
    """Returns GitHub's anchor of each heading."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_paths(text: str) -> list[str]:
    """Returns files and folders in backticks that exist neither in the project's root nor in the package."""
    tops = "|".join(["tests", "configs", "docs", "benchmarks", "launch", "nemo_tied_lora"])
    named = re.findall(rf"`((?:{tops})/[\w./-]*|(?:{'|'.join(ROOMS)})/[\w/]*\.py)`", text)
    return [name for name in named if not (ROOT / name).exists() and not (PACKAGE / name).exists()]


def command_lines(text: str) -> Iterator[str]:
    """Returns each `tied-lora command key=value` of a page, on a separate line or within a sentence."""
    joined = re.sub(r" \\\n\s*", " ", text)
    own = re.findall(r"^(?:    |\$ )(tied-lora .*)$", joined, flags=re.M)
    for line in [*own, *re.findall(r"`(tied-lora \S[^`]*)`", joined)]:
        if re.match(r"tied-lora [a-z-]+( |$)", line) and "${" not in line:  # the test of the cluster page runs those
            yield line


def composes(line: str) -> bool:
    """Whether the command's configuration composes, including the adapter's keys, which `finetune` reads later."""
    words = shlex.split(line.replace("<name>", "name"), comments=True)[1:]
    command, *overrides = [word for word in words if word not in ("...", "--cfg", "job")]
    if "--help" in overrides:
        return command in COMMANDS
    if main([command, *overrides, "--cfg", "job"]) != 0:
        return False
    if command in ("finetune", "plan"):
        keys = [word for word in overrides if not word.startswith("--")]
        folders = [Path(word.partition("=")[2]) for word in overrides if word.startswith("--config-dir=")]
        sources = YamlSources(config_dir=folders[0].resolve()) if folders else None
        section = plain(compose_config(command, keys, sources))["model"]["peft"].get("tied_lora")
        try:
            TiedLoraConfig.from_mapping(section or {})
        except ConfigError:
            return False
    return True


def exported(module: str) -> set[str]:
    """Returns a module's `__all__` without importing it."""
    path = ROOT / Path(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()
