# SPDX-License-Identifier: Apache-2.0
"""One process: each switch does nothing if the machine has the part, and megatron-core runs here with all switches."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nemo_tied_lora.platform import (
    detect,
    group_step_adam,
    no_apex,
    no_bridge_kernels,
    no_container,
    no_gpu,
    no_gpu_torch,
    no_transformer_engine,
    patching,
    prepare,
)
from tests.harness.ranks import single_process

SWITCHES = {
    "has_gpu": no_gpu,
    "has_apex": no_apex,
    "has_transformer_engine": no_transformer_engine,
    "in_nvidia_container": no_container,
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[patching.Patch]:
    """Collects the patches that a switch asks for, without applying them."""
    asked: list[patching.Patch] = []

    def note(patches: tuple[patching.Patch, ...]) -> tuple[str, ...]:
        asked.extend(patches)
        return tuple(patch.target for patch in patches)

    for switch in SWITCHES.values():
        if hasattr(switch, "apply"):
            monkeypatch.setattr(switch, "apply", note)
    return asked


@pytest.mark.parametrize("question", SWITCHES)
@pytest.mark.parametrize("nemo", [False, True])
def test_a_switch_changes_nothing_if_the_machine_has_the_part(
    question: str, nemo: bool, counted: list[patching.Patch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, question, lambda: True)
    assert SWITCHES[question].enable(nemo=nemo) == ()
    assert counted == []


def test_bridges_switches_change_nothing_if_the_machine_has_the_parts(
    counted: list[patching.Patch], monkeypatch: pytest.MonkeyPatch
) -> None:
    finders = list(sys.meta_path)
    monkeypatch.setattr(detect, "has_gpu", lambda: True)
    monkeypatch.setattr(detect, "has_transformer_engine", lambda: True)
    assert no_gpu.enable_bridge() == no_bridge_kernels.enable() == ()
    assert counted == []
    assert sys.meta_path == finders


@pytest.mark.parametrize("question", ["has_gpu", "has_apex"])
def test_a_switch_acts_if_the_machine_lacks_the_part(
    question: str, counted: list[patching.Patch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, question, lambda: False)
    assert SWITCHES[question].enable(nemo=False)
    assert counted


def test_no_apex_does_not_assume_a_machine_without_a_gpu() -> None:
    """A GPU machine without apex must work, so the two tables share no name."""
    gpu = {p.target for p in (*no_gpu.TORCH_PATCHES, *no_gpu.MEGATRON_PATCHES, *no_gpu.NEMO_PATCHES)}
    apex = {p.target for p in (*no_apex.MEGATRON_PATCHES, *no_apex.NEMO_PATCHES)}
    assert not gpu & apex


def test_every_patch_gives_its_reason() -> None:
    tables = (
        no_gpu.TORCH_PATCHES,
        no_gpu.MEGATRON_PATCHES,
        no_gpu.BRIDGE_PATCHES,
        no_gpu.NEMO_PATCHES,
        no_apex.NEMO_PATCHES,
    )
    assert all(len(patch.reason) > 10 for table in tables for patch in table)


def test_a_patch_is_applied_once_and_given_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = ModuleType("a_module_of_this_test")
    owner.name = "original"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, owner.__name__, owner)
    patch = patching.Patch(owner=owner.__name__, name="name", make=lambda value: f"{value}, replaced", reason="a test")
    assert patching.apply([patch]) == ("a_module_of_this_test.name",)
    assert patching.apply([patch]) == ()
    assert owner.name == "original, replaced"  # type: ignore[attr-defined]


def test_prepare_twice_replaces_nothing_more_and_megatron_trains() -> None:
    single_process()
    report = prepare()
    assert report.replaced == ()
    assert report.gpu == torch.cuda.is_available()
    from tests.harness.tiny_gpt import SEQUENCE, build_gpt

    model = build_gpt(num_layers=2)
    tokens, positions = torch.zeros(1, SEQUENCE, dtype=torch.long), torch.arange(SEQUENCE).unsqueeze(0)
    model(tokens, positions, torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]).sum().backward()
    assert model.decoder.layers[0].self_attention.linear_qkv.weight.grad.abs().sum() > 0


def test_planning_and_launching_import_neither_torch_nor_megatron() -> None:
    """So `tied-lora plan` and refusals take about a second, and `launch` runs on machines without torch."""
    code = (
        "import sys, nemo_tied_lora.commands.plan, nemo_tied_lora.planning.preflight, nemo_tied_lora.commands.distributed_command;"
        "import nemo_tied_lora.commands.launch, nemo_tied_lora.commands.report, nemo_tied_lora.commands.status;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'nemo')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unrelated_package_called_apex_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex.py").write_text("name = 'another project'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert not detect.has_apex()


def test_the_stand_in_reads_cuda_as_cpu_and_leaves_torch_alone() -> None:
    factories = {name: getattr(torch, name) for name in ("zeros", "tensor", "empty", "autocast")}
    stand_in = no_gpu_torch.no_gpu_torch()
    assert stand_in.zeros(2, device="cuda").device.type == "cpu"
    assert stand_in.tensor([1], device=torch.device("cuda", 0)).device.type == "cpu"
    assert stand_in.empty(2, device="meta").device.type == "meta"
    assert stand_in.nn is torch.nn
    assert all(getattr(torch, name) is factory for name, factory in factories.items())


def test_cuda_type_names_end_with_the_block() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    with no_gpu_torch.cuda_type_names():
        assert parameter.type() == "torch.cuda.FloatTensor"
        assert parameter.type(torch.float64).dtype == torch.float64
    with pytest.raises(ZeroDivisionError):
        no_gpu_torch.with_cuda_type_names(lambda: 1 / 0)()
    assert parameter.type() == "torch.FloatTensor"


def test_drawing_from_a_named_random_state_leaves_the_default_one() -> None:
    single_process()
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    def draw() -> tuple[torch.Tensor, ...]:
        model_parallel_cuda_manual_seed(7)
        with get_cuda_rng_tracker().fork():
            first = torch.rand(3)
        default = torch.rand(3)
        with get_cuda_rng_tracker().fork():
            return first, default, torch.rand(3)

    first, default, second = draw()
    assert all(torch.equal(a, b) for a, b in zip((first, default, second), draw(), strict=True))
    model_parallel_cuda_manual_seed(7)
    assert torch.equal(default, torch.rand(3)), "drawing from a named state moved the default one"
    assert not torch.equal(first, second)
    with pytest.raises(KeyError, match="never seeded"), get_cuda_rng_tracker().fork("no such state"):
        pass


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_the_local_norm_takes_sequence_parallelism_and_flags_its_parameters(normalization: str) -> None:
    prepare()
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "tensor_model_parallel_size": 2}
    config = TransformerConfig(**sizes, normalization=normalization, sequence_parallel=True, persist_layer_norm=True)
    norm = WrappedTorchNorm(config, 8)
    assert all(parameter.sequence_parallel for parameter in norm.parameters())
    assert config.sequence_parallel, "the model's own config was changed"
    assert config.persist_layer_norm, "the model's own config was changed"
    config.layernorm_zero_centered_gamma = True
    with pytest.raises(AssertionError, match="zero_centered_gamma"):
        WrappedTorchNorm(config, 8)


def test_bf16_autocast_reaches_the_backward_pass_of_megatrons_linears() -> None:
    single_process()
    from tests.harness.tiny_gpt import SEQUENCE, build_gpt

    model = build_gpt(num_layers=1, dtype=torch.float32)
    tokens, positions = torch.zeros(1, SEQUENCE, dtype=torch.long), torch.arange(SEQUENCE).unsqueeze(0)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    with no_gpu_torch.no_gpu_torch().autocast("cuda", dtype=torch.bfloat16):
        logits = model(tokens, positions, mask)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert model.decoder.layers[0].mlp.linear_fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_megatrons_distributed_optimizer_steps(precision: torch.dtype) -> None:
    single_process()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from tests.harness.tiny_gpt import SEQUENCE, build_gpt

    model = build_gpt(num_layers=1, dtype=precision, bf16=precision == torch.bfloat16)
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model
    )
    options = OptimizerConfig(
        optimizer="adam",
        lr=0.1,
        params_dtype=precision,
        bf16=precision == torch.bfloat16,
        use_distributed_optimizer=True,
        clip_grad=1e-3,
    )
    optimizer = get_megatron_optimizer(options, [wrapped])
    tokens, positions = torch.zeros(1, SEQUENCE, dtype=torch.long), torch.arange(SEQUENCE).unsqueeze(0)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    before = model.decoder.layers[0].mlp.linear_fc1.weight.detach().clone()
    wrapped(tokens, positions, mask).float().square().mean().backward()
    wrapped.finish_grad_sync()
    stepped, norm, _ = optimizer.step()
    assert stepped
    assert norm > 1e-3, "the gradient was to be clipped"
    assert not torch.equal(model.decoder.layers[0].mlp.linear_fc1.weight, before)


@pytest.mark.parametrize("name", ["GroupStepAdam", "GroupStepAdamW"])
def test_adam_saves_tensors_of_the_parameters_shape_alone_and_resumes_exactly(name: str) -> None:
    def build(parameters: list[torch.nn.Parameter]) -> torch.optim.Adam:
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
        return getattr(group_step_adam, name)(groups, lr=0.1, weight_decay=0.01)

    def step(optimizer: torch.optim.Adam, parameters: list[torch.nn.Parameter]) -> None:
        optimizer.zero_grad()
        torch.stack([parameter.square().sum() for parameter in parameters]).sum().backward()
        optimizer.step()

    parameters = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))]
    optimizer = build(parameters)
    for _ in range(3):
        step(optimizer, parameters)
    saved = copy.deepcopy(optimizer.state_dict())
    assert [group["step"] for group in saved["param_groups"]] == [3.0, 3.0]
    shapes = {index: {value.shape for value in state.values()} for index, state in saved["state"].items()}
    assert shapes == {0: {torch.Size([3])}, 1: {torch.Size([2])}}

    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = build(copies)
    resumed.load_state_dict(saved)
    step(optimizer, parameters)
    step(resumed, copies)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
    assert all(int(resumed.state[parameter]["step"]) == 4 for parameter in copies)
