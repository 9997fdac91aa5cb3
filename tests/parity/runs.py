# SPDX-License-Identifier: Apache-2.0
"""What is trained, and on which layout. The runs of a layout together have every feature of the support table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from nemo_tied_lora.planning.megatron_version import counts_repeated_gradients, megatron_version, splits_query_groups
from tests.parity.layouts import LAYOUTS, Layout

__all__ = ["FAULTS", "OVERLAP_AND_FULL", "RUNS", "TOLERANCES", "Run", "oracle_of", "runs_of"]

TL6 = {"preset": "tl6", "rank": 3, "alpha": 5.0}
ONE_STAGE = {"preset": "tl6", "rank": 3, "layers": [3], "targets": ["linear_qkv", "linear_fc2"]}
LLAMA = {"llama": True, "hidden": 32, "heads": 8}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    config: the adapter's. model: options of `build_gpt`. dtype: of all parameters, "float64", "float32" or
    "bfloat16" (whose gradients are float32). loop: "plain", or of megatron-core's DDP: "ddp", "ddp overlap",
    "distributed", "distributed overlap"; with "aligned" after overlap, stages start their sums together.
    recompute: None, "selective" or "full". stages: options of `build_gpt` that lay layers out over stages.
    microbatches: of the global batch; data-parallel ranks share them.
    fault: an error that is planted: "no sum", "summed twice", "stepped twice", or a flag of all parameters, as
    "shared=False". features: the support table's
    columns that the run is a test of, beside those that the other fields say.
    """

    config: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"
    loop: str = "plain"
    recompute: str | None = None
    stages: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    microbatches: int = 4
    fault: str | None = None
    features: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The support table's columns."""
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
# Where DDP waits for all parts of a tied gradient, one a layer; in its first step it counts them.
OVERLAP_AND_FULL = Run(config=TL6, loop="ddp overlap", recompute="full", features=("overlap and full",))
# Six layers: first and last stage have one, those between them two.
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
TOLERANCES = {
    # Sums are only reordered: 1e-13 or so, which Adam's division may magnify where a gradient is small.
    "float64": 1e-9,
    # Against the float64 run: 6e-8 at each product, some hundreds of which add up on the way to a gradient; the gradient
    # of a u is a small sum of large terms.
    "float32": 5e-4,
    # 8 bits, 4e-3 at each product, and two layouts round other sums; u as in float32.
    "bfloat16": 0.2,
}
"""Largest relative error, of a loss, a norm, or a whole tensor by its 2-norm, for each dtype."""

# What no preset trains or ties.
MIXED: dict[str, Run] = {
    "v alone, A tied": Run(config={"trained": ["v"], "tied": ["A"], "rank": 3}),
    "u alone, B tied": Run(config={"trained": ["u"], "tied": ["B"], "rank": 3}),
    "A alone": Run(config={"trained": ["A"], "rank": 3}),
    "first stage's layers": Run(config={"preset": "tl6", "rank": 3, "layers": [0], "targets": ["linear_proj"]}),
}


def runs_of(name: str, release: tuple[int, ...] | None = None) -> dict[str, Run]:
    """Every run of a layout, on a release of megatron-core; None: the installed one."""
    layout, release = LAYOUTS[name], release or megatron_version()
    more = {"pp4": UNEVEN, "tp2 pp2": MIXED}.get(name, {})
    if counts_repeated_gradients(release):
        more = {**more, "overlap and full": OVERLAP_AND_FULL}
    return {run: _fitted(given, layout, release) for run, given in {**RUNS, **more}.items()}


def oracle_of(run: Run) -> Run:
    """The single-process run that must come out the same: plain, in float64, but for bfloat16 parameters."""
    plain = dataclasses.replace(run, recompute=None, stages={}, fault=None, features=())
    if run.dtype == "bfloat16":
        return dataclasses.replace(plain, loop="ddp")
    return dataclasses.replace(plain, loop="plain", dtype="float64")


def _fitted(run: Run, layout: Layout, release: tuple[int, ...]) -> Run:
    """The run with as many layers, query groups and microbatches as the layout needs."""
    model, features = dict(run.model), run.features
    if layout.vp is not None:
        model.setdefault("num_layers", layout.pp * layout.vp)
    elif layout.tp == 4 and "without" not in model and "layers" not in run.config:
        model.setdefault("num_layers", 2)  # gloo's collectives on few cores are what takes time
    if model.get("llama"):
        model.setdefault("groups", 2)
        if model["groups"] < layout.tp and not splits_query_groups(release):
            model["groups"] = layout.tp
            features = tuple(feature for feature in features if feature != "one query group")
    microbatches = 4 if layout.vp is not None or layout.dp > 1 else 2
    return dataclasses.replace(run, model=model, microbatches=microbatches, features=features)


FAULTS: dict[str, dict[str, Run]] = {
    "pp2": {
        **{fault: Run(config=TL6, fault=fault) for fault in ("no sum", "summed twice", "stepped twice")},
        "shared=False": Run(config=TL6, fault="shared=False"),
        "pipeline_parallel=False": Run(config=TL6, loop="ddp", fault="pipeline_parallel=False"),
    },
    "tp2": {"tensor_model_parallel=False": Run(config=TL6, fault="tensor_model_parallel=False")},
    "tp2 sp": {"sequence_parallel=False": Run(config=TL6, loop="ddp", fault="sequence_parallel=False")},
}
"""Errors that are planted, layout by layout: each must be noticed."""
