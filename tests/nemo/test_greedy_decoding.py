# SPDX-License-Identifier: Apache-2.0
"""Several ranks: greedy decoding with a cache, against a whole forward for each token; answers' losses; negative controls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.nemo import inference_attention, inference_chunk
from nemo_tied_lora.nemo.answer_scores import losses_of_answers
from nemo_tied_lora.nemo.generated_rows import Ends
from nemo_tied_lora.nemo.greedy_decoding import decode_greedily
from nemo_tied_lora.nemo.inference_attention import KeyValueCache
from nemo_tied_lora.nemo.inference_chunk import InferenceChunk
from nemo_tied_lora.nemo.vocabulary_parallel import cross_entropy, likeliest
from tests.harness.ranks import run_ranks, single_process
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt
from tests.nemo.inference_scenarios import (
    ENDS,
    KINDS,
    PAIRS,
    PROMPTS,
    build,
    everything,
    expected,
    logits_of,
    without_cache,
)

LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "tp2 pp2": (2, 2)}


@pytest.fixture(autouse=True)
def _one_process() -> None:
    single_process()


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Equal tokens, and losses within the rounding of float64."""
    losses = zip(found["losses"], wanted["losses"], strict=True)
    return found["tokens"] == wanted["tokens"] and all(
        a[1] == b[1] and a[0] == pytest.approx(b[0], rel=1e-9) for a, b in losses
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_losses_equal_those_without_a_cache(kind: str, adapter: bool) -> None:
    wanted = expected(kind, adapter)
    lengths = {len(new) for new in wanted["tokens"].values()}
    assert len(lengths) > 2, "rows of several lengths, or leaving rows are not tested"
    assert same(everything(kind, adapter), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_on_every_rank(layout: str) -> None:
    tp, pp = LAYOUTS[layout]
    cases = [(kind, adapter) for kind in KINDS for adapter in (False, True)]
    for answers in run_ranks(_all_cases, cases, world_size=tp * pp, tp=tp, pp=pp):
        for case, found in zip(cases, answers, strict=True):
            assert same(found, expected(*case)), case


def _all_cases(cases: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    return [everything(*case) for case in cases]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_each_step_equal_those_without_a_cache(kind: str) -> None:
    model, rows = build(kind), [[5, 7, 9, 1, 2], [4, 8, 3], [6, 6, 6, 6]]
    logits = _step_logits(model, rows, prompt=2)
    for row, found in zip(rows, logits, strict=True):
        torch.testing.assert_close(found, logits_of(model, row)[1:], rtol=1e-9, atol=1e-9)


def _step_logits(model: Any, rows: list[list[int]], prompt: int) -> list[torch.Tensor]:
    """Logits after the prompt and after each later token, of rows that start with prompts of equal length."""
    cache = KeyValueCache(len(rows), 8)
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    with InferenceChunk(model) as chunk:
        tokens = torch.tensor([row[:prompt] for row in rows])
        hidden = chunk.hidden(tokens, torch.arange(prompt)[None], used=prompt, cache=cache)
        for i in range(len(rows)):
            found[i].append(chunk.logits(hidden[-1])[i])
        for place in range(prompt, max(map(len, rows))):
            tokens = torch.tensor([[row[place] if place < len(row) else 0] for row in rows])
            positions = torch.full((len(rows), 1), place)
            hidden = chunk.hidden(tokens, positions, used=place + 1, cache=cache, grows=True)
            for i, row in enumerate(rows):
                if place < len(row):
                    found[i].append(chunk.logits(hidden[-1])[i])
    return [torch.stack(each) for each in found]


def test_a_merged_adapter_gives_the_tokens_of_the_injected_one() -> None:
    merged = build("rope, grouped heads", adapter=True, merged=True)
    found = dict(decode_greedily(merged, PROMPTS, ENDS, batch_size=3))
    assert found == expected("rope, grouped heads", adapter=True)["tokens"]


def test_a_mixture_of_experts_generates() -> None:
    model = build_gpt(
        llama=True, num_moe_experts=4, moe_router_topk=2, moe_layer_freq=1, moe_ffn_hidden_size=16
    ).eval()
    found = dict(decode_greedily(model, PROMPTS, ENDS, batch_size=4))
    assert found == {number: without_cache(model, prompt) for number, prompt in enumerate(PROMPTS)}


def _sees_all(positions: torch.Tensor, used: int) -> torch.Tensor:
    return torch.ones(positions.shape[0], 1, 1, used, dtype=torch.bool)


def _one_late(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, positions, used: right(self, positions + (positions.shape[0] > 1), used + 1)


BREAKS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "the mask": (inference_chunk, "_up_to", lambda _: _sees_all),
    "the positions": (InferenceChunk, "_rotation", _one_late),
    "the rotation": (inference_attention, "rotate", lambda _: lambda x, *_: x),
    "the rows that move": (KeyValueCache, "move", lambda _: lambda *_: None),
    "the stored prompts": (
        KeyValueCache,
        "store_prompt",
        lambda right: lambda self, layer, key, value: right(self, layer, key, 0 * value),
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_part_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = BREAKS[broken]
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    kind = "rope, grouped heads"
    ends = Ends(tokens=ENDS.tokens, most=7)
    found = dict(decode_greedily(build(kind), PROMPTS, ends, batch_size=5))
    assert found != expected(kind, adapter=False)["tokens"]


def test_answers_that_share_a_prompt_must_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = build("rope, grouped heads"), expected("rope, grouped heads", adapter=False)["losses"]
    monkeypatch.setattr(
        "nemo_tied_lora.nemo.answer_scores._mask",
        lambda parts: torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool).tril()[None, None],
    )
    found = losses_of_answers(model, PAIRS)
    assert found[0][0] == pytest.approx(wanted[0][0])  # the first answer has only its prompt before it
    assert found[3][0] != pytest.approx(wanted[3][0], rel=1e-3)


def test_answers_cost_what_the_training_loss_says() -> None:
    model, (prompt, answer) = build("learned positions"), PAIRS[2]
    row = [*prompt, *answer]
    mask = torch.ones(len(row) - 1, len(row) - 1, dtype=torch.bool).triu(1)[None, None]
    losses = model(
        torch.tensor([row[:-1]]), torch.arange(len(row) - 1)[None], mask, labels=torch.tensor([row[1:]])
    )  # megatron-core computes it in float32
    nats, tokens = losses_of_answers(model, [(prompt, answer)])[0]
    assert tokens == 4
    assert nats == pytest.approx(float(losses[0, len(prompt) - 1 :].sum()), rel=1e-5)


def test_progress_counts_every_pair() -> None:
    done: list[int] = []
    losses_of_answers(build("learned positions"), PAIRS, batch_tokens=6, progress=done.append)
    assert sum(done) == len(PAIRS)
    assert len(done) > 1


def test_padding_of_the_vocabulary_never_wins() -> None:
    model, ends = build("learned positions"), Ends(tokens=frozenset(), most=6, positions=SEQUENCE)
    found = dict(decode_greedily(model, PROMPTS, ends, batch_size=7, vocabulary=9))
    assert found == {i: without_cache(model, prompt, ends, vocabulary=9) for i, prompt in enumerate(PROMPTS)}
    assert max(max(new) for new in without_limit(model, ends).values()) >= 9


def without_limit(model: Any, ends: Ends) -> dict[int, list[int]]:
    return dict(decode_greedily(model, PROMPTS, ends, batch_size=7))


def test_the_end_cannot_come_earlier_than_asked() -> None:
    model = build("rope, grouped heads")
    early = Ends(tokens=ENDS.tokens, most=7)
    late = Ends(tokens=ENDS.tokens, most=7, least=5)
    shortest = [min(map(len, without_limit(model, ends).values())) for ends in (early, late)]
    assert shortest[0] < 5 <= shortest[1]


def test_a_stop_text_ends_a_row_and_stays() -> None:
    model = build("learned positions")
    letters = {i: chr(65 + i) for i in range(VOCAB)}
    whole = "".join(letters[token] for token in without_cache(model, PROMPTS[2], Ends(tokens=frozenset(), most=7)))
    ends = Ends(tokens=frozenset(), texts=(whole[2:4],), to_text=lambda ids: "".join(map(letters.get, ids)), most=7)
    found = dict(decode_greedily(model, PROMPTS[2:3], ends, batch_size=1))[0]
    assert "".join(map(letters.get, found)) == whole[:4]


def test_the_chunk_is_as_before_even_after_a_failure() -> None:
    model = build("rope, grouped heads").train()
    before = _modules(model)
    with pytest.raises(RuntimeError, match="planted"):
        _fail_inside(model, before)
    assert _modules(model) == before
    assert model.training
    assert model.post_process
    assert model.decoder.input_tensor is None


def _fail_inside(model: Any, before: dict[str, int]) -> None:
    with InferenceChunk(model) as chunk:
        assert _modules(model) != before
        assert not model.training
        chunk.hidden(torch.tensor([[1, 2]]), torch.arange(2)[None], used=2)
        raise RuntimeError("planted")


def _modules(model: Any) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules()}


def test_half_weights_give_the_bits_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"dtype": torch.float32, "enable_autocast": True, "autocast_dtype": torch.bfloat16}
    model = build("rope, grouped heads", **options)
    held = _step_logits(model, [[5, 7, 9]], prompt=2)[0]
    assert model.decoder.layers[0].mlp.linear_fc1.weight.dtype == torch.float32
    monkeypatch.setattr(InferenceChunk, "_hold_half_weights", lambda *_: None)
    assert torch.equal(held, _step_logits(model, [[5, 7, 9]], prompt=2)[0])
    assert held.dtype == torch.bfloat16


def test_sums_between_layers_are_not_rounded_between_stages() -> None:
    model = build("learned positions", dtype=torch.float32, enable_autocast=True, autocast_dtype=torch.bfloat16)
    model.config.pipeline_dtype = torch.bfloat16  # as NeMo sets it, also where the sums are in float32
    with InferenceChunk(model) as chunk:
        assert (
            chunk.hidden(torch.tensor([[1, 2]]), torch.arange(2)[None], used=2).dtype == chunk.dtype == torch.float32
        )


def test_equal_logits_take_the_smallest_token_and_split_ones_give_the_same_losses() -> None:
    logits = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[0, [2, 5]] = 9.0
    logits[1] = 0.0
    targets = torch.tensor([0, 7, 3, 4, 5])
    wanted = likeliest(logits.clone(), 7, [(2, int(logits[2].argmax()))]), cross_entropy(logits, targets)
    assert wanted[0][:2].tolist() == [2, 0]
    torch.testing.assert_close(wanted[1], torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    for token, losses in run_ranks(_split, logits, targets, world_size=2, tp=2):
        assert torch.equal(token, wanted[0])
        torch.testing.assert_close(losses, wanted[1])


def _split(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mine = logits.chunk(2, dim=1)[torch.distributed.get_rank()]
    banned = [(2, int(logits[2].argmax()))]
    return likeliest(mine.clone(), 7, banned), cross_entropy(mine, targets)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("sequence_parallel", True, "sequence_parallel=true: inference does without; set it to false"),
        ("window_size", (4, 0), "window_size="),
        ("multi_latent_attention", True, "multi_latent_attention=True"),
    ],
)
def test_what_inference_does_not_compute_is_refused(
    field: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("learned positions")
    setattr(model.config, field, value)
    with pytest.raises(ConfigError, match=said):
        next(decode_greedily(model, PROMPTS, ENDS, batch_size=1))
    monkeypatch.setattr("megatron.core.parallel_state.get_context_parallel_world_size", lambda: 2)
    with pytest.raises(ConfigError) as refusal:
        losses_of_answers([model, model], PAIRS)
    assert "virtual_pipeline_model_parallel_size=2: " in str(refusal.value)
    assert "context_parallel_size=2: " in str(refusal.value)
