# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile without Docker: its installation, run as it stands in a virtual environment with a container's packages.

The packages are empty wheels with the names of the container's, and versions as NVIDIA writes them, so that whatever pip
would like to replace is seen. hadolint reads the Dockerfile in tests/project/test_linters.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import packaging
import pytest

from nemo_tied_lora.commands.main import COMMANDS
from tests.harness.paths import ROOT

# Name: (version, what it asks for).
CONTAINER = {
    "torch": ("2.8.0a0+34c6371d24.nv25.8", ()),
    "nemo-toolkit": ("2.4.0rc0", ("torch", "a-package-that-nobody-has")),
    "megatron-core": ("0.13.0rc4", ("torch",)),
    "transformer-engine": ("2.5.0+f05f12c", ()),
    "apex": ("0.1", ()),
    "hydra-core": ("1.3.2", ("antlr4-python3-runtime==4.9.3",)),
    "antlr4-python3-runtime": ("4.9.3", ()),
    "matplotlib": ("3.9.0", ("numpy",)),
    "numpy": ("1.26.4", ()),
    "omegaconf": ("2.3.0", ()),
    "PyYAML": ("6.0.2", ()),
    "safetensors": ("0.5.3", ("an-extra-package ; extra == 'all'",)),
    "psutil": ("7.0.0", ()),
    "tqdm": ("4.67.1", ()),
}
# What the index offers beside: num2words asks for another NumPy here, to tempt.
INDEX = {"num2words": ("0.5.14", ("docopt>=0.6.2", "numpy>=2")), "docopt": ("0.6.2", ()), "numpy": ("2.1.0", ())}


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def empty_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...]) -> Path:
    """Writes a wheel that contains only metadata."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    about = f"{stem}.dist-info"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "".join(f"{about}/{f},,\n" for f in ("METADATA", "WHEEL", "RECORD")))
    return folder / f"{stem}-py3-none-any.whl"


class Imitation:
    """A virtual environment instead of the container's Python, and the Dockerfile's steps to run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        for path in Path(packaging.__file__).parents[1].glob("packaging*"):  # the one module that is really called
            shutil.copytree(path, site / path.name)
        for name in ("wheels", "index", "context", "sources"):
            (folder / name).mkdir()
        for name, (version, requires) in INDEX.items():
            empty_wheel(folder / "index", name, version, requires)

    def build(self) -> None:
        """Runs the first stage: builds the wheel with the Dockerfile's own line and this environment's build tools."""
        (line,) = re.findall(r"^RUN python (-m pip wheel .*)$", dockerfile(), flags=re.M)
        words = [str(self.folder / "context") if word == "/wheels" else word for word in line.split()]
        for name in re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile().partition("FROM ${BASE}\n")[0], flags=re.M):
            for part in name.split():
                copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
                copy(ROOT / part, self.folder / "sources" / part)  # type: ignore[operator]
        subprocess.run([sys.executable, *words], cwd=self.folder / "sources", check=True, capture_output=True)

    def bring(self, *names: str) -> None:
        """Installs packages of the container."""
        wheels = [empty_wheel(self.folder / "wheels", name, *CONTAINER[name]) for name in names]
        self._run("-m", "pip", "install", "--no-deps", "--no-index", *map(str, wheels)).check_returncode()

    def install(self, change: tuple[str, str] = ("", "")) -> subprocess.CompletedProcess[str]:
        """Runs the second stage's installation with the Dockerfile's own line, after a change of the script."""
        context, stage = self.folder / "context", dockerfile().partition("FROM ${BASE}\n")[2]
        for name in " ".join(re.findall(r"^COPY (?!--)(.+) /tmp/tied-lora/$", stage, flags=re.M)).split():
            shutil.copy(ROOT / name, context)
        (line,) = re.findall(r"^RUN python (/tmp/tied-lora/.*)$", stage, flags=re.M)
        script, *words = (word.replace("/tmp/tied-lora", str(context)) for word in line.split())
        text = Path(script).read_text()
        assert change[0] in text
        Path(script).write_text(text.replace(*change))
        return self._run(script, *words)

    def versions(self) -> dict[str, str]:
        listed = self._run("-m", "pip", "list", "--format=freeze").stdout
        return dict(re.findall(r"^(\S+)==(\S+)$", listed, flags=re.M))

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.folder / "index")}
        # Not in a source checkout, whose egg-info would count as an installed package.
        words = (str(self.python), *words)
        return subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def imitation(tmp_path_factory: pytest.TempPathFactory) -> Imitation:
    made = Imitation(tmp_path_factory.mktemp("container"))
    made.build()
    return made


def test_no_package_of_the_container_changes_its_version(imitation: Imitation) -> None:
    imitation.bring(*(name for name in CONTAINER if name != "apex"))
    refused = imitation.install()
    assert refused.returncode == 1
    assert "BASE has no apex: use NVIDIA's NeMo container" in refused.stderr
    imitation.bring("apex")
    before = imitation.versions()
    assert before["numpy"] == "1.26.4"
    done = imitation.install()
    assert done.returncode == 0, done.stderr
    after = imitation.versions()
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"nemo_tied_lora", "num2words", "docopt"}
    assert "unchanged: torch 2.8.0a0+34c6371d24.nv25.8 nemo-toolkit 2.4.0rc0" in done.stdout
    assert "added: docopt 0.6.2 nemo-tied-lora 0.1.0 num2words 0.5.14" in done.stdout
    tempted = imitation.install(('"--no-deps", *what', '"--upgrade", "--upgrade-strategy", "eager", *what'))
    assert tempted.returncode == 1
    assert "the installation changed what the container brought: numpy 1.26.4 -> 2.1.0" in tempted.stderr


def test_dockerignore_keeps_everything_that_the_dockerfile_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    copied = " ".join(re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile(), flags=re.M)).split()
    assert "launch/container/install.py" in copied
    for name in copied:
        assert (ROOT / name).exists()
        assert any(f"!{folder}" in lines for folder in (name, *map(str, Path(name).parents))), name


def test_the_installed_command_is_the_entrypoint_and_finds_its_configs(imitation: Imitation) -> None:
    assert re.search(r'^ENTRYPOINT \["tied-lora"\]\nCMD \["--help"\]$', dockerfile(), flags=re.M)
    (wheel,) = (imitation.folder / "context").glob("*.whl")
    place = imitation.folder / "unpacked"
    zipfile.ZipFile(wheel).extractall(place)
    environment = {**os.environ, "PYTHONPATH": str(place)}
    shown = subprocess.run(
        [sys.executable, "-c", "from nemo_tied_lora.commands.main import entry; entry()", "--help"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(command in shown for command in COMMANDS)


def test_the_image_runs_as_any_user_on_any_base_and_needs_no_network() -> None:
    lines = dockerfile().splitlines()
    assert [line for line in lines if line.startswith("FROM")] == ["FROM ${BASE} AS build", "FROM ${BASE}"]
    assert sum(line.startswith("ARG BASE=") for line in lines) == 1
    assert [line for line in lines if line.startswith("USER")] == ["USER ${UID}"]
    (uid,) = re.findall(r"^ARG UID=(\d+)$", dockerfile(), flags=re.M)
    assert int(uid) > 0
    assert lines.index("USER ${UID}") > max(i for i, line in enumerate(lines) if line.startswith(("RUN", "COPY")))
    assert re.search(r"^ENV .*HF_HUB_OFFLINE=1", dockerfile(), flags=re.M)
