# SPDX-License-Identifier: Apache-2.0
"""One process, a tiny real megatron-core GPT on one device: what the core library does there is what it does on a CPU.

On a machine without a GPU these tests run on the CPU alone, so that they are known to work. On a machine with one,
`pytest -m gpu tests/gpu` runs them on it, with NCCL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from nemo_tied_lora import TiedLoraConfig, check_ddp, inject, load_adapter, save_adapter
from nemo_tied_lora.adapter.factor_names import expected_shapes
from nemo_tied_lora.adapter.injected_adapter import Adapter
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt, full_tensor

RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def adapted(
    device: str, preset: str = "tl6", base: torch.dtype = torch.float64, factors: str | None = None, **options: Any
) -> tuple[Any, Adapter]:
    """The tiny GPT on a device with an adapter none of whose factors is 0. Dtype of factors: None is that of the base."""
    model = build_gpt(dtype=base, **options).to(device)
    config = TiedLoraConfig.preset(preset, rank=4, dtype=factors)
    adapter = inject(model, config)
    shapes = expected_shapes(adapter.config, adapter.shapes)
    adapter.load_full_state({name: full_tensor(f"start {name}", shape) for name, shape in shapes.items()})
    return model, adapter


def losses(model: Any, device: str, seed: int = 0) -> torch.Tensor:
    """(batch, sequence), in nats."""
    drawn = torch.randint(0, VOCAB, (3, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed)).to(device)
    positions = torch.arange(SEQUENCE, device=device).expand(3, SEQUENCE)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool, device=device).triu(1)[None, None]
    return model(drawn[:, :-1], positions, mask, labels=drawn[:, 1:])


def losses_and_gradients(device: str, preset: str, **options: Any) -> dict[str, torch.Tensor]:
    """The losses and each factor's gradient, on the CPU."""
    model, adapter = adapted(device, preset, **options)
    found = losses(model, device)
    found.mean().backward()
    adapter.reduce_gradients()
    gradients = {name: factor.grad for name, factor in adapter.named_parameters() if factor.grad is not None}
    return {name: tensor.detach().cpu() for name, tensor in {"losses": found, **gradients}.items()}


@pytest.mark.parametrize("options", [{}, RECOMPUTED], ids=["plain", "recomputed"])
@pytest.mark.parametrize("preset", ["tl6", "tl5", "vera", "lora"])
def test_losses_and_gradients_are_those_of_the_cpu(device: str, preset: str, options: dict[str, Any]) -> None:
    expected = losses_and_gradients("cpu", preset)
    found = losses_and_gradients(device, preset, **options)
    assert found.keys() == expected.keys()
    assert len(found) > 4
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)


def test_an_adapter_in_float32_learns_on_a_bfloat16_base(device: str) -> None:
    model, adapter = adapted(device, base=torch.bfloat16, factors="float32")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    curve = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = losses(model, device).float().mean()
        loss.backward()
        adapter.reduce_gradients()
        adapter.clip_gradients(1.0)
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < 0.9 * curve[0]


def test_megatrons_distributed_optimizer_steps_as_torchs(device: str) -> None:
    states = []
    for distributed in (False, True):
        model, adapter = adapted(device, base=torch.float32)
        if distributed:
            ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
            check_ddp(model.config, ddp)
            wrapped = DistributedDataParallel(model.config, ddp, model)
            settings = OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.0, use_distributed_optimizer=True)
            optimizer: Any = get_megatron_optimizer(settings, [wrapped])
            for _ in range(3):
                wrapped.zero_grad_buffer()
                optimizer.zero_grad()
                losses(wrapped, device).mean().backward()
                finalize_model_grads([wrapped])
                optimizer.step()
        else:
            optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
            for _ in range(3):
                optimizer.zero_grad()
                losses(model, device).mean().backward()
                adapter.reduce_gradients()
                adapter.clip_gradients(1.0)
                optimizer.step()
        states.append({name: tensor.cpu() for name, tensor in adapter.full_state().items()})
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_saved_adapter_has_the_same_bits_on_the_cpu(device: str, tmp_path: Path) -> None:
    _, adapter = adapted(device)
    save_adapter(adapter, tmp_path / "adapter.nemo")
    loaded = load_adapter(build_gpt(), tmp_path / "adapter.nemo")
    for name, tensor in adapter.full_state().items():
        assert torch.equal(loaded.full_state()[name].cpu(), tensor.cpu()), name


def test_a_merged_model_gives_the_adapters_losses(device: str) -> None:
    model, adapter = adapted(device)
    before = losses(model, device).detach()
    adapter.merge()
    torch.testing.assert_close(losses(model, device), before, rtol=1e-9, atol=1e-12)
    adapter.unmerge()
    torch.testing.assert_close(losses(model, device), before, rtol=1e-9, atol=1e-12)
    adapter.remove()
    assert not torch.allclose(losses(model, device), before, rtol=1e-3)  # negative control
