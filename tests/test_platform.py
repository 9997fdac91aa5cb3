# SPDX-License-Identifier: Apache-2.0
"""The switches: each does nothing where the real thing is there, and megatron-core runs here with all of them."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from nemo_tied_lora.platform import (
    detect,
    no_apex,
    no_container,
    no_gpu,
    no_transformer_engine,
    patching,
    prepare,
)
from tests.ranks import single_process

SWITCHES = {
    "has_gpu": no_gpu,
    "has_apex": no_apex,
    "has_transformer_engine": no_transformer_engine,
    "in_nvidia_container": no_container,
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[patching.Patch]:
    """Patches that a switch asks for, none of them applied."""
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
def test_a_switch_touches_nothing_where_the_real_thing_is(
    question: str, nemo: bool, counted: list[patching.Patch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, question, lambda: True)
    assert SWITCHES[question].enable(nemo=nemo) == ()
    assert counted == []


@pytest.mark.parametrize("question", ["has_gpu", "has_apex"])
def test_a_switch_acts_where_it_is_not(
    question: str, counted: list[patching.Patch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, question, lambda: False)
    assert SWITCHES[question].enable(nemo=False)
    assert counted


def test_no_apex_does_not_assume_a_machine_without_a_gpu() -> None:
    """A GPU machine without apex must work: the two tables share no name."""
    gpu = {p.target for p in (*no_gpu.TORCH_PATCHES, *no_gpu.MEGATRON_PATCHES, *no_gpu.NEMO_PATCHES)}
    apex = {p.target for p in (*no_apex.MEGATRON_PATCHES, *no_apex.NEMO_PATCHES)}
    assert not gpu & apex


def test_every_patch_gives_its_reason() -> None:
    tables = (no_gpu.TORCH_PATCHES, no_gpu.MEGATRON_PATCHES, no_gpu.NEMO_PATCHES, no_apex.NEMO_PATCHES)
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
    from tests.tiny_gpt import SEQUENCE, build_gpt

    model = build_gpt(num_layers=2)
    tokens, positions = torch.zeros(1, SEQUENCE, dtype=torch.long), torch.arange(SEQUENCE).unsqueeze(0)
    model(tokens, positions, torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]).sum().backward()
    assert model.decoder.layers[0].self_attention.linear_qkv.weight.grad.abs().sum() > 0


def test_the_cheap_parts_import_neither_torch_nor_megatron() -> None:
    """`tied-lora plan` and every refusal answer in about a second."""
    code = (
        "import sys, nemo_tied_lora.commands.plan, nemo_tied_lora.preflight, nemo_tied_lora.commands.running;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'nemo')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
