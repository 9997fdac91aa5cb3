# SPDX-License-Identifier: Apache-2.0
"""Pure Python: a `.nemo` that is cut off, or another kind of file, is named in one line before a model is built."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.base_config import base_model_config, usable_base
from nemo_tied_lora.planning.composing.compose import compose_config, plain
from nemo_tied_lora.planning.nemo_archive import NemoFiles
from nemo_tied_lora.planning.nemo_model_config import adapter_problems
from nemo_tied_lora.planning.preflight import check_finetuning, check_generation
from tests.harness.adapter_files import tiny_adapter
from tests.harness.base_files import BASE_CONFIG, base_members, pack, write_base


def refusal(path: Path) -> str:
    """The one line with which the file is refused as a base; empty if it is accepted."""
    problems = Problems()
    problems.attempt(usable_base, path, "base")
    assert len(problems) <= 1
    line = problems[0] if problems else f"base={path}: "
    assert "\n" not in line
    assert line.startswith(f"base={path}: ")
    return line.removeprefix(f"base={path}: ")


def unpacked(folder: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("mtime", [0, 1.5], ids=["plain headers", "extended headers"])
def test_a_tar_cut_off_anywhere_is_refused(tmp_path: Path, mtime: float) -> None:
    whole = pack(base_members(), mtime=mtime)
    path = tmp_path / "base.nemo"
    path.write_bytes(whole)
    assert usable_base(path, "base") == BASE_CONFIG
    with tarfile.open(path) as tar:
        starts = [info.offset for info in tar] + [tar.offset]
    near = [start + step for start in starts for step in (-1, 0, 1, 100, 511, 512, 513, 1023)]
    places = [*near, *random.Random(1).sample(range(starts[-1]), 60), len(whole) - 1]
    for place in sorted({place for place in places if 0 <= place < len(whole)}):
        path.write_bytes(whole[:place])
        assert refusal(path), place
    path.write_bytes(whole[: starts[-1] + 1024])  # all files and the end marker: only padding is missing
    assert refusal(path) == ""


def test_the_message_of_a_cut_names_the_file_in_it_and_the_remedy(tmp_path: Path) -> None:
    path, whole = tmp_path / "base.nemo", pack(base_members())
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        first, last = tar.getmember("./model_weights/__0_0.distcp"), tar.getmember("./model_weights/common.pt")
        end = tar.offset
    messages = {
        first.offset_data
        + 1000: "cut off: model_weights/__0_0.distcp has 3,000 bytes, but the file ends after 1,000 of them",
        last.offset_data + 512: f"cut off: it ends at byte {end:,}, before the end marker of a tar",
        len(whole) - 100: f"cut off: it has {len(whole) - 100:,} bytes, not a multiple of 512",
    }
    for place, expected in messages.items():
        path.write_bytes(whole[:place])
        assert refusal(path) == f"not a whole .nemo file: {expected}; copy it again"
    path.write_bytes(whole[: first.offset] + b"x" * 512 + whole[first.offset + 512 :])
    assert "damaged: no header of a tar at byte" in refusal(path)


def test_a_compressed_tar_is_read_to_its_end(tmp_path: Path) -> None:
    path, whole = tmp_path / "base.nemo", pack(base_members(), compressed=True)
    path.write_bytes(whole)
    assert refusal(path) == ""
    for place in [*range(20, len(whole), len(whole) // 20), len(whole) - 1]:
        path.write_bytes(whole[:place])
        assert refusal(path).startswith("not a whole .nemo file: "), place


def test_a_plain_tar_is_walked_without_reading_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "large.nemo"
    members = {name: len(content) for name, content in base_members().items()}
    size = 64 << 30
    with path.open("wb") as file:
        for name, content in base_members().items():
            file.write(pack({name: content})[: 512 + -(-len(content) // 512) * 512])
        info = tarfile.TarInfo("large")
        info.size = size
        file.write(info.tobuf(format=tarfile.GNU_FORMAT))
        file.truncate(file.tell() + size + 1024)  # sparse: no disk space, and reading it would take a minute
    assert NemoFiles(path).sizes == {**members, "large": size}


HEAD = b'{"__metadata__":{"format":"pt"}}'
KINDS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"hello, world\n" * 99, "is a text file that begins with 'hello, world"),
    "web page": (b"<!DOCTYPE html><html>" + b" " * 999, "is a web page, so the download has failed"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run git lfs pull"),
    "safetensors": (len(HEAD).to_bytes(8, "little") + HEAD + bytes(999), "is a safetensors file; make a base of it"),
    "torch.save": (b"PK\x03\x04" + bytes(999), "is a file of torch.save or a zip"),
    "old torch.save": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 " + bytes(999), "is a file of torch.save"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(999), "is a GGUF file; make a base of it"),
    "zeros": (bytes(20480), "holds zeros only"),
    "short": (b"\x00\x01\x02", "has 3 bytes, less than a tar's first header"),
    "noise": (random.Random(1).randbytes(4096), "not a whole tar: "),
    "other tar": (pack({"a.txt": b"a"}), "holds no model_config.yaml, so it is no .nemo of NeMo; it holds a.txt"),
    "no YAML": (pack({"model_config.yaml": b"a: [1\nb: }"}), "its model_config.yaml is not YAML: "),
    "no text": (pack({"model_config.yaml": b"a: \xff\xfe\xff"}), "its model_config.yaml is not YAML: "),
    "empty YAML": (pack({"model_config.yaml": b""}), "its model_config.yaml holds no keys"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_is_named(tmp_path: Path, kind: str) -> None:
    content, expected = KINDS[kind]
    path = tmp_path / "base.nemo"
    path.write_bytes(content)
    assert expected in refusal(path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), "is a folder without model_config.yaml (it is empty); name a .nemo, or one unpacked"),
        (("context/model.yaml", "weights/.metadata"), "is a checkpoint of NeMo 2; export it"),
        (
            ("config.json", "model.safetensors"),
            "is a Hugging Face model; make a base of it: tied-lora import from=hf-base",
        ),
        (("adapter_config.json",), "is a peft adapter; make a tied adapter of it: tied-lora import from=lora"),
        (("latest_checkpointed_iteration.txt",), "is a checkpoint of Megatron-LM"),
        (("checkpoint.json",), "is a training checkpoint; tied-lora convert-checkpoint"),
        ((".metadata", "__0_0.distcp"), "is a distributed checkpoint without model_config.yaml"),
    ],
)
def test_another_kind_of_folder_is_named(tmp_path: Path, names: tuple[str, ...], expected: str) -> None:
    folder = unpacked(tmp_path, dict.fromkeys(names, b"{}"))
    assert expected in refusal(folder)


NLP = "nemo.collections.nlp.models.language_modeling"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mcore_gpt": None}, "mcore_gpt is not set: this base is not a Megatron-core GPT; convert it with NeMo's"),
        ({"mcore_gpt": False}, "convert_gpt_nemo_to_mcore.py"),
        ({"target": f"{NLP}.megatron_t5_model.MegatronT5Model"}, "is a MegatronT5Model"),
        ({"target": f"{NLP}.megatron_bert_model.MegatronBertModel", "mcore_gpt": None}, "is a MegatronBertModel"),
        ({"target": "nemo.collections.asr.models.EncDecCTCModelBPE"}, "is a EncDecCTCModelBPE"),
        ({"target": f"{NLP}.x.MegatronGPTPromptLearningModel"}, "is a MegatronGPTPromptLearningModel"),
        ({"nemo_version": "99.1.0rc0"}, "was written by NeMo 99.1.0rc0, newer than the NeMo"),
        ({"target": f"{NLP}.megatron_gpt_sft_model.MegatronGPTSFTModel"}, ""),
        ({"target": "nemo_tied_lora.nemo.model.MegatronGPTTiedLoraModel"}, ""),
        ({"target": None, "nemo_version": None}, ""),
        ({"nemo_version": "2.4.9"}, ""),
        ({"peft": {"peft_scheme": "none"}}, ""),
        ({"tokenizer": {"model": "nemo:tokenizer.model"}}, ""),
        (
            {"tokenizer": {"stored": {"vocab": "nemo:vocab.json"}}},
            "is not whole: its tokenizer.stored.vocab is vocab.json, which it does not hold",
        ),
    ],
)
def test_a_base_of_another_model_or_a_newer_nemo_is_named(tmp_path: Path, changes: dict, expected: str) -> None:
    found = refusal(write_base(tmp_path / "base.nemo", **changes))
    assert found == expected == "" or (expected and expected in found)


def test_weights_that_are_missing_or_shorter_than_their_description_are_named(tmp_path: Path) -> None:
    path, part = tmp_path / "base.nemo", "model_weights/__0_1.distcp"
    cases: list[tuple[dict[str, bytes | None], str]] = [
        ({part: None}, f"its {part} is missing, and .metadata names it"),
        ({part: b"w" * 1699}, f"its {part} is cut off: it has 1,699 bytes, and .metadata needs 1,700"),
        ({"model_weights/.metadata": None}, "its model_weights/ is not whole: .metadata is missing"),
        ({"model_weights/.metadata": b"\x80\x02}"}, "its model_weights/.metadata is damaged: "),
        (
            {"model_weights/metadata.json": b'{"sharded_backend": "torch_dist", "sharded_backend_version": 9}'},
            "its weights have the format torch_dist 9, which is newer than this release reads",
        ),
        ({"model_weights/metadata.json": b"{}"}, "its model_weights/metadata.json is damaged"),
        (
            {name: None for name in base_members() if name.startswith("model_weights")},
            "holds no weights (model_weights/... or model_weights.ckpt); it holds model_config.yaml, tokenizer.model",
        ),
    ]
    for number, (changes, expected) in enumerate(cases):
        members = {n: c for n, c in {**base_members(), **changes}.items() if c is not None}
        path.write_bytes(pack(members))
        assert expected in refusal(path)
        folder = unpacked(tmp_path / f"folder{number}", members)
        assert expected in refusal(folder)
    assert refusal(unpacked(tmp_path / "whole", base_members())) == ""


@pytest.mark.parametrize("name", ["model_weights.ckpt", "mp_rank_00/model_weights.ckpt"])
def test_a_legacy_file_of_weights_is_checked_at_its_end(tmp_path: Path, name: str) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", b"word_embeddings" * 99)
    config = {"model_config.yaml": yaml.safe_dump(BASE_CONFIG).encode()}
    path = tmp_path / "base.nemo"
    for weights, expected in (
        (content.getvalue(), ""),
        (content.getvalue()[:-30], f"its {name} is cut off: the directory at the end of a zip is missing"),
        (b"", f"its {name} is empty"),
    ):
        path.write_bytes(pack({**config, name: weights}))
        assert refusal(path) == expected


def test_a_pickle_of_metadata_runs_no_code(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    code = b"cos\nsystem\n(S'touch " + str(planted).encode() + b"'\ntR."
    path = tmp_path / "base.nemo"
    path.write_bytes(pack({**base_members(), "model_weights/.metadata": code}))
    assert "its model_weights/.metadata is damaged" in refusal(path)
    assert not planted.exists()


def test_adapters_and_bases_are_told_apart(tmp_path: Path) -> None:
    base, tied = write_base(tmp_path / "base.nemo"), tiny_adapter(tmp_path / "tied.nemo")
    lora, cut = tmp_path / "lora.nemo", tmp_path / "cut.nemo"
    names = b"PK\x03\x04 model.decoder.layers.0.adapter_layer.lora_kqv_adapter.linear_in.weight PK\x05\x06"
    config = yaml.safe_dump({**BASE_CONFIG, "peft": {"peft_scheme": "lora"}}).encode()
    lora.write_bytes(pack({"model_config.yaml": config, "model_weights.ckpt": names}))
    cut.write_bytes(tied.read_bytes()[:-11000])
    assert refusal(tied) == "is a Tied-LoRA adapter, not a base model"
    assert refusal(lora) == "is a stock NeMo adapter (lora), not a base model"
    assert adapter_problems(tied, "adapter") == []
    assert adapter_problems(base, "adapter") == [f"adapter={base}: is a base model, not an adapter"]
    assert (
        "is a stock NeMo adapter (lora), not a Tied-LoRA adapter; tied-lora import from=lora"
        in adapter_problems(lora, "a")[0]
    )
    assert "cut off" in adapter_problems(cut, "adapter")[0]
    assert "a model of the Hugging Face hub has to be downloaded" in refusal(Path("meta-llama/Llama-2-7b-hf"))
    assert adapter_problems(tmp_path / "none.nemo", "adapter") == [f"adapter={tmp_path}/none.nemo: no such file"]
    # A model whose every weight was tuned after a LoRA run keeps the scheme's name in its configuration.
    whole = pack({"model_config.yaml": config, "model_weights.ckpt": names + b"word_embeddings PK\x05\x06"})
    lora.write_bytes(whole)
    assert refusal(lora) == ""


def test_finetune_and_generate_refuse_such_files_before_anything_starts(tmp_path: Path) -> None:
    cut, adapter = tmp_path / "base.nemo", tmp_path / "adapter.nemo"
    cut.write_bytes(pack(base_members())[:5000])
    adapter.write_bytes(b"")
    words = {
        "finetune": [f"model.restore_from_path={cut}", f"model.peft.restore_from_path={adapter}"],
        "generate": [f"base={cut}", f"adapter={adapter}", "prompts=['a']"],
    }
    checks = {"finetune": check_finetuning, "generate": check_generation}
    for command, keys in (
        ("finetune", ("model.restore_from_path", "model.peft.restore_from_path")),
        ("generate", ("base", "adapter")),
    ):
        with pytest.raises(ConfigError) as refused:
            checks[command](plain(compose_config(command, words[command])))
        for key, path, expected in zip(keys, (cut, adapter), ("cut off: ", "is empty"), strict=True):
            assert any(p.startswith(f"{key}={path}: ") and expected in p for p in refused.value.problems)


def test_reading_sizes_alone_asks_less_of_a_base(tmp_path: Path) -> None:
    path = tmp_path / "base.nemo"
    path.write_bytes(pack({"model_config.yaml": yaml.safe_dump({"num_layers": 2}).encode()}))
    assert base_model_config(path, "base") == {"num_layers": 2}
    assert "mcore_gpt is not set" in usable_problems(path)
    assert "holds no weights" in usable_problems(path)


def usable_problems(path: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        usable_base(path, "base")
    return str(refused.value)
