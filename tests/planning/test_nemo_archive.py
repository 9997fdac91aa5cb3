# SPDX-License-Identifier: Apache-2.0
"""Pure Python: reading files from a tar that NeMo wrote."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_tied_lora.planning.nemo_archive import read_members

LARGE = bytes(range(256)) * 400
MEMBERS = {"./model_config.yaml": b"a: 1\n", "large": LARGE, "other": LARGE}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


def tar_of(path: Path, pack: Callable[[bytes], bytes] = bytes) -> Path:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "large"
        tar.addfile(link)
    path.write_bytes(pack(content.getvalue()))
    return path


@pytest.mark.parametrize("form", PACKERS)
def test_only_the_named_files_are_read_from_every_form(tmp_path: Path, form: str) -> None:
    path = tar_of(tmp_path / "a.nemo", PACKERS[form])
    found = read_members(path, ("model_config.yaml", "large", "link", "absent"), 1 << 20)
    assert found == {"model_config.yaml": b"a: 1\n", "large": LARGE}


def test_reading_stops_after_the_last_named_file(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.nemo")
    path.write_bytes(path.read_bytes()[: 4 * 512 + len(LARGE) + 1000])  # in the middle of "other"
    assert read_members(path, ("model_config.yaml", "large"), 1 << 20)["large"] == LARGE


def test_a_file_that_claims_too_many_bytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.nemo")
    with pytest.raises(tarfile.ReadError, match=f"its large claims {len(LARGE)} bytes"):
        read_members(path, ("large",), len(LARGE) - 1)


@pytest.mark.parametrize("form", PACKERS)
@pytest.mark.parametrize("change", ["cut short", "overwritten"])
def test_every_damaged_file_raises_a_tar_error(tmp_path: Path, form: str, change: str) -> None:
    path = tar_of(tmp_path / "a.nemo", PACKERS[form])
    whole = path.read_bytes()
    half = whole[: len(whole) // 2]
    path.write_bytes(half if change == "cut short" else b"\x00" * 8 + half[8:])
    if form == "plain" and change == "overwritten":
        path.write_bytes(b"x" * len(whole))
    with pytest.raises(tarfile.TarError):
        read_members(path, ("other",), 1 << 20)
