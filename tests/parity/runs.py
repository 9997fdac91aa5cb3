# SPDX-License-Identifier: Apache-2.0
"""The runs, and which layout has which of them. Together, a layout's runs have every feature of the support table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from nemo_tied_lora.planning.megatron_version import counts_repeated_gradients, megatron_version, splits_query_groups
from tests.parity.layouts import LAYOUTS, Layout

__all__ = [
    "EXPERT_LAYOUTS",
    "FAULTS",
    "FLOAT32_LAYOUTS",
    "HYBRID",
    "INT8_LAYOUTS",
    "OVERLAP_AND_FULL",
    "RUNS",
    "TOLERANCES",
    "Run",
    "oracle_of",
    "runs_of",
]

TL6 = {"preset": "tl6", "rank": 3, "alpha": 5.0}
# The first choice comes after the second step, so the third and the fourth train with a mask.
BUDGET = {**TL6, "rank_budget": {"target_rank": 1.5, "start_step": 1, "final_step": 3, "every": 1}}
ONE_STAGE = {"preset": "tl6", "rank": 3, "layers": [3], "targets": ["linear_qkv", "linear_fc2"]}
LLAMA = {"llama": True, "hidden": 32, "heads": 8}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    config: the adapter's fields.
    model: options of `build_gpt`.
    dtype: of all parameters, "float64", "float32" or "bfloat16". The gradients of bfloat16 are float32.
    loop: "plain", or with megatron-core's DDP "ddp", "ddp overlap", "distributed" or "distributed overlap". With
        "aligned" after overlap, stages start their sums together.
    recompute: None, "selective" or "full".
    stages: options of `build_gpt` that distribute the layers over stages; for a HybridModel its pattern with their marks.
    microbatches: number in the global batch. Data-parallel ranks share them.
    base: options of `quantize_base`; None: a base that is not quantised.
    plain: whether the quantised weights are replaced by plain ones with the dequantised values.
    fault: a planted error: "no sum", "summed twice", "stepped twice", "another code", "own products" (each stage ranks its
        own entries of u alone), or a flag of all parameters, like "shared=False".
    features: columns of the support table that the run tests, besides those that follow from the other fields.
    """

    config: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"
    loop: str = "plain"
    recompute: str | None = None
    stages: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    microbatches: int = 4
    base: dict[str, Any] | None = None
    plain: bool = False
    fault: str | None = None
    features: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the support table that the run tests."""
        if self.base is not None:
            return self.features
        model = () if {"llama", "kv_channels"} & self.model.keys() else ("gpt2",)
        preset = (self.config["preset"],) if "preset" in self.config and "layers" not in self.config else ()
        return (self.loop, f"{self.recompute or 'no'} recompute", self.dtype, *model, *preset, *self.features)


RUNS: dict[str, Run] = {
    "plain": Run(config=TL6),
    "llama": Run(
        config={"preset": "lora", "rank": 3}, model=LLAMA, loop="ddp", recompute="selective", features=("llama",)
    ),
    "one query group": Run(
        config={"preset": "vera", "rank": 3},
        model={**LLAMA, "groups": 1},
        recompute="full",
        features=("llama", "one query group"),
    ),
    "head size, targets in some layers": Run(
        config={"preset": "tl5", "rank": 3},
        model={"kv_channels": 8, "without": {1: "mlp", 2: "attention"}},
        loop="ddp overlap",
        features=("head size", "some targets"),
    ),
    "one stage's layers": Run(config=ONE_STAGE, loop="ddp overlap", features=("some layers",)),
    "one stage's layers, distributed": Run(
        config=ONE_STAGE, dtype="float32", loop="distributed", features=("some layers",)
    ),
    "distributed": Run(config=TL6, model=LLAMA, dtype="float32", loop="distributed overlap", features=("llama",)),
    "bfloat16": Run(config=TL6, dtype="bfloat16", loop="distributed", recompute="full"),
}
# For releases whose DDP waits for all parts of a tied gradient, one per layer. It counts them in the first step.
OVERLAP_AND_FULL = Run(config=TL6, loop="ddp overlap", recompute="full", features=("overlap and full",))
# Six layers: the first and the last stage have one, the others two.
SHORT_ENDS = {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1}
UNEVEN: dict[str, Run] = {
    "short ends": Run(config=TL6, model={"num_layers": 6}, loop="ddp", stages=SHORT_ENDS, features=("short ends",)),
    "short ends, distributed": Run(
        config=TL6,
        model={"num_layers": 6},
        dtype="float32",
        loop="distributed",
        stages=SHORT_ENDS,
        features=("short ends",),
    ),
    "stages without layers": Run(
        config=TL6,
        model={"num_layers": 2},
        loop="ddp overlap aligned",
        stages={"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
        features=("no layers",),
    ),
}
UNEVEN |= {
    # The second stage has no parameters of the base, and none that is trained either with the preset lora.
    "empty stage": Run(
        config=TL6,
        model={"num_layers": 2},
        loop="ddp overlap aligned",
        stages={"pipeline_model_parallel_layout": "Et||t|L"},
        features=("empty",),
    ),
    "empty stage, nothing trained": Run(
        config={"preset": "lora", "rank": 3},
        model={"num_layers": 2},
        stages={"pipeline_model_parallel_layout": "Et||t|L"},
        features=("empty",),
    ),
    "empty stage, nothing trained, DDP": Run(
        config={"preset": "lora", "rank": 3},
        model={"num_layers": 2},
        loop="ddp",
        stages={"pipeline_model_parallel_layout": "Et||t|L"},
        features=("empty",),
    ),
}
EMPTY_CHUNKS = {
    "empty chunks": Run(
        config=TL6,
        model={"num_layers": 4},
        stages={"pipeline_model_parallel_layout": "Et||t||t||t|L"},
        features=("empty",),
    ),
}
FLOAT32_ADAPTER = {
    "float32 adapter": Run(
        config={**TL6, "dtype": "float32"}, dtype="bfloat16", loop="distributed", features=("float32 adapter",)
    ),
}
RANK_BUDGET = {
    "rank budget": Run(config=BUDGET, loop="ddp", steps=4, features=("rank budget",)),
}
BUDGET_IN_OUR_LOOP = ("single", "tp2 sp", "pp2", "tp4", "pp4 vp2")
INT8_LAYOUTS, EXPERT_LAYOUTS = ("tp2", "pp2"), ("tp2 sp", "pp2")
FLOAT32_LAYOUTS = ("tp2", "tp2 sp", "pp2", "dp2")
# Every layout has blocks of 32 in each rank's in-features.
QUANTISED_MODEL = {"hidden": 128, "heads": 8, "ffn": 128, "llama": True}
NF4 = {"kind": "nf4", "block_size": 32}
QUANTISED = {
    "nf4": Run(config=TL6, model=QUANTISED_MODEL, loop="ddp", recompute="full", steps=1, base=NF4, features=("nf4",)),
}
INT8 = {
    "int8": Run(config=TL6, model=QUANTISED_MODEL, steps=1, base={"kind": "int8"}, features=("int8",)),
}
# Layer 1 is dense, so of two stages both have experts and only the first has a dense layer.
EXPERTS = {
    "nf4 experts": Run(
        config={**TL6, "experts": "tied"},
        model={
            **QUANTISED_MODEL,
            "hidden": 64,
            "num_moe_experts": 4,
            "moe_layer_freq": [1, 0, 1, 1],
            "moe_ffn_hidden_size": 64,
            "moe_shared_expert_intermediate_size": 64,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
        },
        steps=1,
        base=NF4,
        features=("nf4 experts",),
    ),
}
APART = {"pattern": "*-*-*-"}
HYBRID: dict[str, Run] = {
    # Layer 1's attention is on the first stage, its MLP on the second.
    "attention and MLP apart": Run(config=TL6, model=APART, stages={"pattern": "*-*|-*-"}),
    # The first stage has no MLP, so it only holds the tied tensors of linear_fc1 and linear_fc2.
    "apart, DDP": Run(
        config=TL6, model={**LLAMA, **APART}, loop="ddp overlap", recompute="selective", stages={"pattern": "*|-*-*-"}
    ),
    "apart, distributed": Run(
        config={**ONE_STAGE, "layers": [1]},
        model={**LLAMA, **APART},
        dtype="float32",
        loop="distributed overlap",
        recompute="full",
        stages={"pattern": "*-*-|*-"},
    ),
    # The first stage has no linear of the adapter.
    "with Mamba": Run(
        config=TL6, model={**LLAMA, "pattern": "M*-M*-"}, loop="ddp", recompute="full", stages={"pattern": "M|*-M*-"}
    ),
    "apart, nf4": Run(
        config=TL6, model={**QUANTISED_MODEL, "pattern": "*-*-"}, stages={"pattern": "*|-*-"}, steps=1, base=NF4
    ),
    "apart, rank budget": Run(config=BUDGET, model={"pattern": "*-*-"}, stages={"pattern": "*-*|-"}, steps=4),
    # Two stages are each other's next and last one: Megatron can only send to both at once with this overlap.
    "apart, chunks": Run(
        config=TL6,
        model=APART,
        loop="ddp",
        stages={"pattern": "*-|*|-*|-", "overlap_p2p_comm": True, "batch_p2p_comm": False},
    ),
}
"""The runs on HybridModel, from megatron-core 0.19 on. Where a pattern is paired, the oracle is GPTModel."""
_HYBRID_ON = {
    "single": ("apart, distributed", "with Mamba"),
    "tp2": ("apart, DDP", "with Mamba", "apart, nf4"),
    "tp2 sp": ("attention and MLP apart", "with Mamba"),
    "pp2": (
        *("attention and MLP apart", "apart, DDP", "apart, distributed", "with Mamba"),
        *("apart, nf4", "apart, rank budget"),
    ),
    "dp2": ("apart, DDP", "apart, distributed"),
    "cp2": ("attention and MLP apart",),
    "pp2 vp2": ("apart, chunks",),
}
TOLERANCES = {
    # Sums are only reordered: about 1e-13. Adam's division may magnify it if a gradient is small.
    "float64": 1e-9,
    # Against the float64 run: each product rounds by 6e-8, and some hundreds of these add up in a gradient. The gradient
    # of a u is a small sum of large terms.
    "float32": 5e-4,
    # Each product rounds by 4e-3 (8 bits), and each layout rounds other sums. For u the same holds as in float32.
    "bfloat16": 0.2,
}
"""The largest relative error of a loss, a norm, or a whole tensor (by its 2-norm), for each dtype."""

# Combinations that no preset has.
MIXED: dict[str, Run] = {
    "v alone, A tied": Run(config={"trained": ["v"], "tied": ["A"], "rank": 3}),
    "u alone, B tied": Run(config={"trained": ["u"], "tied": ["B"], "rank": 3}),
    "A alone": Run(config={"trained": ["A"], "rank": 3}),
    "first stage's layers": Run(config={"preset": "tl6", "rank": 3, "layers": [0], "targets": ["linear_proj"]}),
}


def runs_of(name: str, release: tuple[int, ...] | None = None) -> dict[str, Run]:
    """The runs of a layout on a release of megatron-core. None: the installed release."""
    layout, release = LAYOUTS[name], release or megatron_version()
    hybrid = {key: _fitted(HYBRID[key], layout, release) for key in _HYBRID_ON.get(name, ()) if release >= (0, 19)}
    if name == "pp2 vp2":
        return hybrid
    more = {"pp4": UNEVEN, "pp4 vp2": EMPTY_CHUNKS, "tp2 pp2": MIXED}.get(name, {})
    if name in FLOAT32_LAYOUTS:
        more = {**more, **FLOAT32_ADAPTER}
    more = {**more, **QUANTISED}
    if name in INT8_LAYOUTS:
        more = {**more, **INT8}
    if name in EXPERT_LAYOUTS:
        more = {**more, **EXPERTS}
    if counts_repeated_gradients(release):
        more = {**more, "overlap and full": OVERLAP_AND_FULL}
    return {key: _fitted(run, layout, release) for key, run in {**RUNS, **RANK_BUDGET, **more}.items()} | hybrid


def oracle_of(run: Run) -> Run:
    """The single-process run that must give the same result: plain and in float64, except for bfloat16 parameters."""
    plain = dataclasses.replace(run, recompute=None, stages={}, fault=None, features=(), plain=run.base is not None)
    pattern = run.model.get("pattern", "")
    if run.base is None and pattern and pattern == "*-" * (len(pattern) // 2):
        model = {key: value for key, value in run.model.items() if key != "pattern"}
        plain = dataclasses.replace(plain, model={**model, "num_layers": len(pattern) // 2})
    if run.dtype == "bfloat16":
        return dataclasses.replace(plain, loop="ddp")
    return dataclasses.replace(plain, loop="plain", dtype="float64")


def _fitted(run: Run, layout: Layout, release: tuple[int, ...]) -> Run:
    """The run, with the numbers of layers, query groups and microbatches that the layout needs."""
    model, features = dict(run.model), run.features
    if "pattern" in model:
        pass
    elif layout.vp is not None:
        model.setdefault("num_layers", layout.pp * layout.vp)
    elif (
        layout.tp > 1
        and layout.pp == 1
        and not {"without", "num_moe_experts"} & model.keys()
        and "layers" not in run.config
    ):
        model.setdefault("num_layers", 2)  # gloo's collectives are slow on few cores
    if model.get("llama"):
        model.setdefault("groups", 2)
        if model["groups"] < layout.tp and not splits_query_groups(release):
            model["groups"] = layout.tp
            features = tuple(feature for feature in features if feature != "one query group")
    microbatches = 4 if layout.vp is not None or layout.dp > 1 else 2
    if "rank budget" in features:
        model.setdefault("num_layers", max(2, layout.pp))
        if layout.dp > 1:
            run = dataclasses.replace(run, dtype="float32", loop="distributed overlap")
        elif layout in [LAYOUTS[name] for name in BUDGET_IN_OUR_LOOP]:
            run = dataclasses.replace(run, loop="plain")
    if run.base is not None:
        model.setdefault("num_layers", 4 if "num_moe_experts" in model else max(2, layout.pp))
        if layout.dp > 1:
            run = dataclasses.replace(run, dtype="float32", loop="distributed")
    return dataclasses.replace(run, model=model, microbatches=microbatches, features=features)


FAULTS: dict[str, dict[str, Run]] = {
    "pp2": {
        **{fault: Run(config=TL6, fault=fault) for fault in ("no sum", "summed twice", "stepped twice")},
        "shared=False": Run(config=TL6, fault="shared=False"),
        "own products": Run(config=BUDGET, model={"num_layers": 2}, steps=4, microbatches=2, fault="own products"),
        "pipeline_parallel=False": Run(config=TL6, loop="ddp", fault="pipeline_parallel=False"),
    },
    "tp2": {
        "tensor_model_parallel=False": Run(config=TL6, fault="tensor_model_parallel=False"),
        "another code": dataclasses.replace(INT8["int8"], fault="another code", microbatches=2),
    },
    "tp2 sp": {"sequence_parallel=False": Run(config=TL6, loop="ddp", fault="sequence_parallel=False")},
}
"""The planted errors of each layout. The comparison must notice each."""
