# SPDX-License-Identifier: Apache-2.0
"""Pure maths, one process: each form's update equals its formula, and trains as the package does where both know it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forms.adapted_linear import adapted_linear
from forms.factors import Factors
from forms.form import Form, Linear, fitted, trained_parameters
from forms.gradient_start import GradientDirections
from forms.llama import Batch, FrozenLlama
from forms.plan import FORMS, read_plan
from forms.pruning import Pruning
from forms.sizes import Sizes
from forms.training import Recipe, learning_rate, train
from torch.nn import functional

from nemo_tied_lora import ConfigError, TiedLoraConfig, inject
from nemo_tied_lora.config import TARGETS
from tests.harness.hugging_face_models import save_model
from tests.harness.tiny_gpt import build_gpt, full_tensor
from tests.harness.twin_folders import TWIN, write_twin

LAYERS = 4
PLAN = read_plan(FORMS)
LINEARS = {
    "linear_qkv": Linear(6, 10),
    "linear_proj": Linear(6, 6),
    "linear_fc1": Linear(6, 14),
    "linear_fc2": Linear(7, 6),
}
PAIRS = [([3, 1, 4, 1, 5], [9, 2, 6]), ([5, 3, 5], [8, 9]), ([7], [9, 3, 2, 3])]
PRESETS: dict[str, dict[str, Any]] = {
    "lora": {"group": 1},
    "tl5": {},
    "tl6": {"core": "diagonal", "v": "free", "start_B": "xavier"},
    "vera": {"core": "diagonal", "v": "free", "start_B": "xavier", "train_A": False, "train_B": False},
}
ADALORA: dict[str, Any] = {
    "group": 1,
    "core": "diagonal",
    "start_core": 0.0,
    "start_A": "normal",
    "start_B": "normal",
    "keep": 2,
}
FORM_NAMES = [one.name for one in PLAN.candidates]


def random_factors(name: str) -> Factors:
    """A form of the plan on small linears, with random numbers in every factor."""
    values = {**PLAN.candidate(name).form, "rank": 3, "scale": 0.7}
    values["group"] = {None: None, 1: 1}.get(values.get("group"), 2)
    values["v_size"] = min(values.get("v_size", 1), 4)
    form = Form.of(values)
    factors = Factors(form, LINEARS, LAYERS, 1, torch.float64, lambda target, group: directions(target, form.rank))
    for key, tensor in factors.tensors.items():
        tensor.data.copy_(full_tensor(f"{name} {key}", tuple(tensor.shape)))
    return factors


def directions(target: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    linear = LINEARS[target]
    return torch.eye(linear.in_features)[:rank], torch.eye(linear.out_features)[:, :rank]


def formula(factors: Factors, layer: int, target: str) -> torch.Tensor:
    """s diag(v_l) B_g R_l A_g, number by number as the form's docstring says it."""
    form, held = factors.form, factors.tensors
    group = 0 if form.group is None else layer // form.group
    owner = "linear_qkv" if form.shared_A and target in ("linear_proj", "linear_fc1") else target
    A, B = held[owner, "A"][group], held[target, "B"][group]
    core = {"none": lambda: torch.eye(form.rank).double(), "diagonal": lambda: torch.diag(held[target, "u"][layer])}
    R = held[target, "R"][layer] if form.core == "full" else core[form.core]()
    out = LINEARS[target].out_features
    v = torch.ones(out).double()
    if form.v == "free":
        v = held[target, "v"][layer]
    elif form.v == "blocks":
        v = torch.stack([held[target, "v"][layer, k // form.v_size] for k in range(out)])
    elif form.v == "directions":
        v = held[target, "V"] @ held[target, "v"][layer]
    return form.scale * torch.diag(v) @ B @ R @ A


@pytest.mark.parametrize("name", FORM_NAMES)
def test_each_forms_update_is_its_formula_and_so_are_its_gradients(name: str) -> None:
    factors = random_factors(name)
    factors.prepare()
    mine, expected = [], []
    for layer in range(LAYERS):
        for target, linear in LINEARS.items():
            x = full_tensor(f"x {layer} {target}", (5, linear.in_features))
            weight = full_tensor(f"W {layer} {target}", (linear.out_features, linear.in_features))
            mine.append(factors.apply(layer, target, x, weight))
            expected.append(x @ (weight + formula(factors, layer, target)).t())
            torch.testing.assert_close(factors.delta(layer, target), formula(factors, layer, target))
    torch.testing.assert_close(mine, expected)
    trained = list(factors.trained.values())
    sums = [sum((y**2).sum() for y in ys) for ys in (mine, expected)]
    found, wanted = (torch.autograd.grad(total, trained) for total in sums)
    torch.testing.assert_close(found, wanted)


def test_the_linears_gradients_are_those_of_autograd() -> None:
    x, down, up = (
        full_tensor(name, shape).requires_grad_() for name, shape in (("x", (5, 6)), ("d", (2, 6)), ("u", (2, 9)))
    )
    weight = full_tensor("W", (9, 6))
    plain = functional.linear(x, weight) + (x @ down.t()) @ up
    mine = adapted_linear(x, weight, down, up)
    torch.testing.assert_close(mine, plain)
    grad = full_tensor("grad", (5, 9))
    torch.testing.assert_close(
        torch.autograd.grad(mine, (x, down, up), grad), torch.autograd.grad(plain, (x, down, up), grad)
    )


@pytest.mark.parametrize("name", FORM_NAMES)
def test_at_the_start_the_base_is_unchanged_and_something_can_move(name: str) -> None:
    form = Form.of({**PLAN.candidate(name).form, "rank": 3})
    factors = Factors(form, LINEARS, 6, 1, torch.float64, lambda target, group: directions(target, 3))
    factors.prepare()
    for target, linear in LINEARS.items():
        assert not factors.delta(5, target).any()
        y = factors.apply(
            5,
            target,
            full_tensor("x", (4, linear.in_features)),
            torch.zeros(linear.out_features, linear.in_features).double(),
        )
        found = torch.autograd.grad(y.sum(), list(factors.trained.values()), allow_unused=True)
        assert any(grad is not None and grad.any() for grad in found)


@pytest.mark.parametrize("name", FORM_NAMES)
def test_counts_are_those_of_the_tensors(name: str) -> None:
    factors = random_factors(name)
    held = sum(tensor.numel() for tensor in factors.trained.values())
    assert trained_parameters(factors.form, LINEARS, LAYERS) == held


def test_budgets_are_met_by_the_largest_rank_that_fits() -> None:
    linears, layers = PLAN.sizes.linears, PLAN.sizes.layers
    assert trained_parameters(Form(rank=1, group=1), linears, layers) == PLAN.budgets["lora_r1"]
    assert trained_parameters(Form(rank=2, group=1), linears, layers) == PLAN.budgets["lora_r2"]
    assert trained_parameters(Form.of({**PRESETS["tl6"], "rank": 8}), linears, layers) == 224_064  # docs/study.md
    for budget in PLAN.budgets.values():
        for one in PLAN.candidates:
            form = fitted(one.form, linears, layers, budget, largest=one.largest, prunes=one.prunes)
            more = {"rank": form.rank + 2, "keep": (form.keep or 0) + 1} if one.prunes else {"rank": form.rank + 1}
            larger = Form.of({**one.form, **more})
            assert trained_parameters(form, linears, layers) <= budget
            assert form.rank == one.largest or trained_parameters(larger, linears, layers) > budget
    with pytest.raises(ConfigError, match="trains more at rank 1"):
        fitted({"group": 1}, linears, layers, 253_439)


def test_a_form_that_could_not_start_at_the_base_is_refused() -> None:
    for wrong in ({"start_B": "xavier"}, {"core": "diagonal", "v": "free"}, {"train_B": False}):
        with pytest.raises(ConfigError, match=r"start|train_B"):
            Form.of({"rank": 2, **wrong})
    with pytest.raises(ConfigError, match="keep=2: needs an untied form"):
        Form.of({"rank": 2, "core": "diagonal", "keep": 2})
    with pytest.raises(ConfigError, match="not a field"):
        Form.of({"rank": 2, "alpha": 3})


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FrozenLlama]:
    """A tiny megatron-core GPT, and the same weights as this harness reads them."""
    folder = tmp_path_factory.mktemp("twin")
    gpt = write_twin(folder)
    return gpt, FrozenLlama(folder, torch.float64)


@pytest.mark.parametrize("preset", [*PRESETS, "adalora"])
def test_at_equal_seeds_the_losses_are_the_packages(twins: tuple[Any, FrozenLlama], preset: str) -> None:
    _, model = twins
    recipe = Recipe(learning_rate=0.05, multipliers={}, steps=7, warmup_steps=1, clip=1.0)
    form = Form.of({**(ADALORA if preset == "adalora" else PRESETS[preset]), "rank": 3})
    found = harness_losses(model, form, 1234, recipe)
    expected = package_losses(preset, recipe)
    assert found == pytest.approx(expected, rel=1e-7)  # RoPE is float32 in both; sums are in another order
    assert harness_losses(model, form, 1235, recipe) != pytest.approx(expected, rel=1e-5)
    if form.keep is not None:
        whole = Form.of({**form.settings(), "keep": 3})
        unpruned = harness_losses(model, whole, 1234, recipe)
        assert unpruned[:5] == pytest.approx(expected[:5], rel=1e-7)  # pruning is done after step 5 of 7
        assert unpruned[5:] != pytest.approx(expected[5:], rel=1e-7)


def harness_losses(model: FrozenLlama, form: Form, seed: int, recipe: Recipe) -> list[float]:
    factors = Factors(form, model.sizes.linears, LAYERS, seed, torch.float64)
    batches = [Batch.of(PAIRS)] * recipe.steps
    if form.keep is None:
        return train(model, factors, batches, recipe)
    pruning = Pruning(factors, model.sizes.linears, LAYERS, recipe.steps)
    losses = train(model, factors, batches, recipe, pruning.observe)
    kept = {target: int(mask.sum()) for target, mask in factors.masks.items()}
    assert sum(kept.values()) == form.keep * LAYERS * len(TARGETS)
    sizes = {target: linear.in_features + linear.out_features for target, linear in model.sizes.linears.items()}
    assert pruning.kept() == sum(kept[target] * sizes[target] for target in TARGETS)
    return losses


def package_losses(preset: str, recipe: Recipe) -> list[float]:
    """The losses of the package's own adapter on megatron-core, with the same optimizer."""
    model = build_gpt(**TWIN)
    more: dict[str, Any] = {"rank_budget": {"target_rank": 2}} if preset == "adalora" else {}
    adapter = inject(model, TiedLoraConfig.preset(preset, rank=3, **more))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0)
    if more:
        adapter.follow_optimizer(optimizer, max_steps=recipe.steps)
    losses = []
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * learning_rate(recipe, step)
        sums, count = torch.zeros((), dtype=torch.float64), 0
        for prompt, answer in PAIRS:
            tokens = torch.tensor([[*prompt, *answer[:-1]]])
            length = tokens.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
            logits = model(tokens, torch.arange(length)[None], mask)[0, len(prompt) - 1 :]
            sums = sums + functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            count += len(answer)
        loss = sums / count
        optimizer.zero_grad()
        loss.backward()
        adapter.reduce_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    reference = save_model("llama", tmp_path).float()
    model = FrozenLlama(tmp_path, torch.float32)
    batch = Batch.of(PAIRS)
    found = model.answer_logits(batch, model.plain)
    expected = [
        reference(input_ids=torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        for prompt, answer in PAIRS
    ]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert batch.targets.tolist() == [token for _, answer in PAIRS for token in answer]
    assert Sizes.of(tmp_path).head_dim == 12


def test_a_start_from_the_gradient_has_the_directions_of_the_whole_gradient(twins: tuple[Any, FrozenLlama]) -> None:
    _, model = twins
    batch = Batch.of([([3, 1], [4, 1])])  # 3 tokens, so the gradient of one layer has rank 3 at most
    form = Form.of({**PRESETS["tl6"], "rank": 3, "group": 1})
    found = GradientDirections(model, form, [batch], seed=1)
    weights = [layer["linear_fc1"].clone().requires_grad_() for layer in model.layers]

    def apply(layer: int, target: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weights[layer] if target == "linear_fc1" else weight)

    functional.cross_entropy(model.answer_logits(batch, apply), batch.targets).backward()
    for layer, weight in enumerate(weights):
        G = weight.grad
        assert G is not None
        rows, columns = (part.double() for part in found("linear_fc1", layer))
        torch.testing.assert_close(rows @ rows.t(), torch.eye(3).double(), atol=1e-5, rtol=0)
        for rest in (G - G @ rows.t() @ rows, G - columns @ columns.t() @ G):
            assert rest.norm() < 1e-4 * G.norm()  # the sketch is in float32
        wrong = full_tensor("other", (3, G.shape[1]))
        assert (G - G @ wrong.t() @ torch.linalg.pinv(wrong).t()).norm() > 0.1 * G.norm()


def test_the_rate_follows_nemos_schedule() -> None:
    from nemo.core.optim.lr_scheduler import CosineAnnealing

    recipe = Recipe(learning_rate=0.3, multipliers={}, steps=12, warmup_steps=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = CosineAnnealing(optimizer, max_steps=12, warmup_steps=3, min_lr=0.0)
    for step in range(12):
        assert 0.3 * learning_rate(recipe, step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_a_multiplier_of_the_zero_factor_is_a_scale_of_the_update(twins: tuple[Any, FrozenLlama]) -> None:
    """Adam does not see the scale of a gradient, so the sweep has no alpha."""
    _, model = twins
    results = []
    for scale, multipliers in ((4.0, {}), (1.0, {"B": 4.0}), (1.0, {})):
        recipe = Recipe(learning_rate=0.02, multipliers=multipliers, steps=4, warmup_steps=1, clip=0.0)
        form = Form(rank=2, group=1, scale=scale)
        factors = Factors(form, model.sizes.linears, LAYERS, 1, torch.float64)
        results.append(train(model, factors, [Batch.of(PAIRS)] * 4, recipe))
    assert results[0] == pytest.approx(results[1], rel=1e-5)  # but for Adam's eps
    assert results[0] != pytest.approx(results[2], rel=1e-3)
