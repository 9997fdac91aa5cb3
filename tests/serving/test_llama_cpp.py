# SPDX-License-Identifier: Apache-2.0
"""The whole way to GGUF: an adapter, `tied-lora export`, llama.cpp's own script. Compares every tensor, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from nemo_tied_lora.commands.main import main as tied_lora
from tests.harness.gguf_files import llama_cpp_rows
from tests.harness.lora_folders import CONFIG, WEIGHTS
from tests.harness.random_adapters import pruned, random_adapter
from tests.serving.served_models import Base, serving_python

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {"preset": "tl6", "rank": 4, "alpha": 6}),
    "Llama, some layers and targets": (
        "llama",
        {"rank": 3, "layers": [0, 2], "targets": ["linear_qkv", "linear_fc2"]},
    ),
    "Qwen2, VeRA": ("qwen2", {"preset": "vera", "rank": 5}),
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Hugging Face's linears -> llama.cpp's."""
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    return {family: Base(family, tmp_path_factory.mktemp(family)) for family in ("llama", "qwen2")}


def converted(base: Base, folder: Path) -> gguf.GGUFReader:
    """What llama.cpp's script makes of a folder of peft."""
    output = folder.with_suffix(".gguf")
    script = Path(serving_python()).parents[1] / "llama.cpp" / "convert_lora_to_gguf.py"
    command = [serving_python(), str(script), "--base", str(base.folder), "--outfile", str(output), str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return gguf.GGUFReader(output)


def renamed(base: Base, folder: Path, *, reordered: bool) -> Tensors:
    """The folder's tensors by llama.cpp's names. `reordered`: with the rows of q and k in llama.cpp's order."""
    heads = {"q_proj": base.keys["num_attention_heads"], "k_proj": base.keys["num_query_groups"]}
    found = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        _, layer, block, linear, factor, _ = name.removeprefix("base_model.model.model.").split(".")
        rows = (
            llama_cpp_rows(tensor, heads[linear]) if reordered and factor == "lora_B" and linear in heads else tensor
        )
        found[f"blk.{layer}.{NAMES[f'{block}.{linear}']}.weight.{factor.lower()}"] = rows
    return found


def tensors(reader: gguf.GGUFReader) -> Tensors:
    return {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


def alpha(reader: gguf.GGUFReader) -> float:
    return float(reader.fields["adapter.lora.alpha"].contents())


@pytest.mark.parametrize("name", CASES)
def test_llama_cpps_script_writes_every_tensor_of_an_export_and_its_alpha(bases: dict[str, Base], name: str) -> None:
    family, fields = CASES[name]
    base = bases[family]
    folder = base.export(name.replace(",", ""), random_adapter(base.keys, **fields))
    reader = converted(base, folder)
    written, wanted = tensors(reader), renamed(base, folder, reordered=family == "llama")
    assert written.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(written[key], wanted[key])] == []
    assert alpha(reader) == json.loads((folder / CONFIG).read_text())["lora_alpha"]


def test_the_order_of_rows_is_a_part_of_what_is_compared(bases: dict[str, Base]) -> None:
    """llama.cpp reorders q and k of a Llama, whose rotary embedding it computes on neighbours, and not those of a Qwen2."""
    for family in bases:
        folder = bases[family].export("order", random_adapter(bases[family].keys, rank=2, targets=["linear_qkv"]))
        one, other = (renamed(bases[family], folder, reordered=reordered) for reordered in (False, True))
        assert sum(not torch.equal(one[key], other[key]) for key in one) == 6, "lora_B of q and k, in 3 layers"


def test_a_pruned_adapter_needs_the_same_rank_everywhere(bases: dict[str, Base]) -> None:
    """llama.cpp multiplies by alpha / the rank of the tensor; its file has one alpha."""
    base = bases["llama"]
    folder = base.export("pruned", pruned(random_adapter(base.keys, rank=4)))
    uniform = folder.with_name("uniform")
    path = folder.with_suffix(".nemo")
    assert tied_lora(["export", f"adapter={path}", "to=hf-peft", f"output={uniform}", "uniform_rank=true"]) == 0
    assert max(scales(converted(base, folder))) == 4.0  # of rank 1
    assert scales(converted(base, uniform)) == {1.0}


def scales(reader: gguf.GGUFReader) -> set[float]:
    """By which numbers llama.cpp multiplies the updates."""
    return {alpha(reader) / len(tensor) for name, tensor in tensors(reader).items() if name.endswith("lora_a")}
