# SPDX-License-Identifier: Apache-2.0
"""One process: merges adapters into every format of a base's file, and checks that nothing else changes."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.sharding import shard
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile, read_adapter
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.conversion.merging.merge import merge_into
from nemo_tied_lora.errors import ConfigError
from tests.harness.adapter_files import shapes_of, tiny_adapter
from tests.harness.random_adapters import delta

LAYERS, HIDDEN = 4, 24
MODEL = {
    "mcore_gpt": True,
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": 2 * HIDDEN,
    "num_attention_heads": 4,
    "encoder_seq_length": 32,
    "activation": "fast-swiglu",
}
PLACES = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}


@pytest.fixture
def adapter(tmp_path: Path) -> AdapterFile:
    return read_adapter(tiny_adapter(tmp_path / "adapter.nemo", layers=LAYERS, hidden=HIDDEN, alpha=5.0))


def whole_weights(dtype: torch.dtype = torch.float32) -> dict[tuple[int, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        (layer, target): torch.randn(shape.out_features, shape.in_features, generator=generator).to(dtype)
        for target, shape in shapes_of(HIDDEN, LAYERS).items()
        for layer in range(LAYERS)
    }


def merged_weights(weights: dict, files: list[tuple[AdapterFile, float]]) -> dict[tuple[int, str], torch.Tensor]:
    """The merged weights, by the literal formula."""
    merged = {key: weight.double() for key, weight in weights.items()}
    for file, share in files:
        for target, shape in file.shapes.items():
            for layer in shape.layers:
                merged[layer, target] += share * delta(file, layer, target)
    return merged


def pack(path: Path, folder: Path) -> Path:
    (folder / "model_config.yaml").write_text(yaml.safe_dump(MODEL))
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=".")
    return path


def distributed_base(path: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A distributed checkpoint of torch with all layers stacked, and other members that a merge must not change."""
    weights = whole_weights(dtype)
    state = {
        f"model.decoder.layers.{place}.weight": torch.stack([weights[layer, target] for layer in range(LAYERS)])
        for target, place in PLACES.items()
    }
    state["model.embedding.word_embeddings.weight"] = torch.arange(60.0).reshape(20, 3)
    (folder / "model_weights").mkdir(parents=True)
    dcp.save(state, checkpoint_id=str(folder / "model_weights"), no_dist=True)
    return pack(path, folder)


def legacy_base(path: Path, folder: Path, tp: int, pp: int) -> Path:
    """One file per rank with its shards; layers are numbered within the stage."""
    weights, shapes = whole_weights(), shapes_of(HIDDEN, LAYERS)
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            state = {}
            for (layer, target), weight in weights.items():
                if layer // (LAYERS // pp) == pp_rank:
                    name = f"model.decoder.layers.{layer % (LAYERS // pp)}.{PLACES[target]}.weight"
                    state[name] = part_of(weight, shapes[target], tp_rank, tp)
            name = f"tp_rank_{tp_rank:02d}_pp_rank_{pp_rank:03d}" if pp > 1 else f"mp_rank_{tp_rank:02d}"
            place = folder / name if tp * pp > 1 else folder
            place.mkdir(parents=True, exist_ok=True)
            torch.save(state, place / "model_weights.ckpt")
    return pack(path, folder)


def zarr_base(path: Path, folder: Path) -> Path:
    """One folder of raw chunks per tensor. A chunk has half of the rows of one layer."""
    weights = whole_weights()
    for target, place in PLACES.items():
        array = folder / "model_weights" / f"model.decoder.layers.{place}.weight"
        array.mkdir(parents=True)
        rows, columns = weights[0, target].shape
        (array / ".zarray").write_text(
            json.dumps(
                {
                    "chunks": [1, rows // 2, columns],
                    "compressor": None,
                    "dtype": "<f4",
                    "fill_value": None,
                    "filters": None,
                    "order": "C",
                    "shape": [LAYERS, rows, columns],
                    "zarr_format": 2,
                }
            )
        )
        for layer in range(LAYERS):
            for half in range(2):
                part = weights[layer, target][half * rows // 2 : (half + 1) * rows // 2]
                (array / f"{layer}.{half}.0").write_bytes(part.contiguous().numpy().tobytes())
    return pack(path, folder)


def part_of(weight: torch.Tensor, shape: LinearShape, tp_rank: int, tp: int) -> torch.Tensor:
    return shard(weight, "A" if shape.kind == "row" else "B", shape, tp_rank, tp)


def content(path: Path, folder: Path) -> Path:
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return folder


def merge(base: Path, output: Path, *adapters: tuple[AdapterFile, float], **options: Any) -> Any:
    named = [(f"adapter {i}", file, share) for i, (file, share) in enumerate(adapters)]
    with merge_into(output, base, MODEL, named, **options) as (_, report):
        return report


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("form", ["tar", "gzip", "folder"])
def test_a_distributed_checkpoint_is_merged(
    tmp_path: Path, adapter: AdapterFile, form: str, dtype: torch.dtype, tolerance: float
) -> None:
    base = distributed_base(tmp_path / "base.nemo", tmp_path / "base", dtype)
    before = base.read_bytes()
    if form == "gzip":
        base.write_bytes(gzip.compress(before))
    source = tmp_path / "base" if form == "folder" else base
    report = merge(source, tmp_path / "merged.nemo", (adapter, 1.0))
    assert len(report.changed) == 4
    folder = content(tmp_path / "merged.nemo", tmp_path / "out")
    names = [f"model.decoder.layers.{place}.weight" for place in PLACES.values()]
    shapes = shapes_of(HIDDEN, LAYERS)
    state = {
        name: torch.zeros(LAYERS, shapes[target].out_features, shapes[target].in_features, dtype=dtype)
        for name, target in zip(names, PLACES, strict=True)
    }
    state["model.embedding.word_embeddings.weight"] = torch.zeros(20, 3)
    dcp.load(state, checkpoint_id=str(folder / "model_weights"), no_dist=True)
    expected = merged_weights(whole_weights(dtype), [(adapter, 1.0)])
    for (layer, target), weight in expected.items():
        assert_close(state[f"model.decoder.layers.{PLACES[target]}.weight"][layer], weight, tolerance)
    assert torch.equal(state["model.embedding.word_embeddings.weight"], torch.arange(60.0).reshape(20, 3))
    if form == "tar":
        assert len((tmp_path / "merged.nemo").read_bytes()) == len(before)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_one_file_per_rank_is_merged(tmp_path: Path, adapter: AdapterFile, tp: int, pp: int) -> None:
    base = legacy_base(tmp_path / "base.nemo", tmp_path / "base", tp, pp)
    merge(base, tmp_path / "merged.nemo", (adapter, 1.0))
    folder, shapes = content(tmp_path / "merged.nemo", tmp_path / "out"), shapes_of(HIDDEN, LAYERS)
    expected = merged_weights(whole_weights(), [(adapter, 1.0)])
    files = sorted(folder.rglob("model_weights.ckpt"))
    assert len(files) == tp * pp
    for number, path in enumerate(files):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None  # the archive's own checksums
        state, (tp_rank, pp_rank) = torch.load(path, weights_only=True), divmod(number, pp)
        for name, part in state.items():
            layer = int(name.split(".")[3]) + pp_rank * LAYERS // pp
            target = name.split(".")[-2]
            assert_close(part, part_of(expected[layer, target], shapes[target], tp_rank, tp))


def test_zarr_is_merged(tmp_path: Path, adapter: AdapterFile) -> None:
    base = zarr_base(tmp_path / "base.nemo", tmp_path / "base")
    merge(base, tmp_path / "merged.nemo", (adapter, 1.0))
    folder = content(tmp_path / "merged.nemo", tmp_path / "out") / "model_weights"
    for (layer, target), weight in merged_weights(whole_weights(), [(adapter, 1.0)]).items():
        array = folder / f"model.decoder.layers.{PLACES[target]}.weight"
        raw = b"".join((array / f"{layer}.{half}.0").read_bytes() for half in range(2))
        assert_close(torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(weight.shape), weight)


def test_several_adapters_are_added_with_their_weights(tmp_path: Path, adapter: AdapterFile) -> None:
    fields = {"preset": "lora", "rank": 2, "alpha": 3.0, "alpha_rule": "sqrt"}
    other = read_adapter(tiny_adapter(tmp_path / "b.nemo", layers=LAYERS, hidden=HIDDEN, **fields))
    base = legacy_base(tmp_path / "base.nemo", tmp_path / "base", 1, 1)
    merge(base, tmp_path / "merged.nemo", (adapter, 0.7), (other, -0.3))
    state = torch.load(content(tmp_path / "merged.nemo", tmp_path / "out") / "model_weights.ckpt", weights_only=True)
    for (layer, target), weight in merged_weights(whole_weights(), [(adapter, 0.7), (other, -0.3)]).items():
        assert_close(state[f"model.decoder.layers.{layer}.{PLACES[target]}.weight"], weight)


def refused(base: Path, output: Path, message: str, *adapters: tuple[AdapterFile, float]) -> None:
    output.write_bytes(b"old")
    before = sorted(path.name for path in output.parent.iterdir())
    with pytest.raises(ConfigError, match=message):
        merge(base, output, *adapters)
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in output.parent.iterdir()) == before


def test_a_merge_that_is_not_finite_is_not_written(tmp_path: Path, adapter: AdapterFile) -> None:
    base = distributed_base(tmp_path / "base.nemo", tmp_path / "base", torch.float16)
    refused(base, tmp_path / "merged.nemo", "not finite in torch.float16", (adapter, 1e7))


def test_another_base_is_refused_unless_allowed(tmp_path: Path, adapter: AdapterFile) -> None:
    base = distributed_base(tmp_path / "base.nemo", tmp_path / "base")
    report = merge(base, tmp_path / "merged.nemo", (adapter, 1.0))
    facts = {"base": {"fingerprint": report.fingerprint}}
    known = read_adapter(write_adapter(tmp_path / "k.nemo", adapter.config, adapter.shapes, adapter.state, facts))
    merge(base, tmp_path / "merged.nemo", (known, 1.0))
    refused(tmp_path / "merged.nemo", tmp_path / "again.nemo", "other weights: decoder.layers.mlp", (known, 1.0))
    merge(tmp_path / "merged.nemo", tmp_path / "again.nemo", (known, 1.0), allow_other_base=True)


def test_a_base_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    deep = read_adapter(tiny_adapter(tmp_path / "deep.nemo", layers=LAYERS + 1, hidden=HIDDEN))
    base = distributed_base(tmp_path / "base.nemo", tmp_path / "base")
    refused(base, tmp_path / "merged.nemo", "layer 4 linear_qkv: 0 of", (deep, 1.0))


@pytest.mark.parametrize("form", ["tar", "gzip", "gzip, damaged"])
def test_a_truncated_base_is_refused(tmp_path: Path, adapter: AdapterFile, form: str) -> None:
    base = legacy_base(tmp_path / "base.nemo", tmp_path / "base", 1, 1)
    whole = base.read_bytes() if form == "tar" else gzip.compress(base.read_bytes())
    middle = len(whole) // 2
    base.write_bytes(whole[:middle] + (bytes(9) + whole[middle + 9 :] if form == "gzip, damaged" else b""))
    refused(base, tmp_path / "merged.nemo", rf"^base={base}: not a whole \.nemo file: [^\n]+$", (adapter, 1.0))


def test_no_code_in_a_bases_pickles_is_run(tmp_path: Path, adapter: AdapterFile) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(tmp_path / 'evidence')!r}, 'w')",)

    folder = tmp_path / "base"
    folder.mkdir()
    torch.save({"x": Evil()}, folder / "model_weights.ckpt")
    base = pack(tmp_path / "base.nemo", folder)
    refused(
        base,
        tmp_path / "merged.nemo",
        r"^base: model_weights\.ckpt: .*is not run: .*GLOBAL (builtins\.)?exec was not[^\n]*$",
        (adapter, 1.0),
    )
    (folder / "model_weights.ckpt").unlink()
    (folder / "model_weights").mkdir()
    buffer = io.BytesIO()
    pickle.dump(Evil(), buffer)
    (folder / "model_weights" / ".metadata").write_bytes(buffer.getvalue())
    base = pack(tmp_path / "base2.nemo", folder)
    refused(base, tmp_path / "merged.nemo", r"asks for \w+\.exec", (adapter, 1.0))
    assert not (tmp_path / "evidence").exists()
