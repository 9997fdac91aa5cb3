# SPDX-License-Identifier: Apache-2.0
"""Gets packages and lists with this machine's apt, into a folder of its own. Needs no root, installs nothing.

apt's sources and keys are the machine's, so that mirrors and proxies work, and signatures are checked.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.progress import Progress

__all__ = ["Apt"]

_PROGRAMS = ("apt-get", "apt-cache", "dpkg-deb")
_POLL_S = 0.2


class Apt:
    """apt with state and cache in `folder`, which must be new.

    Args:
        languages: those of the package descriptions to get.

    Raises:
        ConfigError: a program is missing, or the lists cannot be got.
    """

    def __init__(self, folder: Path, languages: Sequence[str] = ("none",)) -> None:
        missing = [program for program in _PROGRAMS if shutil.which(program) is None]
        if missing:
            raise ConfigError([f"{', '.join(missing)}: not found; this is there on Debian and Ubuntu"])
        folder = folder.resolve()
        self._folder = folder
        for name in ("lists/partial", "cache/archives/partial", "packages"):
            (folder / name).mkdir(parents=True)
        values = {
            "Dir::State": folder,
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": folder / "cache",
            "APT::Sandbox::User": "",  # or apt would need root to become another user
            "Acquire::Languages": ",".join(languages),
            "Acquire::GzipIndexes": "false",
            "Acquire::Retries": "3",
        }
        self._options = [word for key, value in values.items() for word in ("-o", f"{key}={value}")]
        said = self._run("apt-get", "update", desc="apt: lists", allowed_to_fail=True)
        if not any(folder.glob("lists/*_Packages")):
            raise ConfigError([f"apt-get update: {_reason(said)}"])

    def versions(self, packages: Sequence[str]) -> dict[str, str]:
        """The version of each package that would be got.

        Raises:
            ConfigError: this machine's apt does not know a package.
        """
        found = {}
        for package in packages:
            shown = self._run("apt-cache", "show", "--no-all-versions", package, allowed_to_fail=True)
            version = re.search(r"^Version: (\S+)", shown, re.M)
            if version is not None:
                found[package] = version[1]
        missing = [package for package in packages if package not in found]
        if missing:
            raise ConfigError([f"the sources of this machine's apt have no package {', '.join(missing)}"])
        return found

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Downloads the packages' files, in the order of `packages`.

        Raises:
            ConfigError: a download fails, or the disk has no room.
        """
        listed = self._run("apt-get", "download", "--print-uris", *packages)
        sizes = [int(size) for size in re.findall(r"^'\S+' \S+ (\d+)", listed, re.M)]
        free = shutil.disk_usage(self._folder).free
        if free < sum(sizes) * 1.2:
            raise ConfigError(
                [f"{self._folder}: no room on disk for {sum(sizes):,} bytes of packages; {free:,} are free"]
            )
        self._run("apt-get", "download", *packages, desc="apt: packages", total=sum(sizes))
        return [next(self._folder.glob(f"packages/{package}_*.deb")) for package in packages]

    def unpack(self, package: Path, pattern: str) -> list[Path]:
        """Unpacks the files of a package whose path matches the shell pattern. Returns them, sorted."""
        target = self._folder / "unpacked" / package.stem
        target.mkdir(parents=True)
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as archive:
            subprocess.run(
                ["tar", "-x", "-C", target, "--wildcards", pattern], stdin=archive.stdout, stderr=subprocess.DEVNULL
            )  # tar fails if nothing matches
        return sorted(path for path in target.rglob("*") if path.is_file())

    def descriptions(self, language: str) -> tuple[str, Path]:
        """(archive, file) of the descriptions of packages in a language, from the archive with most of them.

        Raises:
            ConfigError: there are none.
        """
        fields = "$(CREATED_BY)|$(LANGUAGE)|$(CODENAME)|$(COMPONENT)|$(FILENAME)"
        listed = self._run("apt-get", "indextargets", "--format", fields)
        found = [line.split("|") for line in listed.splitlines() if line.startswith(f"Translations|{language}|")]
        there = [
            (Path(file).stat().st_size, f"{name} {part}", Path(file))
            for *_, name, part, file in found
            if Path(file).is_file()
        ]
        if not there:
            raise ConfigError([f"the sources of this machine's apt have no descriptions of packages in {language!r}"])
        _, archive, file = max(there)
        return archive, file

    def _run(
        self, program: str, *arguments: str, desc: str = "", total: int | None = None, allowed_to_fail: bool = False
    ) -> str:
        """Runs a program. With `desc`, shows how many bytes it has got."""
        command = [program, *self._options, *arguments]
        place = self._folder / "packages"
        output = self._folder / "output"
        with output.open("w") as log, subprocess.Popen(command, cwd=place, stdout=log, stderr=log) as process:
            try:
                if desc:
                    for _ in _shown(desc, total, self._folder):
                        if process.poll() is not None:
                            break
                code = process.wait()
            except BaseException:
                process.kill()
                raise
        said = output.read_text(errors="replace")
        if code and not allowed_to_fail:
            raise ConfigError([f"{program} {arguments[0]}: {_reason(said)}"])
        return said


def _shown(desc: str, total: int | None, folder: Path) -> Iterator[None]:
    """Yields again and again; shows the size of the folder's files in between."""
    before = _size(folder)
    with Progress(desc=desc, total=total, unit="bytes", unit_scale=True) as bar:
        while True:
            yield
            time.sleep(_POLL_S)
            bar.update(max(0, _size(folder) - before - bar.n))


def _size(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # apt has just renamed it
    return found


def _reason(said: str) -> str:
    """apt's own error, in one line."""
    errors = [line[3:] for line in said.splitlines() if line.startswith(("E: ", "W: "))]
    return errors[0] if errors else (said.strip().splitlines() or ["failed"])[-1]
