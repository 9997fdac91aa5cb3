# SPDX-License-Identifier: Apache-2.0
"""Two starts of real NeMo (one rank, then four), compared with the code of transformers, peft and stock NeMo.

Random Llama, Mistral, Qwen2 and GPT-2 made by transformers -> imported -> trained with Tied-LoRA at tensor parallel 2 x
pipeline parallel 2 -> exported -> loaded by peft onto the Hugging Face model.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers

from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from nemo_tied_lora.commands.main import main
from nemo_tied_lora.conversion.hf_config import nemo_keys
from nemo_tied_lora.conversion.hf_families import BaseSizes, family_of_model_type
from nemo_tied_lora.conversion.hf_weights import HfWeights, megatron_tensors
from nemo_tied_lora.conversion.to_peft_lora import check_hf_peft, write_hf_peft
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.base_config import base_model_config, recorded_model_keys
from tests.conversion import hugging_face_ranks
from tests.harness.command_runs import tied_lora, user_environment
from tests.harness.forks import fork_on_ranks, run_forked
from tests.harness.hugging_face_models import FAMILIES, tokens

# float32: both sides sum in their own order.
CLOSE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hugging_face")


def run_stage(stage: str, ranks: int, folder: Path) -> dict[str, Any]:
    arguments = [hugging_face_ranks.__name__, [stage, str(folder)], ranks]
    done = run_forked(fork_on_ranks, *arguments, cwd=folder, env=user_environment(), timeout=800)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-9000:]}"
    return torch.load(folder / f"{stage}.pt", weights_only=False)


@pytest.fixture(scope="module")
def imported(folder: Path) -> dict[str, Any]:
    return run_stage("import", 1, folder)


@pytest.fixture(scope="module")
def trained(folder: Path, imported: dict[str, Any]) -> dict[str, Any]:
    return run_stage("train", 4, folder)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares logits, except the columns of padding."""
    got = got[..., : expected.shape[-1]]
    assert (got - expected).abs().max() < CLOSE * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_imported_base_has_transformers_logits(imported: dict[str, Any], family: str) -> None:
    comparison = imported[family]["comparison"]
    assert comparison.largest_logit > 1
    assert comparison.relative < CLOSE
    assert comparison.not_compared is None
    assert comparison.differing_texts == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_imported_base_restores_at_tp2_pp2_with_transformers_logits(
    imported: dict[str, Any], trained: dict[str, Any], family: str
) -> None:
    assert_close(trained[family]["base"], imported[family]["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_gets_at_most_its_share_of_the_softmax(
    trained: dict[str, Any], imported: dict[str, Any], family: str
) -> None:
    rows, padded = imported[family]["logits"].shape[-1], trained[family]["base"].shape[-1]
    assert padded % 128 == 0
    assert padded > rows
    share = trained[family]["base"].double().softmax(-1)[..., rows:].sum(-1)
    assert share.max() <= (padded - rows) / rows


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_trained_adapters_logits_beside_the_model_and_merged(
    folder: Path, imported: dict[str, Any], trained: dict[str, Any], family: str
) -> None:
    file = read_adapter(folder / f"{family}_adapter.nemo")
    base = base_model_config(folder / f"{family}.nemo")
    write_hf_peft(file, base, folder / f"{family}_peft", None)
    assert check_hf_peft(folder / f"{family}_peft", file, base).relative < 1e-6
    adapted = trained[family]["adapted"]
    change = (adapted - trained[family]["base"]).abs().max()
    assert change > 0.01 * adapted.abs().max()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / family, attn_implementation="eager").eval()
    loaded = peft.PeftModel.from_pretrained(model, str(folder / f"{family}_peft")).eval()
    with torch.no_grad():
        beside = loaded(tokens(family)).logits
        merged = loaded.merge_and_unload()(tokens(family)).logits
    assert_close(adapted, beside)
    assert_close(trained[family]["merged"], merged)


@pytest.mark.parametrize("base", [*FAMILIES, "llama_tp2_pp2"])
def test_tied_lora_merge_gives_the_weights_of_pefts_merge_and_unload(
    folder: Path, trained: dict[str, Any], tmp_path: Path, base: str
) -> None:
    """Runs the command on bases saved by one rank and by four. Another test checks its comparison of logits."""
    family = base.removesuffix("_tp2_pp2")
    adapter, keys = folder / f"{family}_adapter.nemo", base_model_config(folder / f"{family}.nemo")
    words = [f"base={folder / base}.nemo", f"adapter={adapter}", f"output={tmp_path / 'merged.nemo'}"]
    assert main(["merge", *words, "verify=false"]) == 0
    write_hf_peft(read_adapter(adapter), keys, tmp_path / "peft", None)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / family)
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    expected = expected_tensors(tmp_path / "merged", family, keys)
    got = distributed_tensors(tmp_path / "merged.nemo", tmp_path / "content")
    assert {name for name in got if name.endswith(".weight")} >= {f"model.{name}" for name in expected}
    for name, tensor in expected.items():
        assert_close(got[f"model.{name}"], tensor)


def expected_tensors(folder: Path, family: str, keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The four linears of a Hugging Face folder in Megatron's order, with all layers stacked."""
    tensors = megatron_tensors(
        HfWeights(folder),
        family_of_model_type(family, "the test"),
        BaseSizes.from_model_config(keys, "the test"),
        qkv_bias=False,
        bias=False,
        shared=True,
        vocab_rows=keys["override_vocab_size"],
    )
    stacked: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors:
        if match := re.match(r"decoder\.layers\.\d+\.(.+\.linear_.+\.weight)$", name):
            stacked.setdefault(f"decoder.layers.{match[1]}", []).append(tensor)
    assert len(stacked) == 4
    return {name: torch.stack(layers) for name, layers in stacked.items()}


def distributed_tensors(path: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a base `.nemo`, read by torch."""
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    reader = dcp.FileSystemReader(folder / "model_weights")
    known = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in known.items() if hasattr(m, "size")}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def test_merge_compares_the_result_with_base_and_adapter_before_it_gets_its_name(
    folder: Path, trained: dict[str, Any]
) -> None:
    """Runs the command with its check on two tensor-parallel ranks, on a base that four ranks saved."""
    words = ["base=llama_tp2_pp2.nemo", "adapter=llama_adapter.nemo", "output=checked.nemo", "layout=tp2"]
    printed = tied_lora("merge", *words, "trainer.accelerator=cpu", folder=folder).stdout
    assert re.search(r"check: \d+ positions of 4 prompts: logits differ from base \+ adapter by at most", printed)
    assert "written: checked.nemo" in printed
    facts = json.loads((folder / "checked.check.json").read_text())
    assert facts["tensor_model_parallel_size"] == 2
    assert facts["relative"] < CLOSE
    assert facts["adapters_effect"] > 0.01 * facts["largest_logit"]
    assert facts["same_token"] == 1.0


def test_the_check_of_a_merge_finds_swapped_weights_and_a_base_without_adapters(imported: dict[str, Any]) -> None:
    right, *wrong = imported["merge"]
    assert right == "no error"
    assert len(wrong) == 2
    for error in wrong:
        assert "merged model: its logits differ from base + adapter by" in error


def test_a_legacy_checkpoint_restores_and_code_in_its_pickle_is_not_run(imported: dict[str, Any]) -> None:
    legacy = imported["legacy"]
    assert_close(legacy["logits"], imported["llama"]["logits"])
    assert len(legacy["refusals"]) == 2
    for error in legacy["refusals"]:
        assert "cannot be read as tensors alone, and is not run" in error
    assert legacy["run"] is False


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapters_own_record_of_its_base_is_enough_to_export_it(
    folder: Path, trained: dict[str, Any], family: str
) -> None:
    file = read_adapter(folder / f"{family}_adapter.nemo")
    write_hf_peft(file, recorded_model_keys(file.yaml), folder / f"{family}_peft_by_record", None)
    write_hf_peft(file, base_model_config(folder / f"{family}.nemo"), folder / f"{family}_peft", None)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        paths = [folder / f"{family}_peft{suffix}" / name for suffix in ("", "_by_record")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_stock_nemo_loads_the_nemo_lora_export_and_adds_the_same_update(imported: dict[str, Any]) -> None:
    stock = imported["stock"]
    assert len(stock["errors"]) == 8
    assert max(stock["errors"].values()) < CLOSE
    assert stock["others"] == []


def test_a_tied_adapter_fitted_to_a_lora_loads_onto_its_base_with_the_same_logits(imported: dict[str, Any]) -> None:
    logits = imported["stock"]["logits"]
    assert (logits["exported"] - logits["plain"]).abs().max() > 0.01 * logits["plain"].abs().max()
    assert_close(logits["fitted"], logits["exported"])


def test_weights_stored_in_half_precision_restore_in_float32(folder: Path, imported: dict[str, Any]) -> None:
    """Also checks the notes that the command prints."""
    printed = imported["half"]
    differ = re.search(r"logits differ from transformers' by at most \S+ \((\S+) of the largest\)", printed)
    assert differ is not None, printed
    assert 1e-5 < float(differ[1]) < 0.1
    assert f"written: {folder / 'half.nemo'}" in printed
    assert "check: the tokenizer gives Hugging Face's ids for every sample text" in printed
    assert (folder / "half.nemo").stat().st_size < (folder / "llama.nemo").stat().st_size


def test_a_gguf_file_becomes_a_base_with_the_files_logits_and_ids_and_names_its_quantisation(
    imported: dict[str, Any],
) -> None:
    got = imported["gguf"]
    assert_close(got["logits"], got["expected"])
    ours, theirs = got["ids"]
    assert ours == theirs
    assert "note: dequantised from Q4_1: tiny-model.Q4_1.gguf holds Q4_1 (" in got["printed"]
    assert "note: the vocabulary of tiny-model.Q4_1.gguf begins a text with no BOS" in got["printed"]
    assert "check: the tokenizer gives Hugging Face's ids for every sample text" in got["printed"]
    record = got["record"]
    assert (record["name"], record["file"]) == ("tiny-model", "tiny-model.Q4_1.gguf")
    assert record["quantisation"].startswith("Q4_1 (")


def test_an_import_whose_logits_differ_is_not_written(folder: Path, imported: dict[str, Any]) -> None:
    assert "logits differ" in imported["refusal"]
    assert not (folder / "wrong.nemo").exists()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_tokens_without_a_row_are_named_by_import_and_generate_and_prompts_with_them_are_refused(
    imported: dict[str, Any],
) -> None:
    """The padded embedding has rows enough."""
    rowless = imported["rowless"]
    (note,) = rowless["generate"]
    assert note in rowless["notes"]
    numbers = re.search(r"which has (\d+): (\d+) '<new3>', (\d+) '<new4>';", note)
    assert numbers is not None, note
    rows, first, second = numbers.groups()
    assert int(first) == int(rows) == int(second) - 1
    assert int(second) < rowless["rows"]
    assert note.startswith("2 tokens have no row in the embedding")
    lines = rowless["refusal"].splitlines()
    assert [line.partition(":")[0] for line in lines] == ["prompt 2", "prompt 3"]
    assert f"holds the token {first} '<new3>', which has no row in the base's embedding of {rows} rows" in lines[0]


def test_mistrals_window_limits_the_sequence_with_a_note(imported: dict[str, Any]) -> None:
    keys = imported["mistral"]["keys"]
    assert keys.model["encoder_seq_length"] == 16
    assert any("sliding window" in note for note in keys.notes)
    assert imported["llama"]["keys"].model["encoder_seq_length"] == 32


def test_features_that_megatron_lacks_are_refused_by_name() -> None:
    llama = transformers.LlamaConfig(attention_bias=True, hidden_act="gelu").to_dict()
    with pytest.raises(ConfigError) as caught:
        nemo_keys(llama)
    assert "hidden_act='gelu'" in str(caught.value)
    assert "attention_bias=True" in str(caught.value)
    with pytest.raises(ConfigError, match="rope_scaling"):
        nemo_keys({**transformers.LlamaConfig().to_dict(), "rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    with pytest.raises(ConfigError, match="model_type='bert'"):
        nemo_keys({"model_type": "bert"})
    keys = nemo_keys({**transformers.Qwen2Config().to_dict(), "vocab_size": 151936}).model
    assert (keys["qkv_bias"], keys["bias"], keys["override_vocab_size"]) == (True, False, 151936)


def test_a_folder_with_a_missing_shard_nan_or_code_in_its_pickle_is_refused(
    folder: Path, imported: dict[str, Any], tmp_path: Path
) -> None:
    shards = sorted((folder / "llama").glob("model-*.safetensors"))
    assert len(shards) > 1
    for source in (folder / "llama").iterdir():
        if source != shards[0]:
            (tmp_path / source.name).write_bytes(source.read_bytes())
    with pytest.raises(ConfigError, match=rf"{shards[0].name}: missing"):
        HfWeights(tmp_path)
    empty = tmp_path / "pickle"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors"):
        HfWeights(empty)
    torch.save({"x": torch.tensor([float("nan")])}, empty / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="NaN"):
        HfWeights(empty).take("x")
    torch.save({"x": _Evil()}, empty / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be read"):
        HfWeights(empty)


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)
