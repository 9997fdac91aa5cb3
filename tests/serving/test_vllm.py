# SPDX-License-Identifier: Apache-2.0
"""The whole way: an adapter, `tied-lora export`, vLLM's engine on a CPU. The oracle is transformers with peft.

One engine per base serves all its claims, in one batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.lora_folders import edit_tensors
from tests.harness.random_adapters import pruned, random_adapter
from tests.serving.served_models import Base, Served, by_peft, by_vllm, prompt

TOLERANCE = 1e-3
"""Of a log-probability. In float32 the largest difference was 5e-5, and 1e-5 on the bases alone."""
LLAMA: dict[str, dict[str, Any]] = {
    "all targets": {"preset": "tl6", "rank": 8, "alpha": 12},
    "some layers and targets": {"preset": "tl5", "rank": 3, "layers": [1], "targets": ["linear_qkv", "linear_fc2"]},
    "alpha that is not whole": {"preset": "lora", "rank": 4, "alpha": 5, "alpha_rule": "sqrt"},
    "pruned": {"preset": "tl6", "rank": 6},
}
"""On the Llama. It has query groups, and heads wider than hidden / heads."""
WRONG = "rows of k in another order"
QWEN2: dict[str, dict[str, Any]] = {"VeRA": {"preset": "vera", "rank": 16}}

PROMPTS = [prompt(0), prompt(1)]

Results = dict[str | None, list[tuple[Served, Served]]]
"""An adapter, or None for the base -> vLLM's and peft's, for each prompt."""


def results(base: Base, folders: dict[str, Path], oracle: dict[str, Path] | None = None) -> Results:
    """Every adapter and the base answer every prompt, in one batch. `oracle`: what peft loads instead of an adapter."""
    names: list[str | None] = [None, *folders]
    asked = [(name, tokens) for tokens in PROMPTS for name in names]
    loaded = {**folders, **(oracle or {})}
    found: Results = {name: [] for name in names}
    for (name, tokens), served in zip(asked, by_vllm(base, folders, asked), strict=True):
        found[name].append((served, by_peft(base, loaded[name] if name else None, tokens)))
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Results:
    base = Base("llama", tmp_path_factory.mktemp("llama"))
    folders = {}
    for name, fields in LLAMA.items():
        file = random_adapter(base.keys, **fields)
        folders[name] = base.export(name, pruned(file) if name == "pruned" else file)
    folders[WRONG] = base.export(WRONG, random_adapter(base.keys, **LLAMA["all targets"]))
    edit_tensors(folders[WRONG], _reverse_rows_of_k)
    return results(base, folders, {WRONG: folders["all targets"]})


def _reverse_rows_of_k(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if name.endswith("k_proj.lora_B.weight"):
            tensors[name] = tensors[name].flip(0)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Results:
    base = Base("qwen2", tmp_path_factory.mktemp("qwen2"))
    return results(base, {name: base.export(name, random_adapter(base.keys, **QWEN2[name])) for name in QWEN2})


def differences(pairs: list[tuple[Served, Served]]) -> list[float]:
    """The largest of a log-probability, for each prompt."""
    assert all(served.logprobs.shape == expected.logprobs.shape for served, expected in pairs)
    return [(served.logprobs - expected.logprobs).abs().max().item() for served, expected in pairs]


@pytest.mark.parametrize("name", [None, *LLAMA])
def test_vllm_serves_a_llama_with_pefts_next_tokens_and_logprobs(llama: Results, name: str | None) -> None:
    """All adapters and the base are in one batch."""
    assert [served.tokens for served, _ in llama[name]] == [expected.tokens for _, expected in llama[name]]
    assert max(differences(llama[name])) < TOLERANCE


@pytest.mark.parametrize("name", [None, *QWEN2])
def test_vllm_serves_vera_on_qwen2_with_pefts_next_tokens_and_logprobs(qwen2: Results, name: str | None) -> None:
    assert [served.tokens for served, _ in qwen2[name]] == [expected.tokens for _, expected in qwen2[name]]
    assert max(differences(qwen2[name])) < TOLERANCE


def test_two_adapters_and_the_base_answer_one_prompt_differently_in_one_batch(llama: Results) -> None:
    rows = [llama[name][0][0].logprobs[0] for name in (None, "all targets", "some layers and targets")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (rows[one] - rows[other]).abs().max() > 0.1


def test_the_comparison_finds_an_export_with_rows_in_another_order(llama: Results) -> None:
    assert min(differences(llama[WRONG])) > 100 * TOLERANCE
