# SPDX-License-Identifier: Apache-2.0
"""Files out of a `.nemo` that NeMo wrote: a tar, plain or compressed. Nothing is unpacked to disk, and nothing is unpickled.

Adapters of this package are read more strictly: see `checkpoint.tar`.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path

__all__ = ["read_members"]


def read_members(path: Path, names: Collection[str], max_bytes: int) -> dict[str, bytes]:
    """The contents of the named plain files, without a leading "./" in their names; what is not there is left out.

    Reading ends with the last of them, for a base's tar is as large as its model.

    Args:
        max_bytes: the most that one of them may claim to hold, so that a small file cannot fill the memory.

    Raises:
        tarfile.TarError: no tar, a damaged one, or a file that claims more.
        OSError: it cannot be read.
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
