# SPDX-License-Identifier: Apache-2.0
"""One process: both readers refuse every file that is not an adapter, and the model does not change."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from nemo_tied_lora import load_adapter, save_adapter
from nemo_tied_lora.checkpoint.nemo_adapter_format import content_facts, seal
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFileError, read_adapter
from tests.harness.adapter_files import write_tar
from tests.harness.llama_adapter import LAYERS, LLAMA, RANK, STATE, YAML, Members, assert_same, build, members_of
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import build_gpt


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_adapter(build(), tmp_path / "adapter.nemo")


def test_a_file_of_version_1_is_still_read(tmp_path: Path, saved: Path) -> None:
    """Version 1 did not stack the layers' tensors, had no checksums, and recorded little about its base."""
    file = read_adapter(saved)
    description = {
        "format_version": 1,
        "peft": file.yaml["peft"],
        "targets": file.yaml["targets"],
        "base": {"name": "base.nemo", "num_layers": LAYERS},
    }
    members = {YAML: yaml.safe_dump(description, sort_keys=False).encode(), STATE: save_safetensors(file.state)}
    old = write_tar(tmp_path / "old.nemo", members)
    assert_same(load_adapter(build_gpt(**LLAMA), old).full_state(), file.state)
    refused(write_tar(old, with_state_of_version_1(members)), "linear_qkv.A is missing")


def with_state_of_version_1(members: Members) -> Members:
    state = load_safetensors(members[STATE])
    state.pop("linear_qkv.A")
    return {**members, STATE: save_safetensors(state)}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole.rstrip(b"\0")) * share)])
    refused(saved, "")


def with_member(name: str, content: bytes) -> Callable[[Members], Members]:
    return lambda members: {**members, name: content}


def with_yaml(change: Callable[[dict[str, Any]], Any]) -> Callable[[Members], Members]:
    def changed(members: Members) -> Members:
        """Changes the YAML and its checksum: whoever edits the file can update both."""
        description = yaml.safe_load(members[YAML])
        description.pop("checksum")
        change(description)
        return {**members, YAML: seal(description)}

    return changed


def with_state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Members], Members]:
    def changed(members: Members) -> Members:
        state = load_safetensors(members[STATE])
        change(state)
        content = save_safetensors(state)
        return with_yaml(lambda d: d.update(state=content_facts(content)))({**members, STATE: content})

    return changed


def renamed(old: str, new: str) -> Callable[[Members], Members]:
    return lambda members: {new if name == old else name: content for name, content in members.items()}


def without(name: str) -> Callable[[Members], Members]:
    return lambda members: {key: content for key, content in members.items() if key != name}


BAD_MEMBERS: dict[str, tuple[Callable[[Members], Members], str]] = {
    "another member": (with_member("weights.pt", b"x"), "unexpected member 'weights.pt'"),
    "a member above the folder": (renamed(STATE, f"../{STATE}"), "unexpected member '../adapter.safetensors'"),
    "an absolute member": (renamed(YAML, f"/etc/{YAML}"), "unexpected member '/etc/model_config.yaml'"),
    "a member in a folder": (renamed(STATE, f"weights/{STATE}"), "unexpected member 'weights/adapter.safetensors'"),
    "no state": (without(STATE), "adapter.safetensors is missing"),
    "no yaml": (without(YAML), "model_config.yaml is missing"),
    "an empty archive": (lambda _: {}, "no members"),
    "a yaml that is none": (with_member(YAML, b"{: ["), "damaged"),
    "a yaml that is a list": (with_member(YAML, b"[1, 2]"), "damaged"),
    "a huge yaml": (with_member(YAML, b"#" * ((1 << 18) + 1)), "claims 262145 bytes"),
    "a later version": (with_yaml(lambda d: d.update(format_version=4)), "format_version 4 is unknown"),
    "no version": (with_yaml(lambda d: d.pop("format_version")), "format_version"),
    "a bad config": (with_yaml(lambda d: d["peft"]["tied_lora"].update(rank=-1)), "rank=-1: must be a whole number"),
    "an unknown key": (with_yaml(lambda d: d["peft"]["tied_lora"].update(ranc=8)), "did you mean rank?"),
    "another target": (with_yaml(lambda d: d["targets"].pop("linear_fc2")), "linear_fc2"),
    "a state of nothing": (with_member(STATE, b""), "damaged"),
    "a state that is none": (with_member(STATE, b"\x80\x02}q\x00." * 40), "damaged"),
    "a cut state": (lambda m: {**m, STATE: m[STATE][:-5]}, "damaged"),
    "a tensor less": (with_state(lambda s: s.pop("linear_qkv.A")), "linear_qkv.A is missing"),
    "a tensor more": (with_state(lambda s: s.update(x=torch.ones(1))), "x is unexpected"),
    "another shape": (with_state(lambda s: s.update({"linear_qkv.A": torch.ones(2, 24)})), "has shape (2, 24)"),
    "integers": (with_state(lambda s: s.update({"linear_qkv.A": torch.ones(3, 24).int()})), "is torch.int32, not a"),
    "two dtypes": (with_state(lambda s: s.update({"linear_qkv.A": torch.ones(3, 24)})), "of different dtypes"),
    "NaN": (with_state(lambda s: s["linear_qkv.A"].fill_(float("nan"))), "linear_qkv.A holds NaN"),
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_a_file_with_other_content_is_refused_and_the_model_left_alone(saved: Path, kind: str) -> None:
    change, message = BAD_MEMBERS[kind]
    refused(write_tar(saved, change(members_of(saved))), message)


def test_all_that_is_missing_unexpected_and_misshapen_is_listed_at_once(saved: Path) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        del state["linear_qkv.A"], state["linear_fc2.v"]
        state.update(x=torch.ones(1), y=torch.ones(1))
        state["linear_proj.B"] = torch.ones(24, RANK + 1)
        state["linear_fc1.u"][2, 1] = float("inf")

    write_tar(saved, with_state(spoil)(members_of(saved)))
    with pytest.raises(AdapterFileError) as error:
        read_adapter(saved)
    wanted = ("linear_qkv.A is missing", "linear_fc2.v is missing", "x is unexpected", "y is unexpected")
    shapes = ("linear_proj.B has shape (24, 4), the adapter needs (24, 3)", "linear_fc1.u holds NaN or infinity")
    assert [part for part in (*wanted, *shapes) if f"state: {part}" not in str(error.value)] == []


def refused(path: Path, message: str) -> None:
    """Checks that both readers refuse the file with a message that names it, and that the model does not change."""
    with pytest.raises(AdapterFileError) as error:
        read_adapter(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    model = build_gpt(**LLAMA)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(AdapterFileError):
        load_adapter(model, path)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (keys, classes)


def test_nothing_in_the_yaml_is_run(saved: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    code = f"!!python/object/apply:os.mkdir [{evidence}]"
    refused(write_tar(saved, {**members_of(saved), YAML: code.encode()}), "damaged")
    assert not evidence.exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_a_member_that_is_not_a_regular_file_is_refused(saved: Path, kind: bytes) -> None:
    members = members_of(saved)
    with tarfile.open(saved, "w") as tar:
        for name in (YAML, STATE):
            info = tarfile.TarInfo(name)
            if name == STATE:
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(members[name])
                tar.addfile(info, io.BytesIO(members[name]))
    refused(saved, "unexpected member 'adapter.safetensors'")


def test_a_repeated_member_is_refused(saved: Path) -> None:
    members = members_of(saved)
    with tarfile.open(saved, "a") as tar:
        info = tarfile.TarInfo(STATE)
        info.size = len(members[STATE])
        tar.addfile(info, io.BytesIO(members[STATE]))
    refused(saved, "unexpected member 'adapter.safetensors'")


def test_names_that_tar_writes_with_a_dot_are_read(saved: Path) -> None:
    expected = read_adapter(saved).state
    write_tar(saved, {f"./{name}": content for name, content in members_of(saved).items()})
    assert_same(read_adapter(saved).state, expected)


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"not a tar", b"PK\x03\x04" + b"\0" * 600])
def test_a_file_that_is_not_a_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapter.nemo"
    path.write_bytes(content)
    refused(path, "")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.nemo"):
        read_adapter(tmp_path / "nothing.nemo")
