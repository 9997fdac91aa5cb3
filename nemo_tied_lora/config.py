# SPDX-License-Identifier: Apache-2.0
"""The adapter's configuration: rank, targets, what is trained, what is tied, initial values (arXiv 2311.09578)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_tied_lora.errors import Problems, did_you_mean, is_number, is_whole_number

__all__ = [
    "ALPHA_RULES",
    "DTYPES",
    "EXPERT_TIES",
    "FACTORS",
    "FROZEN_FACTORS",
    "INIT_METHODS",
    "NEMO_TARGETS",
    "PRESETS",
    "TARGETS",
    "RankBudget",
    "TiedLoraConfig",
]


TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
FACTORS = ("v", "B", "u", "A")
INIT_METHODS = ("normal", "xavier", "kaiming", "zero")
EXPERT_TIES = ("per_expert", "tied")
ALPHA_RULES = ("rank", "sqrt")
FROZEN_FACTORS = ("tensor", "seed")
DTYPES = (None, "float32")


NEMO_TARGETS: dict[str, tuple[str, ...]] = {
    "attention_qkv": ("linear_qkv",),
    "attention_dense": ("linear_proj",),
    "mlp_fc1": ("linear_fc1",),
    "mlp_fc2": ("linear_fc2",),
    "attention": ("linear_qkv", "linear_proj"),
    "mlp": ("linear_fc1", "linear_fc2"),
    "all": TARGETS,
}
"""NeMo's names for the same linears (its `model.peft.lora_tuning.target_modules`)."""


# Which of v, B, u, A is trained and which of A, B is tied (the paper's table of configurations). adalora also has a start
# of its own (arXiv 2303.10512): u, its Lambda, is 0.
PRESETS: dict[str, dict[str, Any]] = {
    "lora": {"trained": ("B", "A"), "tied": ()},
    "vera": {"trained": ("v", "u"), "tied": ("A", "B")},
    "tl5": {"trained": ("B", "A"), "tied": ("A", "B")},
    "tl6": {"trained": ("v", "B", "u", "A"), "tied": ("A", "B")},
    "adalora": {"trained": ("B", "u", "A"), "tied": (), "init_A": "normal", "init_B": "normal", "init_u": 0.0},
}


# Keys of other adapters, and what to write instead.
_FOREIGN_KEYS = {
    "adapter_dim": "write rank",
    "r": "write rank",
    "dim": "write rank",
    "lora_alpha": "write alpha",
    "use_rslora": "write alpha_rule: sqrt, with alpha",
    "adapter_dropout": "write dropout",
    "lora_dropout": "write dropout",
    "target_modules": "write targets",
    "layer_selection": "write layers, which counts from 0 (layer_selection counts from 1)",
    "layers_to_transform": "write layers",
    "lora_dtype": "write dtype",
    "column_init_method": "write init_A",
    "row_init_method": "write init_B",
    "dropout_position": "remove it: dropout always acts on the linear's input",
    "position_embedding_strategy": "remove it: u and v tell the layers apart",
    "weight_tying": "NeMo's option is dead (its config raises TypeError since 2.0); write tied: [A, B], the default",
}


@dataclass(frozen=True, kw_only=True)
class RankBudget:
    """AdaLoRA's budget (arXiv 2303.10512) on u: training prunes entries of u by their importance; see docs/rank_budget.md.

    `TiedLoraConfig` checks the values.
    """

    target_rank: float
    """The entries of u that a linear keeps, as a mean over all linears, in 1 .. rank. It need not be a whole number."""
    start_step: int | None = None
    """The number of optimizer steps before the first one that may prune, at least 1. None: a sixth of the run."""
    final_step: int | None = None
    """From this optimizer step on, the mean is target_rank and the choice is fixed. None: two thirds of the run."""
    every: int = 10
    """Chooses anew after so many optimizer steps."""

    def problems(self, rank: object, trained: object) -> Iterator[str]:
        """Yields one line per value that is out of bounds."""
        found, target = Problems(), self.target_rank
        if not is_number(target) or target < 1:
            found.append(
                f"rank_budget.target_rank={target!r}: must be a number of at least 1, the mean rank at the end"
            )
        elif is_whole_number(rank) and target > rank:
            found.append(f"rank_budget.target_rank={target!r}: more than rank={rank}, with which training starts")
        if self.start_step is not None:
            note = "; in the first step u or its gradient is 0, so no entry is more important than another"
            found.whole_number("rank_budget.start_step", self.start_step, note=note)
        if self.final_step is not None:
            first = self.start_step if is_whole_number(self.start_step) else 1
            note = f"; pruning begins after step {first}"
            found.whole_number("rank_budget.final_step", self.final_step, first + 1, note)
        found.whole_number("rank_budget.every", self.every)
        if isinstance(trained, tuple) and "u" not in trained:
            shown = ", ".join(map(str, trained))
            found.append(
                f"rank_budget: prunes entries of u, and trained=[{shown}] has no u; add it, or remove rank_budget"
            )
        yield from found

    @classmethod
    def from_value(cls, value: object) -> RankBudget | None:
        """Reads the key's value: a budget, a mapping of its fields, or None. None in a mapping means the default.

        Raises:
            ConfigError: not a mapping, an unknown key, or no target_rank.
        """
        if value is None or isinstance(value, RankBudget):
            return value
        problems, known = Problems(), [field.name for field in dataclasses.fields(cls)]
        given = problems.known_keys("rank_budget", problems.section("rank_budget", value), known)
        given = {key: each for key, each in given.items() if each is not None}
        if given and "target_rank" not in given:
            problems.append("rank_budget.target_rank: missing; name the mean rank that is left at the end")
        problems.raise_if_any()
        return cls(**given) if given else None


@dataclass(frozen=True, kw_only=True)
class TiedLoraConfig:
    """``y = W x + scale * diag(v) B diag(u) A x`` on every selected linear of every selected layer.

    ``scale`` is alpha / rank, or alpha / sqrt(rank) by ``alpha_rule``.

    A tied A or B exists once per target and serves all layers; an untied one exists once per layer. u and v always belong
    to one layer; if they are not trained, they are 1 and are not stored.

    Raises:
        ConfigError: lists every field that is out of bounds, before anything is built.
    """

    rank: int = 8
    """Width of A's output and B's input, in 1 .. min(in, out) of the targets."""
    alpha: float | None = None
    """Scale: the update is multiplied by alpha / rank. None: alpha = rank, as in the paper."""
    alpha_rule: str = "rank"
    """rank: the update is multiplied by alpha / rank. sqrt: by alpha / sqrt(rank), as rsLoRA (arXiv 2312.03732); alpha
    must be given then."""
    dropout: float = 0.0
    """Probability of dropping an element of the linear's input, on the adapter's path only, in [0, 1)."""
    targets: Sequence[str] = TARGETS
    """Megatron's names: linear_qkv, linear_proj, linear_fc1, linear_fc2. NeMo's attention_qkv, attention_dense,
    mlp_fc1, mlp_fc2, attention, mlp and all are accepted and translated."""
    layers: Sequence[int] | None = None
    """Global layer numbers, counted from 0 (of a HybridModel, see `adapter.layer_numbers`). None: all layers."""
    trained: Sequence[str] = FACTORS
    """Any non-empty subset of v, B, u, A."""
    tied: Sequence[str] = ("A", "B")
    """Any subset of A, B: the tensors that all layers share."""
    experts: str = "per_expert"
    """How the experts of a mixture share tied tensors. per_expert: expert e shares them over all layers. tied: all
    experts of all layers share them. No effect on a dense model."""
    init_A: str | None = None
    """normal, xavier, kaiming or zero. None: xavier, or zero if A is the one factor that starts at 0."""
    init_B: str | None = None
    """normal, xavier, kaiming or zero. None: xavier, or zero if B is the one factor that starts at 0."""
    init_u: float | None = None
    """The value of every element of a trained u. None: 1, or 0 if u is the one factor that starts at 0."""
    init_v: float | None = None
    """The value of every element of a trained v. None: 0."""
    init_std: float = 0.02
    """Standard deviation of the init method normal."""
    seed: int = 1234
    """Seeds the initial A and B as whole tensors, so they do not depend on the parallel layout."""
    frozen_factors: str = "tensor"
    """How a file stores an A or B that is not trained. tensor: the tensor. seed: the seed, and a checksum by which
    loading refuses a generator that draws other numbers."""
    dtype: str | None = None
    """float32: the factors, their gradients and the update's arithmetic are float32, also on a bfloat16 base. None: they
    have the base's dtype."""
    rank_budget: RankBudget | Mapping[str, Any] | None = None
    """Prunes entries of u during training: a `RankBudget`, or a mapping of its fields. None: every entry stays."""

    def __post_init__(self) -> None:
        unread = Problems()
        object.__setattr__(self, "rank_budget", unread.attempt(RankBudget.from_value, self.rank_budget))
        for name in ("targets", "trained", "tied", "layers"):
            value = getattr(self, name)
            if isinstance(value, (str, int)) and not isinstance(value, bool):
                value = (value,)
            if value is not None and isinstance(value, Iterable):
                object.__setattr__(self, name, tuple(value))
        Problems([*self._problems(), *unread]).raise_if_any()
        expanded = {name for target in self.targets for name in NEMO_TARGETS.get(target, (target,))}
        object.__setattr__(self, "targets", tuple(t for t in TARGETS if t in expanded))
        object.__setattr__(self, "trained", tuple(f for f in FACTORS if f in self.trained))
        object.__setattr__(self, "tied", tuple(f for f in ("A", "B") if f in self.tied))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        Problems(self._start_problems()).raise_if_any()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TiedLoraConfig:
        """Returns the named configuration (lora, vera, tl5, tl6, adalora), with any field overridden.

        Raises:
            ConfigError: the preset or a field is unknown, or a value is out of bounds.
        """
        return cls.from_mapping({"preset": name, **overrides})

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TiedLoraConfig:
        """Builds the configuration from plain keys (a YAML's ``model.peft.tied_lora``): the fields and ``preset``.

        The value None means the default.

        Raises:
            ConfigError: lists all unknown keys (with what to write instead), an unknown preset, values out of bounds.
        """
        given = {key: value for key, value in mapping.items() if value is not None}
        preset = given.pop("preset", "tl6")
        problems = Problems()
        problems.one_of("preset", preset, PRESETS)
        known = {field.name for field in dataclasses.fields(cls)}
        # A key of another adapter that is switched off has no effect.
        for key in [k for k in given if k not in known]:
            value = given.pop(key)
            if not (key == "weight_tying" and value is False):
                problems.append(_unknown_key(key, value, known))
        chosen = dict(PRESETS[preset]) if isinstance(preset, str) and preset in PRESETS else {}
        if preset == "adalora":
            given["rank_budget"] = _adaloras_budget(given.get("rank_budget"), given.get("rank", cls.rank))
        return problems.build(cls, **{**chosen, **given})

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for YAML or JSON; ``from_mapping`` reads them."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @property
    def budget(self) -> RankBudget | None:
        """`rank_budget`, which is a `RankBudget` or None once the configuration exists."""
        assert self.rank_budget is None or isinstance(self.rank_budget, RankBudget)
        return self.rank_budget

    @property
    def scale(self) -> float:
        """What the update is multiplied by: alpha / rank, or alpha / sqrt(rank) by ``alpha_rule``. 1 without alpha."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.alpha_rule == "sqrt" else self.rank)

    @property
    def alpha_by_rank(self) -> float:
        """The alpha that gives the same scale under alpha_rule rank, which is the rule of plain LoRA."""
        if self.alpha is None:
            return self.rank
        return self.alpha * math.sqrt(self.rank) if self.alpha_rule == "sqrt" else self.alpha

    @property
    def stored(self) -> tuple[str, ...]:
        """The factors that exist as tensors: all except a frozen u or v, which is 1."""
        return tuple(factor for factor in FACTORS if factor in self.trained or factor in ("A", "B"))

    @property
    def seeded(self) -> tuple[str, ...]:
        """The frozen factors that a file holds as their seed."""
        return tuple(f for f in ("A", "B") if f not in self.trained and self.frozen_factors == "seed")

    @property
    def zero_factor(self) -> str:
        """The one trained factor that starts at 0, so that the update does: v, else B, else u, else A."""
        return next(factor for factor in FACTORS if factor in self.trained)

    def init_of(self, factor: str) -> str | float:
        """Returns how the factor starts: an init method for A and B, a fill value for u and v.

        The user's value wins. The default is the paper's (u = 1, v = 0, random A and B), with the zero factor at 0.
        """
        own = getattr(self, f"init_{factor}")
        if own is not None:
            return own
        if factor in ("A", "B"):
            return "zero" if factor == self.zero_factor else "xavier"
        return 0.0 if factor == self.zero_factor else 1.0

    def _problems(self) -> Problems:
        """Checks each field by itself."""
        problems = Problems()
        problems.whole_number("rank", self.rank)
        if self.alpha is not None and (not is_number(self.alpha) or self.alpha == 0):
            problems.append(
                f"alpha={self.alpha!r}: must be a finite number other than 0 (0 would switch the adapter off)"
            )
        problems.one_of("alpha_rule", self.alpha_rule, ALPHA_RULES)
        if self.alpha_rule == "sqrt" and self.alpha is None:
            problems.append(
                "alpha_rule=sqrt: needs alpha, because the update is multiplied by alpha / sqrt(rank); set alpha, the same "
                "for every rank"
            )
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout!r}: must be in [0, 1)")
        if not is_number(self.init_std) or self.init_std <= 0:
            problems.append(f"init_std={self.init_std!r}: must be a finite number greater than 0")
        problems.whole_number("seed", self.seed, 0)
        problems.one_of("frozen_factors", self.frozen_factors, FROZEN_FACTORS)
        problems.one_of("dtype", self.dtype, DTYPES)
        problems += _unknown_values("targets", self.targets, (*TARGETS, *NEMO_TARGETS), empty_ok=False)
        problems += _unknown_values("trained", self.trained, FACTORS, empty_ok=False)
        problems += _unknown_values("tied", self.tied, ("A", "B"), empty_ok=True)
        problems.one_of("experts", self.experts, EXPERT_TIES)
        problems += self._layer_problems()
        for name in ("init_A", "init_B"):
            if getattr(self, name) is not None:
                problems.one_of(name, getattr(self, name), INIT_METHODS)
        problems += self._fill_problems()
        if isinstance(self.rank_budget, RankBudget):
            problems += self.rank_budget.problems(self.rank, self.trained)
        return problems

    def _layer_problems(self) -> Iterable[str]:
        if self.layers is None:
            return
        if not isinstance(self.layers, tuple) or not self.layers:
            yield f"layers={self.layers!r}: must be a non-empty list of layer numbers from 0, or null for all layers"
            return
        bad = [layer for layer in self.layers if not is_whole_number(layer, 0)]
        if bad:
            yield f"layers: {bad} are not layer numbers; layers are counted from 0"

    def _fill_problems(self) -> Iterable[str]:
        for factor in ("u", "v"):
            fill = getattr(self, f"init_{factor}")
            if fill is not None and not is_number(fill):
                yield f"init_{factor}={fill!r}: must be a finite number"
            elif fill is not None and factor not in self.trained and fill != 1:
                yield f"init_{factor}={fill!r}: a frozen {factor} is 1; remove it or add {factor} to trained"

    def _start_problems(self) -> Iterable[str]:
        """Checks that the update starts at exactly 0 and can leave 0."""
        starts_at_zero = [f for f in FACTORS if self.init_of(f) in ("zero", 0.0)]
        stuck = [f for f in starts_at_zero if f not in self.trained]
        if stuck:
            yield f"init_{stuck[0]}: {stuck[0]} is frozen at 0, so the update could never leave 0; choose another init"
        elif len(starts_at_zero) > 1:
            names = " and ".join(starts_at_zero)
            yield f"init: {names} start at 0 together, so none gets a gradient and nothing can leave 0; keep one of them at 0"
        elif not starts_at_zero:
            zero = self.zero_factor
            yield f"init_{zero}={self.init_of(zero)!r}: the update would not start at 0; leave it unset, or set it to 0"


def _adaloras_budget(value: object, rank: object) -> object:
    """Adds the paper's target_rank to a value of `rank_budget` that has none: training starts with 1.5 times as many."""
    if not isinstance(value, (Mapping, type(None))) or not is_whole_number(rank):
        return value
    given = {key: each for key, each in (value or {}).items() if each is not None}
    return {"target_rank": max(1, round(rank / 1.5)), **given}


def _unknown_values(name: str, values: object, choices: tuple[str, ...], empty_ok: bool) -> Iterable[str]:
    if not isinstance(values, tuple):
        yield f"{name}={values!r}: must be a list drawn from {', '.join(choices)}"
        return
    if not values and not empty_ok:
        reason = "nothing would be trained" if name == "trained" else "nothing would be adapted"
        yield f"{name}=[]: {reason}; name at least one of {', '.join(choices)}"
    for value in values:
        if value not in choices:
            yield f"{name}: {value!r} is unknown{did_you_mean(value, choices)}; choose from {', '.join(choices)}"


def _unknown_key(key: str, value: object, known: Iterable[str]) -> str:
    if key in _FOREIGN_KEYS:
        return f"{key}={value!r}: not a key of tied_lora; {_FOREIGN_KEYS[key]}"
    hint = did_you_mean(key, (*known, "preset"))
    return f"{key}={value!r}: not a key of tied_lora{hint}; the keys are preset, {', '.join(sorted(known))}"
