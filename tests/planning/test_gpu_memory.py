# SPDX-License-Identifier: Apache-2.0
"""One GPU's memory: counted by hand, by the paper's formulas, and from what autograd keeps of a real Megatron model."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch

from nemo_tied_lora import inject, quantize_base
from nemo_tied_lora.commands.plan import main
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.adapter_cost import Precision
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.gpu_memory import Activations, base_parameters, layer_bytes_per_token, stage_memory
from nemo_tied_lora.planning.megatron_version import megatron_version
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import SEQUENCE, build_gpt

O2 = Precision.from_names("bf16", amp_O2=True)
TL6 = TiedLoraConfig(rank=2)
# GPT-3 style: the paper's layer. Llama style: grouped queries, a gated MLP, a separate output layer.
GPT = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "encoder_seq_length": 16}
LLAMA = {
    "num_layers": 4,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "activation": "fast-swiglu",
    "bias": False,
    "normalization": "rmsnorm",
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": False,
    "encoder_seq_length": SEQUENCE,
    "override_vocab_size": 256,
}


def arch(config: dict[str, Any], **changes: Any) -> Architecture:
    return Architecture.from_model_config({**config, **changes})


def activations(model: Architecture, layout: Layout, precision: Precision = O2, **settings: Any) -> int:
    memory = stage_memory(model, layout, TL6, precision, Activations(**settings), 0)
    assert memory is not None
    return memory.activations


@pytest.mark.parametrize(
    ("tp_size", "sequence_parallel", "multiple_of_h"),
    [(1, False, 34), (4, False, 10 + 24 / 4), (4, True, 34 / 4)],
)
def test_a_layer_keeps_as_much_as_in_the_paper(tp_size: int, sequence_parallel: bool, multiple_of_h: float) -> None:
    layout = Layout(tp_size=tp_size, devices=tp_size, sequence_parallel=sequence_parallel)
    assert layer_bytes_per_token(arch(GPT), layout, TL6, 0, 2, dropout=True) == multiple_of_h * 64


def test_an_input_is_kept_only_for_a_trained_A() -> None:
    model = arch(LLAMA)
    every = layer_bytes_per_token(model, Layout(), TL6, 1, 2)
    frozen = TiedLoraConfig(rank=2, trained=["v", "B", "u"])
    fc2 = TiedLoraConfig(rank=2, targets=["linear_fc2"], layers=[1])
    assert every - layer_bytes_per_token(model, Layout(), frozen, 1, 2) == 2 * (48 + 48 + 80)
    assert layer_bytes_per_token(model, Layout(), fc2, 1, 2) == every - 2 * (48 + 48)
    assert layer_bytes_per_token(model, Layout(), fc2, 0, 2) == every - 2 * (48 + 48 + 80)


def test_a_small_case_by_hand() -> None:
    model = arch(LLAMA)
    layout = Layout(tp_size=2, pp_size=2, devices=4, sequence_parallel=True, micro_batch_size=3, global_batch_size=24)
    memory = stage_memory(model, layout, TL6, O2, Activations(), 1000)
    assert memory is not None
    # q is 48 wide, k and v 24; 256 rows of vocabulary in two halves; two layers per stage, two norms each.
    layer = (48 * (48 + 2 * 24) + 48 * 48 + 3 * 48 * 80) // 2 + 2 * 48
    assert base_parameters(model, layout, 0) == 2 * layer + 128 * 48
    assert base_parameters(model, layout, 1) == 2 * layer + 128 * 48 + 48
    # Everything except the masks is split in two. Stage 0 holds two microbatches; stage 1 one, its two inputs and the logits.
    token = 2 * (4 * 48 + (48 + 2 * 24) + 48 + 3 * 80) // 2
    assert activations(model, layout) == memory.activations == max(2 * 2 * token, 2 * token + 2 * 48 + 6 * 128) * 36
    assert memory.stage == 0
    assert memory.as_dict()["sum"] == memory.base + 1000 + memory.activations
    assert memory.base == 2 * base_parameters(model, layout, 0)


def test_recomputed_layers_keep_their_input_and_work_in_groups() -> None:
    model, tokens, head = arch(LLAMA), SEQUENCE, 2 * 2 * 48 + 6 * 256
    token = round(layer_bytes_per_token(model, Layout(), TL6, 0, 2))
    full = {"granularity": "full"}
    assert activations(model, Layout()) == tokens * (4 * token + head)
    assert activations(model, Layout(), granularity="selective") == activations(model, Layout())
    for number, kept, working in ((1, 4, 1), (3, 2, 3), (9, 1, 4)):
        counted = tokens * (kept * 2 * 48 + working * token + head)
        assert activations(model, Layout(), **full, method="uniform", num_layers=number) == counted
    counted = tokens * (3 * 2 * 48 + (1 + 1) * token + head)
    assert activations(model, Layout(), **full, method="block", num_layers=3) == counted


def test_microbatches_in_flight_are_megatrons() -> None:
    model = arch(GPT, override_vocab_size=128)
    stages = Layout(pp_size=4, devices=4)
    token = 32 * 64
    assert activations(model, stages) == 16 * 4 * 2 * token
    few = dataclasses.replace(stages, micro_batch_size=1, global_batch_size=3)
    assert activations(model, few) == 16 * 3 * 2 * token
    # The paper's section 4.2.3: interleaving multiplies the first stage's by 1 + (p - 1) / (p m).
    chunks = dataclasses.replace(stages, virtual_pp_size=2)
    assert activations(model, chunks) == 16 * 8 * token * (1 + 3 / 8)


def test_the_base_on_one_rank_is_the_whole_base() -> None:
    for config in (LLAMA, {**GPT, "override_vocab_size": 128}, {**LLAMA, "qkv_bias": True, "qk_layernorm": True}):
        assert base_parameters(arch(config), Layout(), 0) == arch(config).num_parameters
    shared = arch(GPT, override_vocab_size=128)
    ends = [base_parameters(shared, Layout(pp_size=2, devices=2), stage) for stage in (0, 1)]
    assert sum(ends) == (shared.num_parameters or 0) + 128 * 64, "the shared embedding lies on both ends"


def test_autograd_keeps_what_is_counted_of_a_real_model() -> None:
    """The real layer keeps more: what a fused MLP would not keep, and three matrices of the attention."""
    single_process()
    # silu(gate); from megatron-core 0.16 on also the other half, to which it adds its glu_linear_offset of 0.
    unfused = 4 * 80 * (1 if megatron_version() < (0, 16) else 2)
    layers = arch(LLAMA)
    for trained in (["v", "B", "u", "A"], ["v", "B", "u"]):
        config = TiedLoraConfig(rank=2, trained=trained, init_A="xavier")
        measured = _kept_per_token(5, config) - _kept_per_token(4, config)
        counted = layer_bytes_per_token(layers, Layout(), config, 0, 4) + unfused + 3 * 4 * 4 * SEQUENCE
        # A fused attention keeps its output; here only proj's A needs it.
        counted -= 0 if "A" in trained else 4 * 48
        assert counted < measured < 1.04 * counted, "r-wide tensors and norms' statistics make a small rest"


def _kept_per_token(num_layers: int, config: TiedLoraConfig) -> float:
    """Returns the bytes that autograd keeps of a forward pass in float32, without parameters."""
    sizes = {"hidden": 48, "heads": 4, "groups": 2, "ffn": 80, "num_layers": num_layers}
    model = build_gpt(llama=True, dtype=torch.float32, **sizes)
    adapter = inject(model, config)
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *adapter.parameters()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # a reference, so that no other tensor takes its address
        return tensor

    tokens = torch.zeros(3, SEQUENCE, dtype=torch.long)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).tril() < 0.5
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, torch.arange(SEQUENCE).expand(3, -1), mask)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in parameters) / (3 * SEQUENCE)


@pytest.mark.parametrize(
    "setting", ["nf4", "int8", {"kind": "nf4", "double": True}, {"kind": "nf4", "block_size": 32}]
)
def test_the_codes_of_a_real_model_have_the_planned_bytes(setting: Any) -> None:
    single_process()
    sizes = {"num_layers": 2, "heads": 4, "groups": 2}
    model = build_gpt(llama=True, dtype=torch.bfloat16, hidden=64, ffn=192, **sizes)
    planned = arch({**LLAMA, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192})
    quantization = BaseQuantization.from_setting(setting)
    assert quantization is not None
    memory = stage_memory(planned, Layout(), TL6, O2, Activations(), 0, quantization)
    report = quantize_base(model, **vars(quantization))
    assert memory is not None
    assert memory.quantised is not None
    assert memory.quantised.held_bytes == report.bytes_after
    assert memory.quantised.unquantised_bytes == report.bytes_before
    assert memory.quantised.precision == report.precision
    assert memory.dequantised == model.decoder.layers[0].mlp.linear_fc1.weight.dequantize().nbytes


def test_the_plan_prints_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama2_7b", "layout=tp8", "trainer.num_nodes=2", "model.sequence_parallel=true"]
    assert main([*words, "format=json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    # 32 layers; 4096 wide, 11008 in the MLP, 32000 rows of vocabulary, eight ways; 65 norms.
    base = 32 * (4 * 4096**2 + 3 * 4096 * 11008) // 8 + 2 * 4096 * 32768 // 8 + 65 * 4096
    assert memory["base"] == 2 * base
    token = 2 * (4 * 4096 + 4 * 4096 + 3 * 11008) / 8
    assert memory["activations"] == 4096 * (32 * token + (2 * 2 * 4096 + 6 * 32768) / 8)
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "one GPU, an estimate" in table
    assert re.search(rf"^base weights +{memory['base'] / 2**30:.2f} GiB$", table, flags=re.M)
    assert main([*words, "model.override_vocab_size=null", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] is None


def test_values_that_nemo_would_not_accept_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Activations(granularity="some", num_layers=0)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="full needs uniform or block"):
        Activations(granularity="full")
