# SPDX-License-Identifier: Apache-2.0
"""Pure maths and one process: the rank budget follows its schedule, and makes none of PEFT's mistakes.

The mistakes, with PEFT's issues: the update is a call that users forget (#432, #1801, #3373); entries with equal scores are
pruned together; a budget of 0 entries fails (#2337); the state is lost at a resume; a regulariser changes the reported loss
(#1798). tests/parity compares the masks of every layout with the single process's.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject
from nemo_tied_lora.adapter.rank_budget.importance import Importance
from nemo_tied_lora.adapter.rank_budget.schedule import BudgetSchedule, length_problems
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import RankBudget
from tests.adapter.test_inject import loss_of
from tests.harness.ranks import single_process
from tests.harness.tiny_gpt import build_gpt
from tests.parity.training import randomise

CPU = torch.device("cpu")
BUDGET: dict[str, Any] = {"target_rank": 1.5, "start_step": 1, "final_step": 4, "every": 1}


def schedule(**changes: int) -> BudgetSchedule:
    return BudgetSchedule(**{"entries": 12, "target": 5, "start": 2, "final": 8, "every": 2, **changes})


def test_the_budget_is_the_papers_cubic_and_exact_at_both_ends() -> None:
    plan = schedule()
    assert [plan.budget(t) for t in range(11)] == [12, 12, 12, 9, 7, 6, 5, 5, 5, 5, 5]
    assert [plan.budget(t) for t in (3, 4, 5)] == [5 + round(7 * (1 - (t - 2) / 6) ** 3) for t in (3, 4, 5)]
    assert [t for t in range(11) if plan.chooses(t)] == [4, 6, 8]
    # The last choice comes at `final`, even if `every` does not divide it: the target is always reached.
    assert [t for t in range(11) if schedule(final=7).chooses(t)] == [4, 6, 7]
    assert BudgetSchedule.from_dict(plan.as_dict()) == plan


def test_the_runs_length_decides_only_what_is_left_open() -> None:
    shapes = [LinearShape("column", 24, 24, 1, tuple(range(4))), LinearShape("row", 24, 24, 1, (0, 1), num_experts=3)]

    def of_run(max_steps: int, **values: Any) -> BudgetSchedule:
        return BudgetSchedule.of_run(RankBudget(**values), 4, shapes, max_steps)

    plan = of_run(600, target_rank=1.55)
    assert (plan.entries, plan.target, plan.start, plan.final, plan.every) == (40, 16, 100, 400, 10)
    assert of_run(600, target_rank=2, start_step=7, final_step=9).final == of_run(9, target_rank=2, final_step=9).final
    assert (of_run(2, target_rank=4).start, of_run(2, target_rank=4).final) == (1, 2)
    with pytest.raises(ConfigError, match=r"rank_budget\.final_step=9: max_steps=8 ends the run .* at most 8"):
        of_run(8, target_rank=2, final_step=9)
    with pytest.raises(ConfigError, match=r"rank_budget\.start_step=8: max_steps=8 ends the run .* at most 7"):
        of_run(8, target_rank=2, start_step=8)
    (problem,) = length_problems(RankBudget(target_rank=2), 1, "trainer.max_steps")
    assert problem.startswith("rank_budget: trainer.max_steps=1 ends the run")


@pytest.mark.parametrize("target", [0, 1, 5, 11, 12])
def test_of_equal_scores_exactly_as_many_stay_as_the_budget_says_and_the_first_ones(target: int) -> None:
    """PEFT prunes all entries at or below a threshold: of equal ones, all. And it fails with a budget of 0."""
    plan, scores = schedule(target=target), Importance(12, returns=True, device=CPU)
    for done in range(1, 9):
        scores.observe(torch.ones(12), plan)
        if plan.chooses(done):
            assert int(scores.mask.sum()) == plan.budget(done)
    assert scores.mask.tolist() == [True] * target + [False] * (12 - target)


def test_importance_is_the_papers_and_a_step_that_is_not_finite_changes_nothing() -> None:
    torch.manual_seed(3)
    plan, scores, products = schedule(), Importance(12, returns=True, device=CPU), torch.randn(8, 12)
    for step in products:
        scores.observe(step, plan)
    smoothed = spread = torch.zeros(12, dtype=torch.float64)
    for number, step in enumerate(products.double().abs()):
        smoothed = step if number == 0 else 0.85 * smoothed + 0.15 * step
        spread = 0.85 * spread + 0.15 * (step - smoothed).abs()
    assert torch.allclose(scores.importance, smoothed, rtol=1e-12)
    assert torch.allclose(scores.uncertainty, spread, rtol=1e-12)
    assert set(scores.mask.nonzero().flatten().tolist()) == set((smoothed * spread).argsort()[-5:].tolist())
    other = Importance(12, returns=True, device=CPU)
    for number, step in enumerate(products):
        if number in (0, 5):
            other.observe(torch.full((12,), math.nan if number else math.inf), plan)
        other.observe(step, schedule(final=99))
    assert other.importance.isfinite().all()
    assert other.uncertainty.isfinite().all()


def test_tiny_gradients_still_rank_the_entries() -> None:
    """In float32, I U of gradients of 1e-25 would be 0 for each entry."""
    scores = Importance(12, returns=True, device=CPU)
    for number in range(8):
        scores.observe(torch.arange(12.0) * 1e-25 * (1 + number % 2), schedule())
    assert scores.mask.tolist() == [False] * 7 + [True] * 5


def test_the_choice_is_fixed_from_the_final_step_on() -> None:
    torch.manual_seed(0)
    scores, plan = Importance(12, returns=True, device=CPU), schedule()
    for _ in range(8):
        scores.observe(torch.randn(12), plan)
    fixed, held = scores.mask.clone(), scores.state()
    for _ in range(20):
        assert not scores.observe(torch.randn(12), plan)
    assert torch.equal(scores.mask, fixed)
    assert all(torch.equal(tensor, held[slot]) for slot, tensor in scores.state().items())


def test_an_interrupted_choice_continues_where_it_stopped_and_foreign_state_is_refused() -> None:
    torch.manual_seed(1)
    products, plan = torch.randn(8, 12), schedule()
    whole, first, second = (Importance(12, returns=False, device=CPU) for _ in range(3))
    for step in products:
        whole.observe(step, plan)
    for step in products[:5]:
        first.observe(step, plan)
    second.load(first.state(), first.done)
    for step in products[5:]:
        second.observe(step, plan)
    assert all(torch.equal(tensor, whole.state()[slot]) for slot, tensor in second.state().items())
    with pytest.raises(ConfigError, match=r"importance is missing[\s\S]*mask is torch.float64 of shape \(3,\)"):
        second.load({"mask": torch.ones(3, dtype=torch.float64), "uncertainty": torch.zeros(12).double()}, 5)


def adapted(**fields: Any) -> tuple[Any, Any, Any]:
    """A tiny model, its adapter with random factors, and an optimizer that no budget follows yet."""
    single_process()
    model = build_gpt(num_layers=2)
    adapter = inject(model, TiedLoraConfig.from_mapping({"rank": 3, "rank_budget": BUDGET, **fields}))
    randomise(adapter)
    return model, adapter, torch.optim.Adam(adapter.parameters(), lr=1e-2)


def train(model: Any, optimizer: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_loop_without_the_one_call_is_refused_at_its_first_step() -> None:
    model, adapter, optimizer = adapted()
    with pytest.raises(
        RuntimeError, match=r"no optimizer is followed, so nothing would be pruned; call adapter\.follow"
    ):
        train(model, optimizer, 1)
    with torch.no_grad():
        loss_of(model)  # nothing is trained
    model.eval()
    loss_of(model)
    model.train()
    adapter.follow_optimizer(optimizer, max_steps=6)
    train(model, optimizer, 6)
    assert adapter.pruning.done == 6
    assert sum(adapter.ranks().values()) == 12


def test_another_optimizer_is_refused_when_it_is_passed_and_when_it_steps() -> None:
    model, adapter, optimizer = adapted()
    without_u = [parameter for name, parameter in adapter.named_parameters() if not name.endswith(".u")]
    with pytest.raises(ConfigError, match="the optimizer does not hold 8 of this rank's 8 u"):
        adapter.follow_optimizer(torch.optim.SGD(without_u), max_steps=6)
    with pytest.raises(ConfigError, match=r"the optimizer is a builtins\.object; pass one of torch"):
        adapter.follow_optimizer(object(), max_steps=6)
    adapter.follow_optimizer(optimizer, max_steps=6)
    train(model, optimizer, 2)
    second = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    with pytest.raises(RuntimeError, match="u has changed, but the followed optimizer has made no step since"):
        train(model, second, 2)
    adapter.follow_optimizer(second, max_steps=99)
    train(model, second, 4)
    assert (adapter.pruning.done, adapter.pruning.schedule.final) == (6, 4)
    optimizer.step()
    assert adapter.pruning.done == 6, "the first optimizer is still followed"


def test_the_mask_acts_in_forward_and_pruned_entries_may_return_until_the_choice_is_fixed() -> None:
    model, adapter, optimizer = adapted()
    adapter.follow_optimizer(optimizer, max_steps=6)
    train(model, optimizer, 3)
    masks, chunk = adapter.pruning.masks(), adapter.chunks[0]
    pruned = [name for name, mask in masks.items() if not mask.all()]
    u = {name: parameter for name, parameter in adapter.named_parameters() if name.endswith(".u")}
    assert pruned
    assert all((u[name] != 0).all() for name in u), "the parameter itself keeps its value"
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    assert all((u[name].grad != 0).all() for name in pruned)
    with torch.no_grad():
        for name in pruned:
            u[name].mul_(masks[name])
        adapter.pruning.forget_versions()
        assert torch.equal(loss_of(model), loss)
    train(model, optimizer, 3)
    assert {factors.pruned_return for factors in chunk.factors.modules() if hasattr(factors, "u_mask")} == {False}
    optimizer.zero_grad()
    loss_of(model).backward()
    for name, mask in adapter.pruning.masks().items():
        assert torch.equal(u[name].grad != 0, mask)


def test_where_a_or_b_belongs_to_one_layer_pruned_entries_stay_pruned() -> None:
    model, adapter, optimizer = adapted(preset="adalora")
    adapter.follow_optimizer(optimizer, max_steps=6)
    before: dict[str, torch.Tensor] = {}
    for _ in range(6):
        train(model, optimizer, 1)
        now = adapter.pruning.masks()
        assert not any((now[name] & ~mask).any() for name, mask in before.items())
        before = now
    assert sum(adapter.ranks().values()) == 12


def test_until_something_is_pruned_losses_are_those_without_a_budget() -> None:
    """No regulariser is added to the loss."""
    model, adapter, optimizer = adapted(rank_budget={**BUDGET, "start_step": 3})
    adapter.follow_optimizer(optimizer, max_steps=6)
    plain_model, _, plain_optimizer = adapted(rank_budget=None)
    with_budget, without = train(model, optimizer, 6), train(plain_model, plain_optimizer, 6)
    assert with_budget[:4] == without[:4]
    assert with_budget[4:] != without[4:]


def test_the_score_is_of_the_clipped_gradient_without_the_loss_scale_and_skipped_steps_do_not_count() -> None:
    model, adapter, optimizer = adapted()
    adapter.follow_optimizer(optimizer, max_steps=6)
    names = [name for name, _ in adapter.named_parameters() if name.endswith(".u")]
    seen: dict[str, torch.Tensor] = {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(poison: bool = False) -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if poison:
            next(iter(adapter.parameters())).grad.view(-1)[0] = math.inf
        scaler.unscale_(optimizer)
        adapter.clip_gradients(0.01)
        u = dict(adapter.named_parameters())
        seen.update({name: (u[name] * u[name].grad).detach().abs() for name in names})
        scaler.step(optimizer)
        scaler.update()

    step()
    assert torch.equal(
        adapter.pruning.state()[1]["importance"], torch.cat([seen[name] for name in adapter.pruning.names])
    )
    held = adapter.pruning.state()
    step(poison=True)
    now = adapter.pruning.state()
    assert now[0] == held[0]
    assert all(torch.equal(now[1][slot], tensor) for slot, tensor in held[1].items())


def test_gradients_that_a_closure_computes_are_seen() -> None:
    """Lightning computes and clips gradients in the closure that it passes to `step`."""
    model, adapter, optimizer = adapted()
    adapter.follow_optimizer(optimizer, max_steps=6)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert optimizer.step(closure=closure) > 0
    assert adapter.pruning.done == 2
    assert (adapter.pruning.state()[1]["importance"] > 0).all()


def test_the_products_of_u_are_those_of_a_and_b() -> None:
    """u_li dL/du_li is layer l's share of the sums over row i of A, and over column i of B."""
    model, adapter, _ = adapted(rank_budget=None, tied=[], trained=["B", "u", "A"], init_u=0, init_B="xavier")
    loss_of(model).backward()
    found = dict(adapter.named_parameters())
    for name in (name for name in found if name.endswith(".u")):
        u, A, B = (found[name[:-1] + factor] for factor in "uAB")
        torch.testing.assert_close(u * u.grad, (A * A.grad).sum(1), rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(u * u.grad, (B * B.grad).sum(0), rtol=1e-9, atol=1e-15)


def test_a_state_continues_in_another_adapter_and_keeps_its_schedule() -> None:
    free = {"target_rank": 1.5, "every": 1}
    model, adapter, optimizer = adapted(rank_budget=free)
    adapter.follow_optimizer(optimizer, max_steps=6)
    train(model, optimizer, 3)
    other_model, other, other_optimizer = adapted(rank_budget=free)
    other.load_full_state(adapter.full_state())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.follow_optimizer(other_optimizer, max_steps=60)
    other.pruning.load(*adapter.pruning.state())
    assert train(other_model, other_optimizer, 3) == train(model, optimizer, 3)
    assert other.pruning.schedule.final == 4
    assert other.ranks() == adapter.ranks()
    assert sum(adapter.ranks().values()) == 12


def test_merging_merges_the_masked_update() -> None:
    model, adapter, optimizer = adapted()
    adapter.follow_optimizer(optimizer, max_steps=6)
    train(model, optimizer, 5)
    model.eval()
    with torch.no_grad():
        separate = loss_of(model)
        adapter.merge()
        torch.testing.assert_close(loss_of(model), separate, rtol=1e-12, atol=0)
        adapter.unmerge()
        for chunk in adapter.chunks:
            for factors in chunk.factors.modules():
                if getattr(factors, "u_mask", None) is not None:
                    factors.u_mask.fill_(True)
        adapter.merge()
        assert not torch.allclose(loss_of(model), separate, rtol=1e-6, atol=0)


def test_without_a_budget_the_call_does_nothing_and_every_rank_is_whole() -> None:
    _, adapter, optimizer = adapted(rank_budget=None)
    adapter.follow_optimizer(optimizer, max_steps=1)
    assert adapter.pruning is None
    assert set(adapter.ranks().values()) == {3}
