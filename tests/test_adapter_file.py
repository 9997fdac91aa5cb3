# SPDX-License-Identifier: Apache-2.0
"""One process, then two ranks (one start): the adapter's `.nemo` file, and every file that is none."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from nemo_tied_lora import TiedLoraConfig, adapter_state, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter import Adapter
from nemo_tied_lora.adapter_state import expected_shapes
from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.export.adapter_file import AdapterFileError, read_adapter, write_adapter
from nemo_tied_lora.export.adapter_format import content_facts, seal
from nemo_tied_lora.factors import initial_tensor
from tests.adapters import tiny_adapter
from tests.ranks import run_ranks, single_process
from tests.relayout import relayout
from tests.tiny_gpt import build_gpt, full_tensor

LAYERS, RANK = 4, 3
LLAMA: dict[str, Any] = {"num_layers": LAYERS, "llama": True, "groups": 2}
LAYOUTS: dict[str, dict[str, int]] = {"tp2": {"tp": 2}, "pp2": {"pp": 2}}
CONFIG: dict[str, Any] = {"preset": "tl6", "rank": RANK, "alpha": 5.0}
# An adapter of 64 MiB, 20 MiB of it linear_fc1's, 4 MiB its largest tensor.
WIDE: dict[str, Any] = {"num_layers": 4, "hidden": 512, "ffn": 2048, "dtype": torch.float32}
YAML, STATE = "model_config.yaml", "adapter.safetensors"
Members = dict[str, bytes]


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def build(**fields: Any) -> Adapter:
    """A Llama style model of 4 layers with an adapter that is random everywhere."""
    adapter = inject(build_gpt(**LLAMA), TiedLoraConfig.from_mapping({**CONFIG, **fields}))
    shapes = expected_shapes(adapter.config, adapter.specs)
    adapter.load_full_state({name: full_tensor(f"file {name}", shape) for name, shape in shapes.items()})
    return adapter


def members_of(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def write(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    assert [name for name in got if got[name].dtype != expected[name].dtype] == []
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def save_and_load_on_a_rank(folder: str) -> dict[str, Any]:
    """Each layout writes its file; each then loads both files, the other layout's first."""
    results: dict[str, Any] = {}
    for layout, sizes in LAYOUTS.items():
        relayout(**sizes)
        save_adapter(build(), Path(folder) / f"{layout}.nemo")
        results[f"readable after {layout}"] = (Path(folder) / f"{layout}.nemo").is_file()
    for layout, sizes in LAYOUTS.items():
        relayout(**sizes)
        for source in LAYOUTS:
            adapter = load_adapter(build_gpt(**LLAMA), Path(folder) / f"{source}.nemo")
            results[f"{source} at {layout}"] = adapter.full_state()
    for layout, sizes in LAYOUTS.items():
        relayout(**sizes)
        adapter = inject(build_gpt(**WIDE), TiedLoraConfig.preset("lora", rank=512))
        streamed(adapter)  # what a first exchange between ranks allocates for good is no adapter's
        for what, call in (
            ("stream", lambda: streamed(adapter)),  # noqa: B023
            ("full_state", adapter.full_state),
        ):
            results[f"memory of {what} at {layout}"] = memory_of(call)
    results["failure"] = error_of(lambda: save_adapter(build(), Path(folder) / "a_folder"))
    return results


def streamed(adapter: Adapter) -> None:
    """What `save_adapter` writes from, kept by nobody."""
    factors = [chunk.factors for chunk in adapter.chunks]
    for _ in adapter_state.stream(adapter.config, adapter.specs, factors, torch.device("cpu")):
        pass


def memory_of(call: Callable[[], Any]) -> int:
    """Bytes of resident memory that the call needs at its peak, beyond what there was before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    result = call()
    peak = memory("VmHWM")
    del result
    return peak - before


def memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two_ranks")
    (path / "a_folder").mkdir()
    return path


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Any]]:
    """Spawned once; a failure too is kept, and not tried again for each test."""
    return run_ranks(save_and_load_on_a_rank, str(folder), world_size=2, tp=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_adapter(build(), tmp_path / "adapter.nemo")


@pytest.mark.parametrize("preset", ["lora", "vera", "tl5", "tl6"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_save_then_load_is_the_identity(tmp_path: Path, preset: str, dtype: torch.dtype) -> None:
    model = build_gpt(**LLAMA, dtype=dtype)
    config = TiedLoraConfig.preset(preset, rank=RANK, layers=[1, 3], dropout=0.1)
    adapter = inject(model, config)
    state = {n: full_tensor(f"file {n}", tuple(t.shape)).to(dtype) for n, t in adapter.full_state().items()}
    adapter.load_full_state(state)
    path = save_adapter(adapter, tmp_path / "adapter.nemo")
    adapter.remove()
    loaded = load_adapter(model, path)
    assert loaded.config == config
    assert loaded.specs == adapter.specs
    assert_same(loaded.full_state(), state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_a_file_of_either_layout_loads_at_either(layout: str, source: str, two_ranks: list[dict[str, Any]]) -> None:
    expected = build().full_state()
    for rank in two_ranks:
        assert_same(rank[f"{source} at {layout}"], expected)


def test_the_file_does_not_depend_on_the_layout(two_ranks: list[dict[str, Any]], folder: Path, saved: Path) -> None:
    assert (folder / "tp2.nemo").read_bytes() == (folder / "pp2.nemo").read_bytes() == saved.read_bytes()


def test_the_file_is_there_on_every_rank_when_the_call_returns(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank[f"readable after {layout}"] for rank in two_ranks for layout in LAYOUTS] == [True] * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rank_holds_more_than_one_target_while_all_are_gathered(
    layout: str, two_ranks: list[dict[str, Any]]
) -> None:
    one_target, whole = 20 << 20, 64 << 20
    for rank in two_ranks:
        assert rank[f"memory of stream at {layout}"] < one_target
        # Where all is held; pages that were freed earlier are used again.
        assert rank[f"memory of full_state at {layout}"] > 0.4 * whole


def test_a_failure_of_the_rank_that_writes_is_an_error_on_every_rank(two_ranks: list[dict[str, Any]]) -> None:
    """The others must not wait for it for ever."""
    assert two_ranks[0]["failure"].startswith("IsADirectoryError")
    assert two_ranks[1]["failure"].startswith("OSError")
    assert "a_folder" in two_ranks[1]["failure"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_of_two_ranks_loads_on_one(layout: str, two_ranks: list[dict[str, Any]], folder: Path) -> None:
    assert_same(load_adapter(build_gpt(**LLAMA), folder / f"{layout}.nemo").full_state(), build().full_state())


def test_members_and_keys_on_disk_hold_each_tied_tensor_once(saved: Path) -> None:
    members = members_of(saved)
    assert set(members) == {YAML, STATE}
    tensors = load_safetensors(members[STATE])
    assert set(tensors) == {f"{target}.{factor}" for target in TARGETS for factor in "ABuv"}
    assert tensors["linear_fc1.B"].shape == (80, RANK)
    assert tensors["linear_fc1.v"].shape == (LAYERS, 80)
    assert torch.equal(tensors["linear_fc1.v"][2], full_tensor("file layers.2.linear_fc1.v", (80,)))


def test_the_yaml_says_what_was_trained(tmp_path: Path) -> None:
    path = save_adapter(build(), tmp_path / "adapter.nemo", facts={"base": {"name": "tiny", "layers": LAYERS}})
    description = yaml.safe_load(members_of(path)[YAML])
    assert description["format_version"] == 2
    assert description["peft"]["peft_scheme"] == "tied_lora"
    assert description["peft"]["tied_lora"]["alpha"] == 5.0
    assert {key: description["base"][key] for key in ("name", "layers")} == {"name": "tiny", "layers": LAYERS}
    assert description["base"]["architecture"]["ffn_hidden_size"] == 40
    assert description["targets"]["linear_fc1"] == {
        "kind": "column",
        "in_features": 24,
        "out_features": 80,
        "blocks": 2,
        "layers": [0, 1, 2, 3],
        "num_experts": 1,
    }
    assert description.pop("checksum")
    assert read_adapter(path).yaml == description


def test_facts_do_not_replace_the_formats_own_keys(tmp_path: Path) -> None:
    path = save_adapter(build(), tmp_path / "adapter.nemo", facts={"format_version": 99, "peft": None, "note": "mine"})
    file = read_adapter(path)
    assert file.config.rank == RANK
    assert file.yaml["note"] == "mine"


@pytest.mark.parametrize("preset", ["lora", "vera", "tl5", "tl6"])
def test_the_file_is_no_larger_than_the_formula_and_64_kib(tmp_path: Path, preset: str) -> None:
    """hidden 256, 6 layers: large enough that a tied tensor written once a layer would show."""
    layers, hidden, rank = 6, 256, 32
    model = build_gpt(num_layers=layers, hidden=hidden, ffn=4 * hidden, dtype=torch.float32)
    path = save_adapter(inject(model, TiedLoraConfig.preset(preset, rank=rank)), tmp_path / "adapter.nemo")
    sides = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
    elements = sum(rank * (inputs + outputs) for inputs, outputs in sides) * (layers if preset == "lora" else 1)
    if preset in ("vera", "tl6"):
        elements += sum(layers * (rank + outputs) for _, outputs in sides)
    assert 4 * elements < path.stat().st_size <= 4 * elements + 64 * 1024


@pytest.mark.parametrize("preset", ["lora", "vera", "tl5", "tl6"])
@pytest.mark.parametrize("layers", [1, 32, 126, 1000])
def test_the_file_is_no_larger_than_that_however_many_layers_there_are(
    tmp_path: Path, preset: str, layers: int
) -> None:
    path = tiny_adapter(tmp_path / "adapter.nemo", preset=preset, hidden=8, layers=layers, rank=2)
    file = read_adapter(path)
    elements = sum(tensor.numel() for tensor in file.state.values())
    assert path.stat().st_size <= 4 * elements + 64 * 1024
    assert len(file.state) >= layers or preset == "tl5"


def test_facts_that_would_make_the_file_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hand over fewer facts"):
        save_adapter(build(), tmp_path / "adapter.nemo", facts={"losses": list(range(20_000))})
    assert list(tmp_path.iterdir()) == []


def seeded(model: Any, **fields: Any) -> Adapter:
    """VeRA whose A and B are stored as their seed; u and v are random."""
    config = TiedLoraConfig.from_mapping({"preset": "vera", "rank": RANK, "frozen_factors": "seed", **fields})
    adapter = inject(model, config)
    state = adapter.full_state()
    for name in state:
        if name.startswith("layers.") and name[-1] in "uv":
            state[name] = full_tensor(f"seed {name}", tuple(state[name].shape)).to(state[name].dtype)
    adapter.load_full_state(state)
    return adapter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"tied": [], "init_A": "kaiming"}, {"trained": ["B", "v"], "init_v": 0.0}])
def test_a_frozen_factor_can_be_stored_as_its_seed(tmp_path: Path, dtype: torch.dtype, fields: dict) -> None:
    adapter = seeded(build_gpt(**LLAMA, dtype=dtype), **fields)
    path = save_adapter(adapter, tmp_path / "seed.nemo")
    frozen = {"A", "B"} - set(adapter.config.trained)
    on_disk = load_safetensors(members_of(path)[STATE])
    assert {name[-1] for name in on_disk} == {"u", "v", "A", "B"} & ({*adapter.config.trained, "A", "B"} - frozen)
    assert_same(load_adapter(build_gpt(**LLAMA, dtype=dtype), path).full_state(), adapter.full_state())


def test_a_seed_makes_the_file_as_small_as_what_is_trained(tmp_path: Path) -> None:
    path = tiny_adapter(tmp_path / "tensor.nemo", preset="tl6", hidden=512, layers=2, rank=64)
    config = TiedLoraConfig.preset("vera", rank=64, frozen_factors="seed")
    specs = read_adapter(path).specs
    shapes = expected_shapes(config, specs)
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    for name in [name for name in state if name[-1] in "AB"]:
        state[name] = initial_tensor(name[-1], name[:-2], None, shapes[name], config)
    small = write_adapter(tmp_path / "seed.nemo", config, specs, state, {})
    trained = sum(tensor.numel() for name, tensor in state.items() if name[-1] in "uv")
    assert small.stat().st_size <= 4 * trained + 64 * 1024
    assert path.stat().st_size > 1_000_000
    assert_same(read_adapter(small).state, state)


def test_a_generator_that_draws_other_numbers_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_adapter(seeded(build_gpt(**LLAMA)), tmp_path / "seed.nemo")

    def draws_others(*args: Any, **options: Any) -> torch.Tensor:
        tensor = initial_tensor(*args, **options)
        tensor.view(-1)[-1] += 1e-3
        return tensor

    monkeypatch.setattr("nemo_tied_lora.export.frozen_factors.initial_tensor", draws_others)
    with pytest.raises(AdapterFileError, match="draws other numbers from seed=1234"):
        read_adapter(path)


def test_a_factor_that_is_not_what_the_seed_draws_is_not_stored_as_the_seed(tmp_path: Path) -> None:
    adapter = seeded(build_gpt(**LLAMA))
    state = adapter.full_state()
    state["linear_fc2.B"][3, 1] += 1.0
    adapter.load_full_state(state)
    with pytest.raises(ValueError, match=r"linear_fc2\.B is not what seed=1234 draws"):
        save_adapter(adapter, tmp_path / "seed.nemo")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_would_not_load_again_is_not_saved(saved: Path) -> None:
    before = saved.read_bytes()
    adapter = build()
    with torch.no_grad():
        next(adapter.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        save_adapter(adapter, saved)
    assert saved.read_bytes() == before


def test_a_file_of_version_1_is_still_read(tmp_path: Path, saved: Path) -> None:
    """It held every layer's tensors apart, no checksums, and little of its base."""
    file = read_adapter(saved)
    description = {
        "format_version": 1,
        "peft": file.yaml["peft"],
        "targets": file.yaml["targets"],
        "base": {"name": "base.nemo", "num_layers": LAYERS},
    }
    members = {YAML: yaml.safe_dump(description, sort_keys=False).encode(), STATE: save_safetensors(file.state)}
    old = write(tmp_path / "old.nemo", members)
    assert_same(load_adapter(build_gpt(**LLAMA), old).full_state(), file.state)
    refused(write(old, with_state_of_version_1(members)), "linear_qkv.A is missing")


def with_state_of_version_1(members: Members) -> Members:
    state = load_safetensors(members[STATE])
    state.pop("linear_qkv.A")
    return {**members, STATE: save_safetensors(state)}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole.rstrip(b"\0")) * share)])
    refused(saved, "")


def test_every_truncation_is_refused_or_leaves_the_whole_content(saved: Path) -> None:
    """A tar ends in padding: where only that is lost, everything is still there."""
    whole, expected = saved.read_bytes(), read_adapter(saved).state
    data_end = len(whole.rstrip(b"\0"))
    for length in [*range(0, data_end, 509), data_end - 1, *range(data_end, len(whole), 509)]:
        saved.write_bytes(whole[:length])
        state = state_or_none(saved)
        assert (state is None) == (length < data_end), length
        if state is not None:
            assert_same(state, expected)


def state_or_none(path: Path) -> dict[str, torch.Tensor] | None:
    """None where the file is refused as it should be; any other error is the test's failure."""
    try:
        return read_adapter(path).state
    except AdapterFileError as error:
        message = str(error)
    assert str(path) in message
    return None


def with_member(name: str, content: bytes) -> Callable[[Members], Members]:
    return lambda members: {**members, name: content}


def with_yaml(change: Callable[[dict[str, Any]], Any]) -> Callable[[Members], Members]:
    def changed(members: Members) -> Members:
        """Whoever edits the file can also make its checksum again."""
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
    "a later version": (with_yaml(lambda d: d.update(format_version=3)), "format_version 3 is unknown"),
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
    "NaN": (with_state(lambda s: s["linear_qkv.A"].fill_(float("nan"))), "linear_qkv.A holds NaN"),
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_a_file_with_other_content_is_refused_and_the_model_left_alone(saved: Path, kind: str) -> None:
    change, message = BAD_MEMBERS[kind]
    refused(write(saved, change(members_of(saved))), message)


def refused(path: Path, message: str) -> None:
    """With a message that names the file, by both readers; the model stays as it was."""
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
    refused(write(saved, {**members_of(saved), YAML: code.encode()}), "damaged")
    assert not evidence.exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_a_member_that_is_no_file_is_refused(saved: Path, kind: bytes) -> None:
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


def test_a_member_that_stands_there_twice_is_refused(saved: Path) -> None:
    members = members_of(saved)
    with tarfile.open(saved, "a") as tar:
        info = tarfile.TarInfo(STATE)
        info.size = len(members[STATE])
        tar.addfile(info, io.BytesIO(members[STATE]))
    refused(saved, "unexpected member 'adapter.safetensors'")


def test_names_that_tar_writes_with_a_dot_are_read(saved: Path) -> None:
    expected = read_adapter(saved).state
    write(saved, {f"./{name}": content for name, content in members_of(saved).items()})
    assert_same(read_adapter(saved).state, expected)


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"not a tar", b"PK\x03\x04" + b"\0" * 600])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapter.nemo"
    path.write_bytes(content)
    refused(path, "")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder")


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.nemo"):
        read_adapter(tmp_path / "nothing.nemo")


def test_any_damaged_byte_is_refused_or_harmless_and_never_another_error(saved: Path) -> None:
    """A byte here and there, more of them in the two headers."""
    whole = saved.read_bytes()
    second = 512 + -(-len(members_of(saved)[YAML]) // 512) * 512
    places = [
        *range(0, 512, 5),
        *range(512, second, 83),
        *range(second, second + 512, 5),
        *range(second + 512, second + 4000, 197),
    ]
    for place in places:
        for value in (0x00, 0x39):
            saved.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            state_or_none(saved)


def test_saving_replaces_an_older_file(saved: Path) -> None:
    save_adapter(build(rank=2), saved)
    assert read_adapter(saved).config.rank == 2
    assert os.listdir(saved.parent) == [saved.name]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = save_adapter(build(), tmp_path / "runs" / "first" / "adapter.nemo")
    assert read_adapter(str(path)).config.rank == RANK


def test_the_file_has_the_permissions_that_the_user_asks_for(saved: Path) -> None:
    current = os.umask(0o027)
    try:
        save_adapter(build(), saved)
    finally:
        os.umask(current)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o640


def raise_no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync", "nemo_tied_lora.export.adapter_format.StateWriter.add"])
def test_a_failed_write_leaves_the_older_file_and_nothing_else(
    saved: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    adapter = build(rank=2)
    monkeypatch.setattr(failing, raise_no_space)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapter, saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_an_interrupted_write_leaves_nothing_behind(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    before = saved.read_bytes()
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(build(rank=2), saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
