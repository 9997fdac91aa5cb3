# SPDX-License-Identifier: Apache-2.0
"""Reads files from a `.nemo` that NeMo wrote: a tar, plain or compressed. Unpacks nothing to disk, and unpickles nothing.

`checkpoint.tar` reads this package's own adapters, more strictly.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path

__all__ = ["read_members"]


def read_members(path: Path, names: Collection[str], max_bytes: int) -> dict[str, bytes]:
    """Returns the contents of the named regular files. Leaves out names that the tar does not have.

    It stops reading after the last of them, because a base's tar is as large as its model.

    Args:
        names: without a leading "./".
        max_bytes: the largest size that one of them may claim, so that a small tar cannot fill the memory.

    Raises:
        tarfile.TarError: not a tar, or damaged, or a file claims more than `max_bytes`.
        OSError: the file cannot be read.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for info in tar:
                name = info.name.removeprefix("./")
                if name not in names or not info.isreg():
                    continue
                if info.size > max_bytes:
                    raise tarfile.ReadError(f"its {name} claims {info.size} bytes")
                found[name] = tar.extractfile(info).read()  # type: ignore[union-attr]
                if len(found) == len(names):
                    break
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise tarfile.ReadError(str(error)) from error
    return found
