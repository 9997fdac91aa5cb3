# SPDX-License-Identifier: Apache-2.0
"""A `.nemo` of a few named members, read into memory and never unpacked to disk."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from nemo_tied_lora.config import ConfigError

__all__ = ["read_tar", "write_tar"]


def write_tar(file: IO[bytes], members: Mapping[str, bytes]) -> None:
    """An uncompressed tar, as NeMo's are."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def read_tar(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The named members' contents.

    Raises:
        ConfigError: no tar, or a member is missing, is no plain file, or is shorter than it says.
    """
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, mode="r:*") as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if name in names and info.isreg() and info.size <= path.stat().st_size:
                    members[name] = tar.extractfile(info).read()  # type: ignore[union-attr]
                    if len(members[name]) != info.size:
                        raise ConfigError([f"{path}: truncated in {info.name!r}"])
    except (tarfile.TarError, OSError) as error:
        raise ConfigError([f"{path}: not a whole .nemo file: {error}"]) from error
    missing = [name for name in names if name not in members]
    if missing:
        raise ConfigError([f"{path}: {', '.join(missing)} is missing"])
    return members
