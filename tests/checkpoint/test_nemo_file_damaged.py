# SPDX-License-Identifier: Apache-2.0
"""One process with limited memory: a changed adapter file is refused, or loads with unchanged contents."""

from __future__ import annotations

import gzip
import io
import os
import random
import resource
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_tied_lora.checkpoint.nemo_adapter_format import seal
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile, AdapterFileError, is_adapter_file, read_adapter
from nemo_tied_lora.config import TiedLoraConfig
from tests.harness.adapter_files import CONFIG, STATE, header, member_offsets, members_of, tiny_adapter, write_tar

SECONDS_A_FILE = 5.0
MORE_MEMORY = 1 << 30
"""Bytes: a fraction of what the files below claim. Threads' stacks and torch's own libraries need some of it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_adapter(tmp_path_factory.mktemp("whole") / "adapter.nemo").read_bytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, whole: bytes) -> AdapterFile:
    path = tmp_path_factory.mktemp("expected") / "adapter.nemo"
    path.write_bytes(whole)
    return read_adapter(path)


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Raises MemoryError for more than `MORE_MEMORY` bytes beyond what the process already has."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def survives(path: Path, expected: AdapterFile) -> bool:
    """Returns whether the file loads; checks that it has not changed, or is refused with a message, fast, writing nothing."""
    before = sorted(os.listdir(path.parent)), sorted(os.listdir("."))
    start = time.perf_counter()
    file, refusal = None, ""
    try:
        file = read_adapter(path)
    except AdapterFileError as error:
        refusal = str(error)
    if file is None:
        assert str(path) in refusal
        assert len(refusal) < 4000
    else:
        assert (file.config, file.shapes, list(file.state)) == (expected.config, expected.shapes, list(expected.state))
        assert [name for name in file.state if not torch.equal(file.state[name], expected.state[name])] == []
    is_adapter_file(path)
    assert time.perf_counter() - start < SECONDS_A_FILE
    assert (sorted(os.listdir(path.parent)), sorted(os.listdir("."))) == before
    return file is not None


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path: Path, whole: bytes, expected: AdapterFile) -> None:
    """Flips a bit in each byte of the headers, and at random places in the file. In the content no flip is harmless."""
    path = tmp_path / "adapter.nemo"
    draw = random.Random(1)
    offsets = member_offsets(whole)
    headers = [start - 512 + i for start, _ in offsets.values() for i in range(512)]
    places = [*headers, *(draw.randrange(len(whole)) for _ in range(300))]
    contents = [(start, start + size) for start, size in offsets.values()]
    for start, end in contents:
        places += [start, start + 1, start + 7, start + 8, end - 1, *(draw.randrange(start, end) for _ in range(150))]
    harmless = []
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        if survives(path, expected):
            harmless.append(place)
    inside = [place for place in harmless if any(start <= place < end for start, end in contents)]
    assert inside == []
    assert len(harmless) < len(places) / 2


def test_a_file_cut_at_every_boundary_is_refused_or_has_lost_padding_only(
    tmp_path: Path, whole: bytes, expected: AdapterFile
) -> None:
    path = tmp_path / "adapter.nemo"
    end = max(start + size for start, size in member_offsets(whole).values())
    for boundary in [*range(0, len(whole), 512), *(start for start, _ in member_offsets(whole).values()), end]:
        for length in (boundary - 1, boundary, boundary + 1, boundary + 8):
            if 0 <= length <= len(whole):
                path.write_bytes(whole[:length])
                assert survives(path, expected) == (length >= end), length


def test_swapped_members_are_refused_and_their_order_is_free(
    tmp_path: Path, whole: bytes, expected: AdapterFile
) -> None:
    path = tmp_path / "adapter.nemo"
    members = members_of(whole)
    write_tar(path, {STATE: members[CONFIG], CONFIG: members[STATE]})
    assert not survives(path, expected)
    write_tar(path, {name: members[name] for name in (CONFIG, STATE)})
    assert survives(path, expected)
    path.write_bytes(members[STATE])
    assert not survives(path, expected)
    other = tiny_adapter(tmp_path / "other.nemo", rank=2).read_bytes()
    for name in (CONFIG, STATE):
        write_tar(path, {**members, name: members_of(other)[name]})
        assert not survives(path, expected), name


def with_size(whole: bytes, name: str, size: bytes) -> bytes:
    """Makes the member's header claim another size, with a correct checksum."""
    start = member_offsets(whole)[name][0] - 512
    block = bytearray(whole[start : start + 512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return whole[:start] + bytes(block) + whole[start + 512 :]


HUGE_SIZES = {
    "8 GiB": b"77777777777\0",
    "2^63": b"\x80" + bytes(3) + (1 << 62).to_bytes(8, "big"),
    "2^88": b"\x80" + b"\xff" * 11,
    "negative": b"\xff" * 12,
    "no number": b"size        ",
}


@pytest.mark.parametrize("name", [CONFIG, STATE])
@pytest.mark.parametrize("size", HUGE_SIZES)
def test_a_tar_header_that_claims_any_size_is_refused(
    tmp_path: Path, whole: bytes, expected: AdapterFile, name: str, size: str
) -> None:
    path = tmp_path / "adapter.nemo"
    path.write_bytes(with_size(whole, name, HUGE_SIZES[size]))
    assert not survives(path, expected)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_safetensors_header_that_claims_any_length_is_refused(
    tmp_path: Path, whole: bytes, expected: AdapterFile, length: int
) -> None:
    path = tmp_path / "adapter.nemo"
    members = members_of(whole)
    state = length.to_bytes(8, "little") + members[STATE][8:]
    write_tar(path, resealed(members, state=state))
    assert not survives(path, expected)


BAD_HEADERS = {
    "nested without end": b"[" * 200_000,
    "a tensor of 2^60": b'{"linear_qkv.A":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,8]}}',
    "a negative offset": b'{"linear_qkv.A":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}',
    "one tensor over another": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "an unknown dtype": b'{"a":{"dtype":"PICKLE","shape":[2],"data_offsets":[0,8]}}',
    "no JSON": b"\x80\x04cposix\nsystem\n",
    "a million tensors": b"{"
    + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(30_000))
    + b"}",
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_a_safetensors_header_of_any_content_is_refused(
    tmp_path: Path, whole: bytes, expected: AdapterFile, kind: str
) -> None:
    path = tmp_path / "adapter.nemo"
    text = BAD_HEADERS[kind]
    state = len(text).to_bytes(8, "little") + text + bytes(8)
    write_tar(path, resealed(members_of(whole), state=state))
    assert not survives(path, expected)


def resealed(members: dict[str, bytes], state: bytes | None = None, **changes: Any) -> dict[str, bytes]:
    """Members with other content and correct checksums: whoever edits a file can also update them."""
    from nemo_tied_lora.checkpoint.nemo_adapter_format import content_facts

    description = yaml.safe_load(members[CONFIG])
    description.pop("checksum")
    state = members[STATE] if state is None else state
    description |= {"state": content_facts(state), **changes}
    return {STATE: state, CONFIG: seal(description)}


def extended_header(kind: bytes, records: dict[str, str]) -> bytes:
    content = b"".join(pax_record(key, value) for key, value in records.items())
    return header("extended", len(content), kind) + content + b"\0" * (-len(content) % 512)


def pax_record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + 2
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


BOMBS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda whole: gzip.compress(whole),
    "gzip of a gigabyte": lambda _: gzip.compress(bytes(1 << 22), 9) * 256,
    "a sparse member of a terabyte": lambda whole: header(STATE, 512, tarfile.GNUTYPE_SPARSE) + bytes(512) + whole,
    "a long name of a gigabyte": lambda whole: header("././@LongLink", 1 << 30, tarfile.GNUTYPE_LONGNAME) + whole,
    "a long name": lambda whole: (
        header("././@LongLink", 20, tarfile.GNUTYPE_LONGNAME) + b"x".ljust(512, b"\0") + whole
    ),
    "a pax size": lambda whole: extended_header(tarfile.XHDTYPE, {"size": str(1 << 40)}) + whole,
    "a pax path": lambda whole: extended_header(tarfile.XHDTYPE, {"path": "../../etc/passwd"}) + whole,
    "a pax sparse map": lambda whole: extended_header(tarfile.XHDTYPE, {"GNU.sparse.realsize": str(1 << 40)}) + whole,
    "a global pax path": lambda whole: extended_header(tarfile.XGLTYPE, {"path": "x"}) + whole,
    "a pax header of a gigabyte": lambda whole: header("extended", 1 << 30, tarfile.XHDTYPE) + whole,
    "a damaged pax header": lambda whole: header("x", 512, tarfile.XHDTYPE) + b"9" * 512 + whole,
    "a hundred thousand members": lambda whole: header("x", 0, tarfile.XHDTYPE) * 100_000 + whole,
    "a link out of the folder": lambda whole: header(STATE, 0, tarfile.SYMTYPE, "/etc/passwd") + whole,
    "a device": lambda whole: header(STATE, 0, tarfile.CHRTYPE) + whole,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_a_tar_can_do_beyond_plain_files_is_refused(
    tmp_path: Path, whole: bytes, expected: AdapterFile, kind: str
) -> None:
    path = tmp_path / "adapter.nemo"
    path.write_bytes(BOMBS[kind](whole))
    assert not survives(path, expected)


def test_a_file_with_holes_is_not_read_as_far_as_it_claims(
    tmp_path: Path, whole: bytes, expected: AdapterFile
) -> None:
    """Sparse files: headers claim 100 GiB that use no disk space, for either member."""
    path = tmp_path / "adapter.nemo"
    for name in (STATE, CONFIG):
        with open(path, "wb") as file:
            file.write(header(name, 100 << 30))
            file.truncate(512 + (100 << 30))
            file.seek(0, 2)
            file.write(whole)
        assert not survives(path, expected)


def test_times_that_other_tars_write_are_harmless(tmp_path: Path, whole: bytes, expected: AdapterFile) -> None:
    path = tmp_path / "adapter.nemo"
    path.write_bytes(extended_header(tarfile.XHDTYPE, {"mtime": "1.5"}) + whole)
    assert survives(path, expected)
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=format) as tar:
            for name, content in members_of(whole).items():
                info = tarfile.TarInfo(f"./{name}")
                info.size, info.mtime = len(content), 1.5  # type: ignore[assignment]
                tar.addfile(info, io.BytesIO(content))
        assert survives(path, expected)


def bad_yaml(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], bytes]:
    def sealed(description: dict[str, Any]) -> bytes:
        description.pop("checksum")
        change(description)
        return seal(description)

    return sealed


BAD_YAMLS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "aliases without end": lambda _: (
        b"a: &a [x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(97, 110))
        + b"peft: *n\nformat_version: 2\n"
    ),
    "nested without end": lambda _: b"[" * 100_000,
    "an object to make": lambda _: b"format_version: !!python/object/apply:os.system [touch evidence]\n",
    "only comments": lambda _: b"# nothing\n" * 20_000,
    "no text": lambda _: b"\xff\xfe\x00" * 1000,
    "no checksum": lambda d: yaml.safe_dump({k: v for k, v in d.items() if k != "checksum"}).encode(),
    "a width of 2^60": bad_yaml(lambda d: d["targets"]["linear_qkv"].update(in_features=1 << 60)),
    "a width that is a list": bad_yaml(lambda d: d["targets"]["linear_qkv"].update(in_features=[1] * 1000)),
    "a negative width": bad_yaml(lambda d: d["targets"]["linear_qkv"].update(out_features=-5)),
    "a rank of 2^60": bad_yaml(lambda d: d["peft"]["tied_lora"].update(rank=1 << 60)),
    "a layer of 2^60": bad_yaml(lambda d: d["targets"]["linear_qkv"].update(layers=[0, 1, 2, 1 << 60])),
    "a layer twice": bad_yaml(lambda d: d["targets"]["linear_qkv"].update(layers=[0, 1, 2, 2])),
    "layers that are a text": bad_yaml(lambda d: d["targets"]["linear_qkv"].update(layers="0123")),
    "no layers": bad_yaml(lambda d: d["targets"]["linear_qkv"].update(layers=[])),
    "2^60 experts": bad_yaml(lambda d: d["targets"]["linear_qkv"].update(num_experts=1 << 60)),
    "an unknown kind": bad_yaml(lambda d: d["targets"]["linear_qkv"].update(kind="diagonal")),
    "targets that are a list": bad_yaml(lambda d: d.update(targets=[1, 2])),
    "no peft": bad_yaml(lambda d: d.pop("peft")),
    "a huge tensor from a seed": bad_yaml(
        lambda d: (
            d["peft"]["tied_lora"].update(
                trained=["v", "u"], frozen_factors="seed", init_A=None, init_B=None, init_u=None, init_v=None
            ),
            [shape.update(in_features=1 << 24) for shape in d["targets"].values()],
        )
    ),
}


@pytest.mark.parametrize("kind", BAD_YAMLS)
def test_a_yaml_of_any_content_is_refused(tmp_path: Path, whole: bytes, expected: AdapterFile, kind: str) -> None:
    path = tmp_path / "adapter.nemo"
    members = members_of(whole)
    write_tar(path, {**members, CONFIG: BAD_YAMLS[kind](yaml.safe_load(members[CONFIG]))})
    assert not survives(path, expected)
    assert not (tmp_path / "evidence").exists()


def test_bytes_drawn_at_random_are_refused(tmp_path: Path, whole: bytes, expected: AdapterFile) -> None:
    path = tmp_path / "adapter.nemo"
    draw = random.Random(2)
    for _ in range(100):
        start = draw.randrange(len(whole))
        noise = draw.randbytes(draw.choice([1, 8, 512, 4096]))
        path.write_bytes(whole[:start] + noise + whole[start + draw.choice([0, len(noise)]) :])
        survives(path, expected)
        path.write_bytes(noise)
        assert not survives(path, expected)


def test_a_config_that_a_seed_cannot_stand_for_says_so() -> None:
    with pytest.raises(ValueError, match="frozen_factors='guess': unknown; choose one of tensor, seed"):
        TiedLoraConfig(frozen_factors="guess")
