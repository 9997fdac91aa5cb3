# SPDX-License-Identifier: Apache-2.0
"""One process: locates the tensors in a file of torch.save without reading them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_tied_lora.conversion.merging import torch_archive
from nemo_tied_lora.conversion.merging.torch_archive import StoredState
from nemo_tied_lora.errors import ConfigError

START = 1000  # where the archive begins in the file that holds it
SHARED = torch.arange(60.0)
STATE: dict[str, Any] = {
    "a": torch.arange(35.0).reshape(5, 7),
    "half": torch.arange(12).to(torch.bfloat16).reshape(3, 4),
    "first part": SHARED[:12].reshape(3, 4),
    "last part": SHARED[40:].reshape(4, 5),
    "parameter": torch.nn.Parameter(torch.full((2, 2), 3.0)),
    "extra state": io.BytesIO(b"of Transformer Engine"),
    "bytes": b"abc",
    "number": 3,
    "empty": torch.empty(0),
}


def saved(state: Any, **options: Any) -> bytes:
    archive = io.BytesIO()
    torch.save(state, archive, **options)
    return archive.getvalue()


def rewritten(archive: bytes, change: Callable[[str, bytes], bytes | None]) -> bytes:
    """The archive written again by Python's zipfile, without alignment, with records changed or removed."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(written, "w") as new:
        for info in old.infolist():
            content = change(info.filename.partition("/")[2], old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return written.getvalue()


def as_an_older_torch_wrote_it_on_a_gpu(name: str, content: bytes) -> bytes | None:
    if name == "data.pkl":
        return content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    return None if name in (".format_version", ".storage_alignment", "byteorder") else content


def stored(archive: bytes) -> tuple[StoredState, io.BytesIO]:
    file = io.BytesIO(bytes(START) + archive + b"behind it")
    return StoredState(file, START, len(archive), "base: x.ckpt"), file


@pytest.mark.parametrize("form", ["of this torch", "of an older torch, on a GPU"])
def test_every_tensor_is_found_at_the_reported_place(form: str) -> None:
    archive = saved(STATE)
    if form != "of this torch":
        archive = rewritten(archive, as_an_older_torch_wrote_it_on_a_gpu)
    state, file = stored(archive)
    assert set(state.tensors) == {name for name, value in STATE.items() if isinstance(value, torch.Tensor)}
    for name, tensor in state.tensors.items():
        known, record = STATE[name].detach(), state.record(name)
        assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (known.dtype, known.shape, True)
        file.seek(record.position + tensor.storage_offset() * tensor.dtype.itemsize)
        content = file.read(known.numel() * known.dtype.itemsize)
        assert content == known.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert (record.crc.start, record.crc.size) == (record.position, record.size)


def test_no_content_is_read(tmp_path: Path) -> None:
    class Counting(io.FileIO):
        count = 0

        def readinto(self, buffer: Any) -> int:
            size = super().readinto(buffer) or 0
            Counting.count += size
            return size

        def read(self, size: int | None = -1) -> bytes:
            content = super().read(size) or b""
            Counting.count += len(content)
            return content

    path = tmp_path / "large.ckpt"
    torch.save({"a": torch.zeros(5_000_000), "b": torch.zeros(5_000_000)}, path)
    with Counting(path) as file:
        state = StoredState(file, 0, path.stat().st_size, "base: x.ckpt")
        assert state.record("b").size == 20_000_000
    assert Counting.count < 100_000


class _Runs:
    def __reduce__(self) -> Any:
        return print, ("it ran",)


def _with_larger_storage(name: str, content: bytes) -> bytes:
    """data.pkl claims 65 536 + 35 elements; the record has 35."""
    return content.replace(b"K\x23t", b"J\x23\x00\x01\x00t") if name == "data.pkl" else content


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "code": (
        lambda: saved({"a": _Runs()}),
        r"as tensors alone, and is not run: .*GLOBAL (builtins\.)?print was not .*default\.$",
    ),
    "no state dict": (lambda: saved([torch.ones(1)]), "holds no state dict"),
    "no archive": (lambda: b"x" * 2000, "not written by torch.save: File is not a zip file"),
    "another form of torch.save": (
        lambda: saved(STATE, _use_new_zipfile_serialization=False),
        "not written by torch.save",
    ),
    "compressed": (lambda: _compressed(saved(STATE)), "is compressed or damaged"),
    "no description": (lambda: rewritten(saved(STATE), lambda n, c: None if n == "data.pkl" else c), "is not run: "),
    "a damaged description": (
        lambda: rewritten(saved(STATE), lambda n, c: b"\x80\x02garbage." if n == "data.pkl" else c),
        "is not run: ",
    ),
    "a missing record": (
        lambda: rewritten(saved({"a": STATE["a"]}), lambda n, c: None if n == "data/0" else c),
        "is not run: ",
    ),
    "a storage larger than its record": (
        lambda: rewritten(saved({"a": STATE["a"]}), _with_larger_storage),
        "a is not stored as plain bytes",
    ),
}


def _compressed(archive: bytes) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return written.getvalue()


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_but_a_plain_state_dict_is_refused_in_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = REFUSED[kind]
    archive = make()
    with pytest.raises(ConfigError, match=message) as refusal:
        stored(archive)[0].record("a")
    assert len(str(refusal.value).splitlines()) == 1
    assert capsys.readouterr().out == ""


def test_a_torch_that_does_not_report_offsets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.6 also loads without contents, but records no offsets."""

    def of_an_older_torch(*_: Any) -> dict[str, torch.Tensor]:
        with FakeTensorMode():
            return {"a": torch.empty(5, 7)}

    monkeypatch.setattr(torch_archive, "load_tensors", of_an_older_torch)
    with pytest.raises(ConfigError, match=r"torch 2\.\S+ cannot report where a is; use torch 2\.7 or later"):
        stored(saved({"a": STATE["a"]}))[0].record("a")
