# SPDX-License-Identifier: Apache-2.0
"""One rank: a run of Bridge's own loop that is resumed from a checkpoint ends as the uninterrupted one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_tied_lora import ConfigError
from nemo_tied_lora.platform import prepare
from tests.harness.ranks import run_ranks

PRESETS = ("tl6", "vera")


def trained_by_bridges_loop(folder: str) -> dict[str, Any]:
    """A rank: trains a base, and on it each preset for four steps; resumes each from its second step."""
    prepare(bridge=True)
    from tests.bridge.training_loop import DROPPED, Forgetful, Scrambled, prepare_loop, settings, step

    prepare_loop()
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.pretrain import pretrain

    from nemo_tied_lora.bridge import TiedLoRA

    root, results = Path(folder), dict[str, Any](dropped=DROPPED)
    base = {"pretrained_checkpoint": str(root / "base")}
    pretrain(settings(root / "base", steps=2), step)

    def tuned(peft: TiedLoRA, name: str, **checkpoint: Any) -> dict[str, torch.Tensor]:
        finetune(settings(root / name, steps=4, peft=peft, **base, **checkpoint), step)
        assert peft.adapter is not None
        factors = peft.adapter.chunks[0].factors.named_parameters()
        return {key: parameter.detach().clone() for key, parameter in factors}

    for preset in PRESETS:
        whole = tuned(TiedLoRA.preset(preset, rank=3), preset)
        again, second = Scrambled.preset(preset, rank=3), {"load": str(root / preset), "ckpt_step": 2}
        results[preset] = whole, tuned(again, f"{preset}, resumed", **second)
        results[f"{preset}, saved"] = sorted(path.name for path in (root / f"{preset}, resumed").glob("iter_*"))
    try:
        tuned(Forgetful(rank=3), "forgetful")
        tuned(Forgetful(rank=3), "forgetful, resumed", load=str(root / "forgetful"), ckpt_step=2)
    except RuntimeError as error:
        results["forgetful"] = str(error)
    other = TiedLoRA.preset("vera", rank=3, alpha=99.0, seed=99, targets=["linear_qkv"])
    try:
        tuned(other, "tl6", load=str(root / "tl6"))
    except ConfigError as error:
        results["other fields"] = error.problems, other.adapter
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(trained_by_bridges_loop, str(tmp_path_factory.mktemp("loop")), world_size=1)[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_ends_as_the_uninterrupted_one_bit_for_bit(preset: str, results: dict[str, Any]) -> None:
    """VeRA's frozen A and B too: the checkpoint of the second step holds them. The resumed run makes the last two steps."""
    assert results[f"{preset}, saved"] == ["iter_0000004"]
    whole, resumed = results[preset]
    assert whole.keys() == resumed.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(resumed[name], tensor)] == []


def test_a_resume_that_drops_a_tensor_stops(results: dict[str, Any]) -> None:
    assert f"state dict: it lacks {results['dropped']} of the adapter" in results["forgetful"]


def test_a_finished_run_is_not_resumed_with_other_fields_and_no_model_is_built(results: dict[str, Any]) -> None:
    problems, adapter = results["other fields"]
    assert adapter is None
    assert [line.partition("=")[0] for line in problems] == [
        f"peft.{name}" for name in ("alpha", "targets", "trained", "seed")
    ]
    assert "iter_0000004, which has None; set it to that, or train in another folder" in problems[0]
    assert problems[0].startswith("peft.alpha=99.0: the run resumes from ")
